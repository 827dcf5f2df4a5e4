"""What follows the orthogonalisation: row normalisation and the correction of the update's RMS."""

import torch
from torch import Tensor


def normalize_rows(
    matrices: Tensor, moment: Tensor, retention: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Divide each row by the root of its running mean square; keep each matrix' Frobenius norm.

    A row is an output neuron: rows that the orthogonalisation leaves long or short step after
    step come to move equally far (NorMuon, arXiv 2510.05491). The moment needs no bias
    correction, because a factor common to all rows of a matrix cancels.

    Args:
        matrices: shape (B, m, n).
        moment: running mean squares, shape (B, m).
        retention: share of the old moment that is kept, in [0, 1).

    Returns:
        The normalised matrices and the new moment.
    """
    moment = moment.lerp(matrices.square().mean(-1), 1 - retention)
    tiny = torch.finfo(matrices.dtype).tiny
    normalized = matrices * moment.clamp_min(tiny).rsqrt()[..., None]
    before = torch.linalg.matrix_norm(matrices, keepdim=True)
    after = torch.linalg.matrix_norm(normalized, keepdim=True)
    return normalized * (before / after.clamp_min(tiny)), moment


def rms_gain(matrices: Tensor, cap: float) -> Tensor:
    """Factor, shape (B, 1, 1), that brings a matrix to a semi-orthogonal one's norm, in [1, cap].

    Without the cap a rank-one matrix would be blown up until its single direction carries the
    norm of all: for 512 x 512 that is a spectral step 23 times too large.
    """
    rank = min(matrices.shape[-2:])
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return (rank**0.5 / norm).clamp(1.0, cap)
