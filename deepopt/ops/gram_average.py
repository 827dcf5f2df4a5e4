"""The running Gram matrices of the covariance memory: Eq 106, Eq 107 for rows and columns."""

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
    r"""kept C + share K Kᵀ, where the keys K are the rows or the columns of G / scale.

    Args:
        gram: C, shape (B, r, r) with r the number of keys.
        grad: G, shape (B, m, n).
        scale: not below G's largest entry, shape (B,); a zero matrix may have 0.
        kept: the share of C that is kept, shape (B,).
        share: factor of the new product.
        of_rows: the keys are rows, and r is m; otherwise they are columns, and r is n.

    Cost: half of a product of 2r²R FLOPs, R being the other side. Kernels round the keys to
    bfloat16 and sum in float32: the result is the Gram matrix of the rounded keys, positive
    semi-definite but for float32's rounding, to which the rounding adds less than 1e-6 of its
    mean eigenvalue.
    """
    factor = grad / scale.clamp_min(torch.finfo(grad.dtype).tiny)[:, None, None]
    product = _symmetric(factor if of_rows else factor.mT)
    return kept[:, None, None] * gram + share * product


def _symmetric(matrices: Tensor) -> Tensor:
    """X Xᵀ of every matrix. Blocks above the diagonal are copied from below it, transposed."""
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
