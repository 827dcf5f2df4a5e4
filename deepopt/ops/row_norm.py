"""What follows the orthogonalisation: row normalisation and the correction of the update's RMS."""

import torch
from torch import Tensor


def normalize_rows(
    matrices: Tensor, moment: Tensor, weight: Tensor, retention: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Divide each row by the root of its running mean square; keep each matrix' Frobenius norm.

    A row is an output neuron: rows that the orthogonalisation leaves long or short step after
    step come to move equally far (NorMuon, arXiv 2510.05491). Zero rows do not count, and each
    row has a bias correction of its own: a neuron that wakes late, or again, moves like the others
    and not by the root of its silence further.

    Args:
        matrices: shape (B, m, n).
        moment: running sums of mean squares, shape (B, m).
        weight: of what went into the sums, shape (B, m); their quotient is the mean.
        retention: share of the old moment that is kept, in [0, 1).

    Returns:
        The normalised matrices, the new moment and the new weight.
    """
    square = matrices.square().mean(-1)
    seen = square > 0
    moment = torch.where(seen, moment.lerp(square, 1 - retention), moment)
    weight = torch.where(seen, weight.lerp(torch.ones_like(weight), 1 - retention), weight)
    tiny = torch.finfo(matrices.dtype).tiny
    mean = (moment / weight.clamp_min(tiny)).clamp_min(tiny)
    normalized = matrices * mean.rsqrt()[..., None]
    before = torch.linalg.matrix_norm(matrices, keepdim=True)
    after = torch.linalg.matrix_norm(normalized, keepdim=True)
    return normalized * (before / after.clamp_min(tiny)), moment, weight


def rms_gain(matrices: Tensor, cap: float) -> Tensor:
    """Factor, shape (B, 1, 1), that brings a matrix to a semi-orthogonal one's norm, in [1, cap].

    Without the cap a rank-one matrix would be blown up until its single direction carries the
    norm of all: for 512 x 512 that is a spectral step 23 times too large.
    """
    rank = min(matrices.shape[-2:])
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return (rank**0.5 / norm).clamp(1.0, cap)
