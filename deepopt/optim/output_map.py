"""The output map of the matrix path: a momentum made orthogonal, as large as AdamW's step (Eq 52).

Its options are those of the group: ``ns_steps``, ``ns_coefficients``, ``row_norm``, ``rms_cap`` and
``update_rms``; :class:`DeepMomentum` documents them.
"""

import torch
from torch import Tensor

from deepopt._compat import multiplies_bfloat16_faster
from deepopt.ops import newton_schulz, orthogonal_update, polar_express
from deepopt.ops.newton_schulz import Coefficients
from deepopt.ops.products import SHORTEST
from deepopt.optim.base import Group


def check_output_map(group: Group) -> None:
    """Raise ValueError for the first of the output map's options that is out of range."""
    if group["update_rms"] is not None and not group["update_rms"] > 0.0:
        raise ValueError(f"Invalid update_rms: {group['update_rms']}; it must be positive, or None")
    if not group["rms_cap"] >= 1.0:
        raise ValueError(f"Invalid rms_cap: {group['rms_cap']}; it must be at least 1")
    if not isinstance(group["ns_steps"], int) or not 1 <= group["ns_steps"] < 100:
        raise ValueError(
            f"Invalid ns_steps: {group['ns_steps']}; it must be a whole number from 1 to 99"
        )
    abc = group["ns_coefficients"]
    if abc is not None and [isinstance(x, int | float) for x in abc] != [True] * 3:
        raise ValueError(f"Invalid ns_coefficients: {abc}; give three numbers or None")


def init_output_map(like: Tensor, group: Group) -> dict[str, Tensor]:
    """The state of :func:`output_map`."""
    state = {}
    if group["update_rms"] is None:
        state["grad_norm"] = like.new_zeros(len(like))
    if group["row_norm"]:
        state["row_moment"] = like.new_zeros(like.shape[:2])
        state["row_weight"] = like.new_zeros(like.shape[:2])
    return state


def orthogonalize(momentum: Tensor, group: Group) -> Tensor:
    """Newton-Schulz with the group's steps and coefficients."""
    return newton_schulz(momentum, _coefficients(group), _products_dtype(momentum))


def output_map(
    momentum: Tensor,
    state: dict[str, Tensor],
    grad: Tensor,
    group: Group,
    gain: Tensor | None = None,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A momentum, orthogonalised, with its rows normalised, as large as AdamW's update would be.

    Args:
        momentum: an average of gradients, shape (B, m, n).
        state: with what :func:`init_output_map` made, and ``step``.
        grad: the gradient.
        group: its ``betas`` and the options above.
        gain: how many times as large the average is, shape (B,); None: once.
        beside: another orthogonal update and its weight, shape (B,): the weighted sum with it takes
            the place of the momentum's, at the norm of that.
    """
    keys = [] if group["update_rms"] is not None else ["grad_norm"]
    keys += ["row_moment", "row_weight"] if group["row_norm"] else []
    given = {key: state[key] for key in keys}
    beta1, beta2 = group["betas"]
    other, weight = beside or (None, None)
    # Under another default dtype than the matrices', counts are of that one.
    step = state["step"].float() if momentum.dtype == torch.float32 else state["step"]
    update, *new = orthogonal_update(
        momentum,
        _coefficients(group),
        _products_dtype(momentum),
        other,
        weight,
        gain,
        grad,
        step,
        given.get("grad_norm"),
        given.get("row_moment"),
        given.get("row_weight"),
        beta1,
        beta2,
        group["rms_cap"],
        group["update_rms"],
    )
    state.update(zip(keys, new, strict=True))
    return update


def _coefficients(group: Group) -> Coefficients:
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    return polar_express(steps) if coefficients is None else [tuple(coefficients)] * steps


def _products_dtype(matrices: Tensor) -> torch.dtype:
    """bfloat16 where it is faster: Newton-Schulz corrects its own rounding."""
    worthwhile = matrices.dtype == torch.float32 and min(matrices.shape[-2:]) >= SHORTEST
    narrow = worthwhile and multiplies_bfloat16_faster(matrices.device)
    return torch.bfloat16 if narrow else matrices.dtype
