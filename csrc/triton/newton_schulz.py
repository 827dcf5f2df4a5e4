"""Newton-Schulz iterations on tensor cores: half the products, or less than half their size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.triton.scaling import divided, norms
from deepopt.ops.triton.symmetric import symmetric_product

Coefficients = Sequence[tuple[float, float, float]]

SEGMENT = 3
"""Steps of the Gram form before it returns to the matrix itself."""


def newton_schulz(matrices: Tensor, coefficients: Coefficients, dtype: torch.dtype) -> Tensor:
    r"""The polynomials of :func:`deepopt.ops.newton_schulz`, with p(R) = a I + b R + c R².

    The *direct* form iterates on the matrix, on its short side:

    .. math:: G = X X^\top,\quad P = b\,G + c\,G^2,\quad X \leftarrow a\,X + P X

    with G and P by symmetric products: 3 m²n + m³ FLOPs a step in place of 4 m²n + 2 m³.

    The *Gram* form iterates on R = X Xᵀ, m x m however long the rows are, and touches the matrix
    once per segment of at most three steps:

    .. math::
        P = p(R),\quad Q \leftarrow P Q,\quad R \leftarrow P (P R);
        \qquad X \leftarrow Q X \text{ at the end}

    All of these commute, so all products but the last are symmetric ones: 3 m²n + (4 s - 3) m³
    FLOPs for s steps. For five steps of m x 4m that is 38 m³ against 65 m³, and 90 m³ without
    symmetry. Where m = n both cost the same, and the direct form is taken.

    A segment is short because rounding errors of R, which has the squares of the singular values,
    grow by a² a step: eigenvalues that should be 1e-6 and come out negative would grow into the
    result. A new R = X Xᵀ is positive again. The first segment is the long one: what it leaves
    wrong, the steps of the next one correct.

    Half precision is float16, whether float16 or bfloat16 was asked for: it is as fast, everything
    here is bounded (‖X‖ = 1 at first, singular values near 1 after), and its three more bits are
    what the Gram form needs. For six spectra at 256 x 512, well- and ill-conditioned, its singular
    values were off those of exact arithmetic by 2e-3 to 2e-2 at most, where the direct form in
    bfloat16 was off by 4e-3 to 2e-1, five times as much or more on all but the random matrix. The
    Gram form in bfloat16 is off by half on that one.

    Args:
        matrices: shape (..., m, n).
        coefficients: (a, b, c) of each step.
        dtype: in which the products are computed: float16, bfloat16 or float32.

    Returns:
        A new tensor like ``matrices``, in its dtype.
    """
    segments = _segments(coefficients)
    # Beyond these no polynomial is near 1 on [0, 1], and float16 might overflow.
    bounded = all(math.prod(abs(a) + abs(b) + abs(c) for a, b, c in s) < 6e4 for s in segments)
    if dtype == torch.bfloat16 and bounded:
        dtype = torch.float16
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = divided(x, norms(x).clamp_min(torch.finfo(torch.float32).tiny), dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    m, n = x.shape[-2:]
    for segment in segments:
        steps = _gram_steps if bounded and saves(m, n, len(segment)) else _direct_steps
        x = steps(x, segment)
    x = (x.mT if tall else x).reshape(matrices.shape)
    return x.to(matrices.dtype, memory_format=torch.contiguous_format)


def saves(m: int, n: int, steps: int) -> bool:
    """Whether the Gram form of a segment has fewer multiplications than the direct one."""
    return 3 * m * m * n + (4 * steps - 3) * m**3 < steps * (3 * m * m * n + m**3)


def _segments(coefficients: Coefficients) -> list[Coefficients]:
    return [coefficients[i : i + SEGMENT] for i in range(0, len(coefficients), SEGMENT)]


def _direct_steps(x: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients:
        gram = symmetric_product(x, x)
        p = symmetric_product(gram, gram, gram, alpha=c, beta=b)
        x = torch.baddbmm(x, p, x, beta=a)
    return x


def _gram_steps(x: Tensor, coefficients: Coefficients) -> Tensor:
    gram, q = symmetric_product(x, x), None
    for step, (a, b, c) in enumerate(coefficients):
        p = symmetric_product(gram, gram, gram, alpha=c, beta=b, shift=a)
        q = p if q is None else symmetric_product(p, q)
        if step < len(coefficients) - 1:
            gram = symmetric_product(p, symmetric_product(p, gram))
    return x if q is None else torch.bmm(q, x)
