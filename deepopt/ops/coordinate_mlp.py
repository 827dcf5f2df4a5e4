"""One small MLP applied to every entry of a matrix: its features, its value and its gradient.

A unit k has weights (w_k1, ..., w_kF, v_k), and an entry with features x_1 ... x_F the value
sum_k v_k tanh(sum_f w_kf x_f). There is no bias: the value is odd in the features, as a step is in
the gradient, and zero where they are zero. Units are taken one after the other, so that the scratch
memory is that of a few matrices, whatever the number of units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.step_size import frobenius


def root_mean_square(matrices: Tensor) -> Tensor:
    """Root mean square of the entries of every matrix, shape (B, 1, 1)."""
    return (frobenius(matrices) / max(1, matrices[0].numel()) ** 0.5)[:, None, None]


def normalized(matrices: Tensor) -> Tensor:
    """Every matrix with a root mean square of 1; a zero matrix stays zero."""
    return matrices / root_mean_square(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)


def coordinate_mlp(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The MLP's value at every entry.

    Args:
        features: F tensors of shape (B, m, n).
        weights: of the MLP of each of the B matrices, shape (B, H, F + 1), read-out last.

    Returns:
        Shape (B, m, n).
    """
    value = torch.zeros_like(features[0])
    for unit in weights.unbind(1):
        value = value + _readout(unit) * torch.tanh(_drive(features, unit))
    return value


def coordinate_mlp_gradient(features: Sequence[Tensor], weights: Tensor, error: Tensor) -> Tensor:
    """Gradient with respect to ``weights`` of a loss whose gradient at the value is ``error``.

    Args:
        features: as in :func:`coordinate_mlp`.
        weights: as in :func:`coordinate_mlp`.
        error: shape (B, m, n).

    Returns:
        Shape (B, H, F + 1).
    """
    units = []
    for unit in weights.unbind(1):
        active = torch.tanh(_drive(features, unit))
        below = error * (1 - active.square()) * _readout(unit)
        parts = [(below * feature).sum((1, 2)) for feature in features]
        units.append(torch.stack([*parts, (error * active).sum((1, 2))], -1))
    return torch.stack(units, 1)


def _drive(features: Sequence[Tensor], unit: Tensor) -> Tensor:
    drive = unit[:, 0, None, None] * features[0]
    for index, feature in enumerate(features[1:], 1):
        drive = drive + unit[:, index, None, None] * feature
    return drive


def _readout(unit: Tensor) -> Tensor:
    return unit[:, -1, None, None]
