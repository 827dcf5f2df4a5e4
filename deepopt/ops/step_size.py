"""How far an orthogonalised update goes: as a whole, and row by row."""

import torch
from torch import Tensor

from deepopt.ops.operator import operator


@operator("(Tensor matrices) -> Tensor", lambda matrices: matrices.dtype == torch.float32)
def frobenius(matrices: Tensor) -> Tensor:
    """Frobenius norm of every matrix, shape (B,), also where squares leave the range of floats.

    It is at most the largest number of the dtype, and NaN where an entry is not finite.
    """
    info = torch.finfo(matrices.dtype)
    scale = matrices.detach().abs().amax((-2, -1)).clamp_min(info.tiny)
    norm = torch.linalg.matrix_norm(matrices / scale[:, None, None])
    return (norm * scale).clamp_max(info.max)


def running_root(root: Tensor, value: Tensor, share: float | Tensor) -> Tensor:
    """The root of the running mean of squares, sqrt((1 - share) root² + share value²), safely."""
    tiny = torch.finfo(root.dtype).tiny
    larger = torch.maximum(root, value).detach().clamp_min(tiny)
    mean = (root / larger).square().lerp((value / larger).square(), share)
    return mean.clamp_min(tiny).sqrt() * larger  # the slope of a root is infinite at zero


def adam_ratio(
    momentum: Tensor,
    grad_norm: Tensor,
    step: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    gain: Tensor | None = None,
) -> Tensor:
    """The root mean square that AdamW's update would have, of each matrix as a whole.

    AdamW divides the averaged gradient by the root of the averaged squared gradient: about 1 where
    gradients agree, sqrt((1 - beta1) / (1 + beta1)) where they are noise, and towards 0 once they
    stop. An orthogonalised update has lost that size; this restores it.

    Args:
        momentum: averages of the gradient, in its units, shape (B, m, n).
        grad_norm: running roots of the mean squared Frobenius norm of the gradient, shape (B,).
        step: gradients in the averages so far, shape (B,), for their bias corrections.
        betas: retentions of the two averages.
        gain: how many times as large as ``momentum`` the averages are, shape (B,); None: once.

    Returns:
        Shape (B,), between 0 and 1.
    """
    first, second = (  # no host waits for the copy of a step count to the device
        (1 - beta**step).to(grad_norm.device, grad_norm.dtype, non_blocking=True) for beta in betas
    )
    tiny = torch.finfo(grad_norm.dtype).tiny
    # Norms first: corrected, the largest of them would leave the range.
    ratio = frobenius(momentum) / grad_norm.clamp_min(tiny) * (second.sqrt() / first)
    return (ratio if gain is None else ratio * gain).clamp_max(1.0)


def row_gains(
    square: Tensor, moment: Tensor, weight: Tensor, retention: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors that divide each row by the root of its running mean square and keep matrices' norms.

    A row is an output neuron: rows that the orthogonalisation leaves long or short step after
    step come to move equally far (NorMuon, arXiv 2510.05491). Zero rows do not count, and each
    row has a bias correction of its own: a neuron that wakes late, or again, moves like the others
    and not by the root of its silence further.

    Args:
        square: mean squares of the rows, shape (B, m): all there is to know of the matrices.
        moment: running sums of mean squares, shape (B, m).
        weight: of what went into the sums, shape (B, m); their quotient is the mean.
        retention: share of the old moment that is kept, in [0, 1).

    Returns:
        The factors, the new moment and the new weight, all of shape (B, m).
    """
    seen = square > 0
    moment = torch.where(seen, moment.lerp(square, 1 - retention), moment)
    weight = torch.where(seen, weight.lerp(torch.ones_like(weight), 1 - retention), weight)
    tiny = torch.finfo(square.dtype).tiny
    mean = (moment / weight.clamp_min(tiny)).clamp_min(tiny)
    before = square.sum(-1, keepdim=True).clamp_min(tiny)
    after = (square / mean).sum(-1, keepdim=True).clamp_min(tiny)
    return mean.rsqrt() * (before / after).sqrt(), moment, weight


def rms_gain(norm: Tensor, rank: int, cap: float) -> Tensor:
    """Factor that brings a Frobenius norm to that of a semi-orthogonal matrix, in [1, cap].

    Without the cap a rank-one matrix would be blown up until its single direction carries the
    norm of all: for 512 x 512 that is a spectral step 23 times too large.

    Args:
        norm: of any shape.
        rank: the largest that the matrices can have, their shorter side.
        cap: at least 1.
    """
    return (rank**0.5 / norm).clamp(1.0, cap)
