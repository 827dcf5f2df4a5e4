"""Negative fractional powers of Gram matrices (Eq 110, Eq 111 with a free power)."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from deepopt.ops.operator import operator
from deepopt.ops.ridge import widened

SQUARINGS = 10
"""How often C is squared to estimate its largest eigenvalue.

The estimate is the mean of all eigenvalues, each weighted by its power of 2^10 = 1024. It is below
the largest by less than 1 % up to r = 20,000, and equal to it if the others are much smaller.
"""


@operator("(Tensor gram, float power, float damping) -> Tensor")
def inverse_power(gram: Tensor, power: float, damping: float) -> Tensor:
    """(C / λ_max + damping I)^-power for every positive semi-definite C of a batch.

    Relative damping makes the result independent of the scale of C and bounds its norm by
    damping^-power, whatever the rank of C; a zero or a non-finite matrix gives the identity.
    Eigenvalues are computed in float64 where the device has it: Gram matrices square the condition
    number.

    Args:
        gram: shape (B, r, r), symmetric up to rounding.
        power: positive.
        damping: smallest eigenvalue that counts, relative to the largest.

    Cost: an eigendecomposition each, 0.12 s at r = 768 on one CPU core. On CUDA devices the host
    would wait for it, so :func:`newton` runs instead if it supports the arguments.
    """
    wide = _relative(gram)
    values, vectors = torch.linalg.eigh(wide)
    values = values.clamp_min(0)
    largest = values[:, -1:]
    values = torch.where(largest > 0, values / largest + damping, torch.ones_like(values))
    # The product needs no wider dtype: its factors are already as exact as the result can be.
    half = (vectors * values.pow(-power / 2)[:, None, :]).to(gram.dtype)
    return half @ half.mT


def newton_serves(gram: Tensor, power: float, damping: float) -> bool:
    """Whether :func:`newton` computes what :func:`inverse_power` does.

    It takes the inverse p-th roots of integer p, and must be sure that rounding of ``gram`` has
    left no eigenvalue below -damping.
    """
    p = round(1 / power)
    return 1 <= p and abs(1 / power - p) < 1e-9 and damping >= 8 * torch.finfo(gram.dtype).eps


Product: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@inverse_power.backend("cuda", supports=newton_serves)
def newton(gram: Tensor, power: float, damping: float) -> Tensor:
    """:func:`newton_by` in float64."""
    return newton_by(gram, power, damping, torch.float64, torch.matmul, lambda x: x @ x)


def newton_by(
    gram: Tensor,
    power: float,
    damping: float,
    dtype: torch.dtype,
    product: Product,
    square: Callable[[Tensor], Tensor],
) -> Tensor:
    r""":func:`inverse_power` for power = 1/p, by products alone and with no decision on the host.

    Newton's iteration for inverse p-th roots, with the residual beside the root:

    .. math::
        X_{k+1} = X_k\, q_k(R_k), \qquad R_{k+1} = q_k(R_k)^p R_k, \qquad
        q_k(R) = s_k (a_k I - R)

    from :math:`X_0 = I` and :math:`R_0 = C/\lambda_{\max} + \text{damping}\, I`, until R = I. An
    eigenvalue x^p of R becomes (x q(x^p))^p, and :math:`s_k` and :math:`a_k` make x q(x^p) as close
    to 1 as can be on the interval that the steps before it have left. Eigenvalues that rounding has
    made negative are not lifted to zero first.

    Args:
        gram: shape (B, r, r), symmetric up to rounding.
        power: the reciprocal of a positive integer.
        damping: at least 8 times the resolution of ``gram``'s dtype.
        dtype: the dtype of what is multiplied.
        product: multiplies two matrices that commute, in ``dtype``.
        square: squares a symmetric matrix of norm 1. Its largest eigenvalue alone counts, so the
            square may be coarse.

    Cost: at power 1/2 and damping 1e-6, 43 products of 2r³ FLOPs in float64, 40 in float32; 50 and
    42 at power 1/4. Ten of them are by ``square``.
    """
    p = round(1 / power)
    wide = _relative(gram)
    tiny = torch.finfo(gram.dtype).tiny
    weights = wide.to(dtype)
    for _ in range(SQUARINGS):
        weights = square(weights)
        weights = weights / torch.linalg.matrix_norm(weights, keepdim=True).clamp_min(tiny)
    traces = (weights * wide).sum((-2, -1)), weights.diagonal(dim1=-2, dim2=-1).sum(-1)
    largest = (traces[0] / traces[1].clamp_min(tiny))[:, None, None]
    one = torch.eye(gram.shape[-1], dtype=wide.dtype, device=wide.device)
    residual = torch.where(largest > 0, wide / largest.clamp_min(tiny) + damping * one, one)
    residual, one = residual.to(dtype), one.to(dtype)
    root = one.expand_as(residual)
    coefficients = newton_coefficients(p, damping / 2, dtype)
    for step, (s, a) in enumerate(coefficients):
        factor = s * (a * one - residual)
        root = product(root, factor) if step else factor
        if step < len(coefficients) - 1:
            residual = product(_to_the(p, factor, product), residual)
    return root.to(gram.dtype)


def _to_the(p: int, matrix: Tensor, product: Product) -> Tensor:
    """A matrix to the p-th power, by squaring."""
    if p == 1:
        return matrix
    half = _to_the(p // 2, matrix, product)
    squared = product(half, half)
    return product(squared, matrix) if p % 2 else squared


@functools.lru_cache
def newton_coefficients(
    p: int, lower: float, dtype: torch.dtype = torch.float64
) -> Sequence[tuple[float, float]]:
    """(s, a) of each step of Newton's iteration for eigenvalues of at least ``lower``.

    They are at most 1 + damping, of which ``lower`` is half, and 1 % for what the largest may be
    above its estimate. With x the p-th root of an eigenvalue, s x (a - x^p) rises from l at the
    lower end of the interval to a maximum and falls to the same l at the upper end; s makes the
    maximum 2 - l.
    """
    low, high = lower ** (1 / p), (1.01 * (1 + 2 * lower)) ** (1 / p)
    coefficients = []
    while 1 - low > 16 * torch.finfo(dtype).eps:
        a = sum(high**i * low ** (p - i) for i in range(p + 1))
        peak = (a / (p + 1)) ** (1 / p)
        s = 2 / (low * (a - low**p) + p * peak ** (p + 1))
        coefficients.append((s, a))
        low = s * low * (a - low**p)
        high = 2 - low
    return tuple(coefficients)


def _relative(gram: Tensor) -> Tensor:
    """``gram`` over its norm, in float64 if the device has it; zero if ``gram`` is not finite."""
    finite = gram.isfinite().all(-1).all(-1)[:, None, None]
    wide = widened(torch.where(finite, gram, torch.zeros_like(gram)))
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    return wide / norm.clamp_min(torch.finfo(gram.dtype).tiny)
