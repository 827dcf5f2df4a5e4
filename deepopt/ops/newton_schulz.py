"""Orthogonalization by an odd matrix polynomial, as in Muon (Eq 42, Eq 43, Eq 44, Eq 52)."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.operator import operator
from deepopt.ops.products import is_small, worth_rounding

Coefficients = Sequence[tuple[float, float, float]]


@operator(
    "(Tensor matrices, float[][] coefficients, ScalarType dtype) -> Tensor",
    supports=lambda matrices, coefficients, dtype: (
        (dtype == torch.float32 and is_small(matrices))
        or (dtype == torch.bfloat16 and worth_rounding(matrices))
    ),
)
def newton_schulz(matrices: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    """Replace every matrix by (nearly) its nearest semi-orthogonal one, U Vᵀ of its SVD U S Vᵀ.

    Each step is X ← R X with R = a I + b G + c G² and G = X Xᵀ, on the short side of the matrix,
    from X = M / ‖M‖. The result does not depend on the scale of M; a zero matrix stays zero.

    Where the matrix is long enough for that to be cheaper, two steps are taken on G alone: the G of
    the second is R G R, and X follows once. This is done for the first two and the last two of five
    or more steps. In bfloat16 only kernels do it. They keep the first two steps only where the Gram
    matrix after them proves that rounding pushed no singular value beyond what exact steps reach:
    one hundredth further the next polynomial grows without bound. The few matrices that fail start
    again, step by step. The kernel for small float32 matrices takes all steps one by one.

    Args:
        matrices: shape (..., m, n).
        coefficients: (a, b, c) of each step, as from :func:`polar_express`.
        dtype: the dtype of the products.

    Returns:
        A new tensor like ``matrices``, in its dtype.

    Cost, with r the ratio of the long side to the short one, in products of the short side's size:
    2 r + 1 per step, or 2 r + 5 for two on one G. Kernels compute symmetric products by half, which
    leaves 3/2 r + 1/2 and 3/2 r + 5/2.
    """
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    # Two divisions: the square of an entry may leave the range although the entry does not.
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = (x / norm.clamp_min(torch.finfo(x.dtype).tiny)).to(dtype)
    shape = x.shape
    x = x.reshape(-1, *shape[-2:])
    precise = torch.get_float32_matmul_precision() == "highest" and dtype == torch.float32
    long = 2 * x.shape[-1] > 3 * x.shape[-2] and (precise or dtype == torch.float64)
    step, steps = 0, len(coefficients)
    while step < steps:
        a, b, c = coefficients[step]
        gram = x @ x.mT
        factor = _quadratic(gram, b, c)
        if long and steps >= 5 and step in (0, steps - 2):  # two steps from one Gram matrix
            product = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(product, factor, product, beta=a)
            step += 1
            following = _quadratic(gram, *coefficients[step][1:])
            following.diagonal(dim1=-2, dim2=-1).add_(coefficients[step][0])
            x = torch.baddbmm(following, following, factor, beta=a) @ x
        else:  # X <- a X + (b G + c G²) X
            x = torch.baddbmm(x, factor, x, beta=a)
        step += 1
    x = x.reshape(shape).to(matrices.dtype)
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def _quadratic(gram: Tensor, b: float, c: float) -> Tensor:
    """b G + c G², shape (B, r, r)."""
    # torch 2.13 forgets beta in bfloat16 on the CPU where alpha is 0.
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if c else gram * b


@functools.lru_cache
def polar_express(steps: int, lower: float = 1e-3) -> Coefficients:
    """Coefficients of the composition of ``steps`` quintics that is closest to 1 on [lower, 1].

    Each step takes the odd quintic p that minimizes max |1 - p| over the interval that the
    steps before it left, which is optimal for the composition too (Amsel et al. 2025, arXiv
    2505.16932). Their two guards against rounding are kept: an interval is treated as no
    wider than 1 : 0.024, and all polynomials but the last shrink their argument by 1 %.

    Args:
        steps: number of polynomials, at least 1.
        lower: singular value, relative to the Frobenius norm, from which on all are driven to 1.
    """
    cushion, safety, upper = 0.02407327424182761, 1.01, 1.0
    coefficients = []
    for step in range(steps):
        a, b, c = _minimax_quintic(max(lower, cushion * upper), upper)
        ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
        center = 2 / sum(ends)  # the cushion moved the minimax interval: re-center on 1
        a, b, c = center * a, center * b, center * c
        lower = center * ends[0]
        upper = 2 - lower
        shrink = safety if step < steps - 1 else 1.0
        coefficients.append((a / shrink, b / shrink**3, c / shrink**5))
    return tuple(coefficients)


def _minimax_quintic(lower: float, upper: float) -> tuple[float, float, float]:
    """The odd quintic closest to 1 on [lower, upper], by Remez' exchange of its four extrema."""
    if lower / upper > 1 - 5e-6:  # the extrema coincide: Padé's quintic is the limit
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = ((3 * lower + upper) / 4, (lower + 3 * upper) / 4)
    error = math.inf
    while True:
        points = (lower, inner[0], inner[1], upper)
        system = [[x, x**3, x**5, sign] for x, sign in zip(points, (1, -1, 1, -1), strict=True)]
        left = torch.tensor(system, dtype=torch.float64, device="cpu")  # whatever the default is
        solution = torch.linalg.solve(left, left.new_ones(4))
        a, b, c, new_error = solution.tolist()
        if abs(new_error - error) < 1e-14:
            return a, b, c
        error = new_error
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
