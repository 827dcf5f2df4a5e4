"""The running Gram matrices of the covariance memory (Eqs 106-111 side by side)."""

import torch
from torch import Tensor

from deepopt.ops.operator import operator
from deepopt.ops.products import worth_rounding


@operator(
    "(Tensor gram, Tensor grad, Tensor scale, Tensor kept, float share, bool of_rows) -> Tensor",
    supports=lambda gram, grad, scale, kept, share, of_rows: (
        worth_rounding(grad) and gram.dtype == scale.dtype == kept.dtype == torch.float32
    ),
)
def gram_average(
    gram: Tensor, grad: Tensor, scale: Tensor, kept: Tensor, share: float, of_rows: bool
) -> Tensor:
    r"""kept C + share K Kᵀ for the keys K = G / scale, which are the rows of G, or its columns.

    Args:
        gram: C, shape (B, r, r) with r the number of keys.
        grad: G, shape (B, m, n).
        scale: not below G's largest entry, shape (B,); a zero matrix may have 0.
        kept: shape (B,).
        share: of the new product.
        of_rows: r = m, otherwise n.

    Cost: half of a product of 2r²R FLOPs, R being the other side. Kernels round the keys to
    bfloat16 and sum in float32: the result is the Gram matrix of the rounded keys, positive
    semi-definite but for float32's rounding, to which the rounding adds less than 1e-6 of its
    mean eigenvalue.
    """
    factor = grad / scale.clamp_min(torch.finfo(grad.dtype).tiny)[:, None, None]
    product = _symmetric(factor if of_rows else factor.mT)
    return kept[:, None, None] * gram + share * product


def _symmetric(matrices: Tensor) -> Tensor:
    """X Xᵀ of every matrix, of which the blocks above the diagonal are those below, transposed."""
    rows = matrices.shape[-2]
    block = max(128, rows // 6)
    if rows < 2 * block or matrices.device.type != "cpu":
        return matrices @ matrices.mT
    gram = matrices.new_empty(len(matrices), rows, rows)
    for start in range(0, rows, block):
        stop = start + block
        gram[:, start:stop, :stop] = matrices[:, start:stop] @ matrices[:, :stop].mT
        gram[:, :start, start:stop] = gram[:, start:stop, :start].mT
    return gram
