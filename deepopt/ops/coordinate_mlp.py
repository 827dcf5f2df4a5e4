"""One small MLP applied to every entry of a matrix: its features, its value and its gradient.

A unit k has weights (w_k1, ..., w_kF, v_k), and an entry with features x_1 ... x_F the value
sum_k v_k tanh(sum_f w_kf x_f). There is no bias: the value is odd in the features, as a step is in
the gradient, and zero where they are zero. The entry that it corrects moves by reach times the tanh
of the value. Units are computed one after the other, so that the scratch memory is that of a few
matrices, whatever the number of units. The kernels take a few kilobytes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.operator import operator


def _supports(
    base: Tensor,
    reach: Tensor,
    features: Sequence[Tensor],
    scales: Tensor,
    weights: Tensor,
    *_: object,
) -> bool:
    return base.dtype == weights.dtype == torch.float32 and len(features) <= 4


@operator(
    "(Tensor base, Tensor reach, Tensor[] features, Tensor scales, Tensor weights) -> Tensor",
    _supports,
)
def coordinate_mlp(
    base: Tensor, reach: Tensor, features: Sequence[Tensor], scales: Tensor, weights: Tensor
) -> Tensor:
    r"""A matrix corrected by the MLP, entry by entry.

    .. math:: B + r \tanh\Big(\sum_k v_k \tanh\big(\sum_f w_{kf}\, s_f X_f\big)\Big)

    Args:
        base: B, shape (B, m, n).
        reach: r, the largest change of an entry, shape (B,).
        features: X, F tensors of shape (B, m, n).
        scales: s, the factors of the features, shape (B, F).
        weights: w and v of the MLP of every matrix, shape (B, H, F + 1), the read-out v last.

    Returns:
        Shape (B, m, n).

    Cost: about H (2 F + 22) FLOPs per entry, 21 of them for each tanh; one read of every tensor
    and one write.
    """
    value = _value(_scaled(features, scales), weights)
    return base + reach[:, None, None] * torch.tanh(value)


@operator(
    "(Tensor base, Tensor reach, Tensor[] features, Tensor scales, Tensor weights, Tensor target, "
    "Tensor unit) -> Tensor",
    _supports,
)
def coordinate_mlp_gradient(
    base: Tensor,
    reach: Tensor,
    features: Sequence[Tensor],
    scales: Tensor,
    weights: Tensor,
    target: Tensor,
    unit: Tensor,
) -> Tensor:
    r"""Gradient, for the weights, of half the mean square error of :func:`coordinate_mlp`.

    Args:
        base: B, as for :func:`coordinate_mlp`, like the next four.
        reach: r.
        features: X.
        scales: s.
        weights: w and v.
        target: the matrix that it should have given, shape (B, m, n).
        unit: the number by which errors are divided, shape (B,).

    Returns:
        Shape (B, H, F + 1).

    Cost: about H (4 F + 26) FLOPs per entry; one read of every tensor.
    """
    keys = _scaled(features, scales)
    reach, unit = reach[:, None, None], unit[:, None, None]
    correction = torch.tanh(_value(keys, weights))
    error = (base + reach * correction - target) / unit
    slope = error * (reach / unit) * (1 - correction.square()) / max(1, target.shape[1:].numel())
    units = []
    for one in weights.unbind(1):
        active = torch.tanh(_drive(keys, one))
        below = slope * (1 - active.square()) * _readout(one)
        parts = [(below * key).sum((1, 2)) for key in keys]
        units.append(torch.stack([*parts, (slope * active).sum((1, 2))], -1))
    return torch.stack(units, 1)


def _scaled(features: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    factors = scales[:, :, None, None].unbind(1)
    return [feature * factor for feature, factor in zip(features, factors, strict=True)]


def _value(keys: Sequence[Tensor], weights: Tensor) -> Tensor:
    value = torch.zeros_like(keys[0])
    for unit in weights.unbind(1):
        value = value + _readout(unit) * torch.tanh(_drive(keys, unit))
    return value


def _drive(keys: Sequence[Tensor], unit: Tensor) -> Tensor:
    drive = unit[:, 0, None, None] * keys[0]
    for index, key in enumerate(keys[1:], 1):
        drive = drive + unit[:, index, None, None] * key
    return drive


def _readout(unit: Tensor) -> Tensor:
    return unit[:, -1, None, None]
