"""Norms of matrices and their running means, without overflow or underflow of the squares."""

import torch
from torch import Tensor

from deepopt.ops.operator import operator


@operator("(Tensor matrices) -> Tensor", lambda matrices: matrices.dtype == torch.float32)
def frobenius(matrices: Tensor) -> Tensor:
    """The Frobenius norm of every matrix, shape (B,), even where squares leave the range of floats.

    It is at most the largest number of the dtype, and NaN where an entry is not finite.
    """
    info = torch.finfo(matrices.dtype)
    scale = matrices.detach().abs().amax((-2, -1)).clamp_min(info.tiny)
    norm = torch.linalg.matrix_norm(matrices / scale[:, None, None])
    return (norm * scale).clamp_max(info.max)


def root_mean_square(matrices: Tensor) -> Tensor:
    """Root mean square of the entries of every matrix, shape (B,)."""
    return frobenius(matrices) / max(1, matrices.shape[1:].numel()) ** 0.5


def normalized(matrices: Tensor) -> Tensor:
    """Every matrix with a root mean square of 1; a zero matrix stays zero."""
    size = root_mean_square(matrices).clamp_min(torch.finfo(matrices.dtype).tiny)
    return matrices / size[:, None, None]


def running_root(root: Tensor, value: Tensor, share: float | Tensor) -> Tensor:
    """The root of the running mean of squares, sqrt((1 - share) root² + share value²), safely."""
    tiny = torch.finfo(root.dtype).tiny
    larger = torch.maximum(root, value).detach().clamp_min(tiny)
    mean = (root / larger).square().lerp((value / larger).square(), share)
    # Clamped, because the derivative of a root is infinite at zero.
    return mean.clamp_min(tiny).sqrt() * larger
