"""The write of the delta memory (Eq 49), and the look-ahead that it reads, which is ours."""

import torch
from torch import Tensor

from deepopt.ops.norms import frobenius, running_root
from deepopt.ops.operator import operator
from deepopt.ops.products import is_small, worth_rounding

HEADROOM = 16.0
"""A gradient counts with at most the largest float divided by this.

The momentum's singular values then stay below that bound, and the factor 16 above it leaves room
for the look-ahead, which is enlarged.
"""


@operator(
    "(Tensor momentum, Tensor grad, Tensor norm, Tensor erasure, float rate, float retention)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    supports=lambda momentum, grad, norm, erasure, rate, retention: (
        (is_small(momentum) or worth_rounding(momentum))
        and grad.dtype == norm.dtype == erasure.dtype == torch.float32
        and isinstance(retention, int | float)
    ),
)
def delta_write(
    momentum: Tensor,
    grad: Tensor,
    norm: Tensor,
    erasure: Tensor,
    rate: float,
    retention: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Erase from the momentum what a gradient's keys recall, and write the gradient (Eq 49).

    .. math::
        \bar\sigma &= \|G\,G^\top G\,G^\top\|_F^{1/4}, \qquad
        s \leftarrow \sqrt{0.9\, s^2 + 0.1\, \bar\sigma^2}, \qquad K = G / \max(s, \bar\sigma) \\
        E &= \eta\, M K^\top K, \qquad g = 1 + \varepsilon / (1-\beta), \qquad
        \varepsilon \leftarrow 0.9\,\varepsilon + 0.1\,\|E\|_F / \|M\|_F \\
        M &\leftarrow \beta M - E + (1-\beta)\, G, \qquad
        A = g\,(\beta (M - E) + (1-\beta)\, G)

    Args:
        momentum: M, shape (B, m, n).
        grad: G, of the same shape.
        norm: s, shape (B,).
        erasure: ε, shape (B,).
        rate: η, in [0, 1].
        retention: β.

    Returns:
        The new M, s and ε, and the look-ahead A, which :class:`deepopt.memory.Delta` reads.

    Cost, with r and R the short and the long side, in units of 2 r²R FLOPs: one symmetric product,
    r/R of another one, and one product where m >= n, two where m < n. Kernels multiply in bfloat16
    from a short side of 64 on, in float32 below. Keys and momentum are rounded to bfloat16 as
    operands alone: the momentum itself is not. The norm is rounded up by as much, so that no key
    exceeds one. A gradient whose size is beyond a sixteenth of the largest float counts as one of
    that size.
    """
    info = torch.finfo(grad.dtype)
    # Powers of a singular value leave float32's range long before the value does. So the gradient
    # is scaled by its largest entry, and norms are squared relative to the larger of the two.
    scale = grad.abs().amax((-2, -1)).clamp_min(info.tiny)
    scaled = grad / scale[:, None, None]
    wide = grad.shape[-2] < grad.shape[-1]
    gram = scaled @ scaled.mT if wide else scaled.mT @ scaled
    root = torch.linalg.matrix_norm(gram @ gram).pow(0.25)
    counted = torch.minimum(scale, info.max / HEADROOM / root)
    cut, bound = counted / scale, root * counted
    norm = running_root(norm, bound, 0.1)
    square = (counted / torch.maximum(norm, bound).clamp_min(info.tiny)).square()
    # E = eta M KᵀK, where KᵀK = square scaledᵀ scaled, and M = momentum.
    # Products of a huge momentum would overflow before the small factor brings them back.
    size = frobenius(momentum)
    unit = torch.where(size > 2.0**64, 2.0**-64, 1.0).to(grad.dtype)
    shrunk = unit[:, None, None] * (scaled.mT if wide else gram)
    erased = (momentum @ shrunk) @ scaled if wide else momentum @ shrunk
    erased = erased * (rate * square / unit)[:, None, None]
    # The share is at most the rate; clamped norms at the end of the range may say otherwise.
    share = (frobenius(erased) / size.clamp_min(info.tiny)).clamp_max(rate)
    # beta M - E, and (1 - beta) G
    kept, fresh = retention * momentum - erased, ((1 - retention) * cut)[:, None, None] * grad
    gain = (1 + erasure / (1 - retention))[:, None, None]
    ahead = gain * (retention * (kept - erased) + (1 + retention) * fresh)
    return kept + fresh, norm, erasure.lerp(share, 0.1), ahead
