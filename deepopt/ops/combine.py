"""Linear combinations of stacked matrices, and the inner products of their rows.

Between its matrix products, an update rule mostly does these two things to whole matrices. One pass
measures the rows, a few numbers for each row are computed, and one pass writes the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.operator import operator

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _combine_supports(tensors: Sequence[Tensor], coefficients: Tensor) -> bool:
    narrow = all(tensor.dtype in _KERNEL_DTYPES for tensor in tensors)
    return narrow and coefficients.dtype == torch.float32


@operator("(Tensor[] tensors, Tensor coefficients) -> Tensor", _combine_supports)
def combine(tensors: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    r"""The sum :math:`\sum_k c_{kb} X_{kb}`, or with a coefficient for each row :math:`c_{kbi}`.

    Args:
        tensors: K of shape (B, m, n), of any floating dtypes.
        coefficients: shape (K, B) or (K, B, m).

    Returns:
        Shape (B, m, n), contiguous, in the dtype of the coefficients.

    Cost: every tensor is read once, the result written once.
    """
    if coefficients.dim() not in (2, 3):
        raise ValueError(
            f"Invalid coefficients: shape {tuple(coefficients.shape)}; give (K, B), a number for "
            "each matrix, or (K, B, m), for each row"
        )
    total = None
    for tensor, factor in zip(tensors, coefficients.unbind(0), strict=True):
        factor = factor.reshape(*factor.shape, *[1] * (tensor.dim() - factor.dim()))
        term = factor * tensor.to(factor.dtype)
        total = term if total is None else total + term
    if total is None:
        raise ValueError("Invalid tensors: none; combine needs at least one")
    return total.contiguous()


def _row_products_support(tensors: Sequence[Tensor]) -> bool:
    return len(tensors) <= 2 and all(tensor.dtype == torch.float32 for tensor in tensors)


@operator("(Tensor[] tensors) -> Tensor", _row_products_support)
def row_products(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of the rows of every tensor with those of itself and of the ones after it.

    Args:
        tensors: K of shape (B, m, n).

    Returns:
        Shape (K (K + 1) / 2, B, m), in the order of the upper triangle: for x and y those of x
        with x, x with y and y with y. Squares beyond the range of the dtype are infinite.

    Cost: every tensor is read once.
    """
    pairs = [
        (left * right).sum(-1) for i, left in enumerate(tensors) for right in list(tensors)[i:]
    ]
    return torch.stack(pairs)
