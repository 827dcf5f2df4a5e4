"""The covariance memory on matrix units: its Gram matrices, and their roots."""

import functools

import torch
from torch import Tensor

from deepopt.ops.combine import combine
from deepopt.ops.inverse_power import newton_by
from deepopt.ops.triton.scaling import divided
from deepopt.ops.triton.split import split_product
from deepopt.ops.triton.symmetric import symmetric_product


def gram_average(
    gram: Tensor, grad: Tensor, scale: Tensor, kept: Tensor, share: float, of_rows: bool
) -> Tensor:
    """:func:`deepopt.ops.gram_average` of keys in bfloat16, with sums in float32.

    Cost: half of a product of 2r²R FLOPs; 8 bytes per entry of ``grad`` and 16 of ``gram``.
    """
    keys = divided(grad, scale.clamp_min(torch.finfo(grad.dtype).tiny), torch.bfloat16)
    keys = keys if of_rows else keys.mT
    product = symmetric_product(keys, keys, dtype=torch.float32)
    return combine([gram, product], torch.stack([kept, torch.full_like(kept, share)]))


def inverse_power(gram: Tensor, power: float, damping: float) -> Tensor:
    """:func:`deepopt.ops.inverse_power` by Newton's iteration in split products.

    As exact as in float32, whose rounding of the Gram matrix already moves the smallest eigenvalues
    that count, at 1e-6 of the largest, by as much. A last step in float64 makes it worse: without
    the residual beside it the iteration enlarges errors by the condition number's root.
    """
    product = functools.partial(split_product, bounded=True)
    return newton_by(gram, power, damping, torch.float32, product, _square)


def _square(matrix: Tensor) -> Tensor:
    half = matrix.bfloat16()
    return symmetric_product(half, half, dtype=torch.float32)
