"""The output map of the matrix path: a momentum made orthogonal, as large as AdamW's step (Eq 52).

Its options are those of the group: ``ns_steps``, ``ns_coefficients``, ``row_norm``, ``rms_cap`` and
``update_rms``; :class:`DeepMomentum` documents them.
"""

import torch
from torch import Tensor

from deepopt._compat import multiplies_bfloat16_faster
from deepopt.ops import (
    adam_ratio,
    combine,
    frobenius,
    newton_schulz,
    polar_express,
    rms_gain,
    row_gains,
    row_products,
    running_root,
)
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
    """The state of :func:`resize`."""
    state = {}
    if group["update_rms"] is None:
        state["grad_norm"] = like.new_zeros(len(like))
    if group["row_norm"]:
        state["row_moment"] = like.new_zeros(like.shape[:2])
        state["row_weight"] = like.new_zeros(like.shape[:2])
    return state


def orthogonalize(momentum: Tensor, group: Group) -> Tensor:
    """Newton-Schulz with the group's steps and coefficients."""
    coefficients, steps = group["ns_coefficients"], group["ns_steps"]
    return newton_schulz(
        momentum,
        polar_express(steps) if coefficients is None else [tuple(coefficients)] * steps,
        _products_dtype(momentum),
    )


def resize(
    update: Tensor,
    momentum: Tensor,
    state: dict[str, Tensor],
    grad: Tensor,
    group: Group,
    beside: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """An orthogonalised update with its rows normalised, as large as AdamW's would be.

    All of it is linear: the update is read once for the squares of its rows, and once to be
    multiplied by a factor for each of them.

    Args:
        update: shape (B, m, n).
        momentum: the average of gradients whose size counts, in their units.
        state: with what :func:`init_output_map` made, and ``step``.
        grad: the gradient.
        group: its ``betas``, ``row_norm``, ``rms_cap`` and ``update_rms``.
        beside: another update and its weight, shape (B,): the weighted sum with it takes the place
            of the update, at the update's norm.
    """
    rows, columns = update.shape[-2:]
    tiny = torch.finfo(update.dtype).tiny
    updates, weights = [update], update.new_ones(1, len(update))
    if beside is not None:
        updates, weights = [update, beside[0]], torch.stack([weights[0], beside[1]])
    products = row_products(updates)
    square = products[0]
    norm = square.sum(-1).clamp_min(tiny).sqrt()
    if beside is not None:
        weight = beside[1][:, None]
        square = square + 2 * weight * products[1] + weight.square() * products[2]
        square = square.clamp_min(0.0)  # a sum of products, which are rounded
        shrink = norm / square.sum(-1).clamp_min(tiny).sqrt()
        square, weights = square * shrink.square()[:, None], weights * shrink
    gain = max(rows, columns) ** 0.5 * rms_gain(norm, min(rows, columns), group["rms_cap"])
    if group["update_rms"] is not None:
        gain = gain * group["update_rms"]
    else:
        gain = gain * adam_size(momentum, state, grad, group["betas"]).flatten()
    weights = weights * gain
    if group["row_norm"]:
        gains, state["row_moment"], state["row_weight"] = row_gains(
            square / columns, state["row_moment"], state["row_weight"], group["betas"][1]
        )
        weights = weights[:, :, None] * gains
    return combine(updates, weights)


def adam_size(
    momentum: Tensor,
    state: dict[str, Tensor],
    grad: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
) -> Tensor:
    """AdamW's root mean square for every matrix, shape (B, 1, 1), as in :func:`resize`."""
    state["grad_norm"] = running_root(state["grad_norm"], frobenius(grad), 1 - betas[1])
    return adam_ratio(momentum, state["grad_norm"], state["step"], betas)[:, None, None]


def _products_dtype(matrices: Tensor) -> torch.dtype:
    """bfloat16 where it is faster: Newton-Schulz corrects its own rounding."""
    worthwhile = matrices.dtype == torch.float32 and min(matrices.shape[-2:]) >= 64
    narrow = worthwhile and multiplies_bfloat16_faster(matrices.device)
    return torch.bfloat16 if narrow else matrices.dtype
