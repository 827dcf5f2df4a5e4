"""The last part of a step: updates and weight decay are applied to the parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.operator import operator
from deepopt.ops.rounding import roundings, store_rounded, to_fp32


def _supports(
    params: Sequence[Tensor], updates: Sequence[Tensor], *_: object, **__: object
) -> bool:
    # Not strict: the operator checks the lengths itself.
    return all(update.dtype == _computed_in(param) for param, update in zip(params, updates))  # noqa: B905


@operator(
    "(Tensor(a!)[] params, Tensor[] updates, Tensor(b!)[] lows, int[] seeds, float lr, "
    "float weight_decay) -> ()",
    _supports,
)
def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    lows: Sequence[Tensor],
    seeds: Sequence[int],
    lr: float,
    weight_decay: float,
) -> None:
    r"""Change every parameter by its update, in place.

    .. math:: p \leftarrow (1-\gamma\lambda)\, p - \gamma u

    It is computed in float32, for float64 parameters in float64, and rounded once. bfloat16
    parameters are rounded in one of three ways:

    - to the nearest, if ``lows`` and ``seeds`` are empty: steps below 1/256 of a parameter are
      lost;
    - stochastically, up or down such that the mean is right: this needs no state, and loses nothing
      on average;
    - exactly: the 16 bits for which the parameter has no room are kept in ``lows``.

    Args:
        params: of any strides.
        updates: of their shapes and any strides, for the kernels float32 or, for float64
            parameters, float64.
        lows: empty, or an int16 tensor for each parameter, zeros at first. A bfloat16 parameter,
            rounded to the nearest with ties away from zero, and its tensor together are an exact
            float32. The tensors of parameters of other dtypes are not read.
        seeds: empty, or a number for each parameter. A bfloat16 parameter is rounded by random bits
            that depend only on the seed and on the entry's place in memory: equal seeds give equal
            bits, so give a new seed in each step. The seeds of parameters of other dtypes are not
            read.
        lr: γ.
        weight_decay: λ, decoupled.

    Raises:
        ValueError: both ``lows`` and ``seeds`` are given, or not one for each parameter.
    """
    if not lows and not seeds:
        for param, update in zip(params, updates, strict=True):
            dtype = _computed_in(param)
            param.copy_(param.to(dtype) * (1 - lr * weight_decay) - update.to(dtype) * lr)
        return
    choices = roundings(params, lows, seeds)
    for param, update, rounding in zip(params, updates, choices, strict=True):
        dtype = _computed_in(param)
        value = to_fp32(param, dtype, rounding) * (1 - lr * weight_decay) - update.to(dtype) * lr
        store_rounded(param, value, rounding)


def _computed_in(param: Tensor) -> torch.dtype:
    return torch.float64 if param.dtype == torch.float64 else torch.float32
