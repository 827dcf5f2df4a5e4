"""Bytes and FLOPs of an optimizer's step, counted by hand, and the time that they ask of a machine.

A step is a list of phases. Each needs the whole result of the one before, so their times add up;
within a phase, traffic and arithmetic overlap. A tensor from an earlier phase is read once, a
tensor for a later phase is written once, and nothing else is counted: what fits into one pass is
one pass, whatever the code does. Products are counted in two ways. The textbook's count has all
multiplications and additions, 2 m k n for (m, k) by (k, n). ``least=True`` counts what no known
method avoids: half of that for symmetric results, and Newton-Schulz by powers of its Gram matrix
where that takes fewer.

All counts are for one matrix of m x n, with parameters, gradients and state in float32 and products
of Newton-Schulz in ``dtype``; r is its short and R its long side. The arithmetic of element-wise
passes, some ten FLOPs per entry, is not counted, but for that of MLPs on entries.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

FLOAT = 4
NS_STEPS = 5
PERIOD = 10
"""Steps from one refresh of the covariance memory, or one chunk of M3, to the next."""
HIDDEN = 8
"""Units of DMGD's memories and of the MLP operator."""
TANH_OPERATIONS = 21
"""What a tanh takes as a bounded quotient of polynomials: 2 for the bounds, 1 for the square, 4 + 4
multiply-adds, a product and a division."""


class Rates(NamedTuple):
    """What a machine does per second: bytes of a copy and of a pass, FLOPs of products.

    On a GPU ``float32`` is without tensor cores; ``tf32`` and ``float64`` are a GPU's alone.
    """

    copy: float
    stream: float
    float32: float
    bfloat16: float
    tf32: float = math.nan
    float64: float = math.nan


@dataclass(frozen=True)
class Phase:
    """A part of a step."""

    name: str
    bytes: float
    flops: float = 0.0
    dtype: str = "float32"
    """The dtype of the products."""

    def times(self, count: float) -> "Phase":
        return replace(self, bytes=count * self.bytes, flops=count * self.flops)


Work = Sequence[Phase]
Rule = Callable[[int, int], Work]


def total_bytes(work: Work) -> float:
    return sum(phase.bytes for phase in work)


def total_flops(work: Work) -> float:
    return sum(phase.flops for phase in work)


def traffic_seconds(work: Work, rates: Rates) -> float:
    return total_bytes(work) / rates.stream


def product_seconds(work: Work, rates: Rates) -> float:
    return sum(phase.flops / getattr(rates, phase.dtype) for phase in work)


def roofline_seconds(work: Work, rates: Rates) -> float:
    """The sum over the phases of what takes longer in each, traffic or arithmetic."""
    return sum(max(traffic_seconds([p], rates), product_seconds([p], rates)) for p in work)


def over(shapes: Iterable[tuple[int, int]], rule: Rule) -> list[Phase]:
    """The work of one step of many matrices, phase by phase, those of one shape in one."""
    counts: dict[tuple[int, int], int] = {}
    for shape in shapes:
        counts[shape] = counts.get(shape, 0) + 1
    return [p.times(count) for shape, count in counts.items() for p in rule(*shape)]


# -- element-wise --------------------------------------------------------------------------------


def adamw(elements: int, width: int = FLOAT, state_width: int = FLOAT) -> Work:
    """Parameter, gradient and two averages are read, all but the gradient written."""
    return [Phase("update", elements * (3 * width + 4 * state_width))]


# -- Newton-Schulz -------------------------------------------------------------------------------


def newton_schulz(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """Per step X Xᵀ, its square and its product with X: 4 r²R + 2 r³.

    The least is that with symmetric products at half, 3 r²R + r³ a step, or Newton-Schulz on the
    Gram matrix alone between X Xᵀ at the start and one product with X at the end: 3 r²R in all,
    and four symmetric products of r³ a step, of which the last step needs one.
    """
    r, big = sorted((m, n))
    width = _width(dtype)
    x, a = width * r * big, width * r * r
    outer, cube = 2.0 * r * r * big, 2.0 * r**3
    half = 0.5 if least else 1.0
    plain = [
        Phase("X Xᵀ", x + a, half * outer, dtype).times(NS_STEPS),
        Phase("(X Xᵀ)²", 2 * a, half * cube, dtype).times(NS_STEPS),
        Phase("polynomial times X", 2 * x + a, outer, dtype).times(NS_STEPS),
    ]
    gram = [
        Phase("X Xᵀ", x + a, half * outer, dtype),
        Phase("polynomial of X Xᵀ", 2 * a, half * cube, dtype).times(NS_STEPS),
        Phase("products of polynomials", 3 * a, half * cube, dtype).times(3 * (NS_STEPS - 1)),
        Phase("polynomial times X", 2 * x + a, outer, dtype),
    ]
    return min(plain, gram, key=total_flops) if least else plain


def _width(dtype: str) -> int:
    """Bytes per entry of Newton-Schulz's operands."""
    return 2 if dtype == "bfloat16" else FLOAT


def _momentum(m: int, n: int, dtype: str) -> Phase:
    """The gradient is read, the momentum read and written, and what it reads out is written."""
    return Phase("momentum", m * n * (3 * FLOAT + _width(dtype)))


def _apply(m: int, n: int, dtype: str, slow: int = 0) -> Work:
    """The orthogonal matrix is read for its rows' norms, and again to change the parameter."""
    size = _width(dtype) + slow
    return [
        Phase("row norms", m * n * size),
        Phase("parameter", m * n * (size + 2 * FLOAT)),
    ]


def muon(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """torch's: a momentum, Newton-Schulz, and the parameter moved at once; no norms of rows."""
    return [
        _momentum(m, n, dtype),
        *newton_schulz(m, n, dtype, least),
        Phase("parameter", m * n * (_width(dtype) + 2 * FLOAT)),
    ]


# -- DeepMomentum --------------------------------------------------------------------------------


def linear(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    return [_momentum(m, n, dtype), *newton_schulz(m, n, dtype, least), *_apply(m, n, dtype)]


def delta_write(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """The Gram matrix of the gradient, its square for the norm, and the erase term: (M Gᵀ) G for
    m < n, M (Gᵀ G) otherwise; the look-ahead is written in what it is read out in."""
    r, big = sorted((m, n))
    size, square = FLOAT * m * n, FLOAT * r * r
    read_out = m * n * _width(dtype)
    outer, cube = 2.0 * r * r * big, 2.0 * r**3
    half = 0.5 if least else 1.0
    gram = [
        Phase("Gram matrix of G", size + square, half * outer, "bfloat16"),
        Phase("its norm", square, half * cube, "bfloat16"),
    ]
    if m < n:
        return [
            *gram,
            Phase("M Gᵀ", 2 * size + square, outer, "bfloat16"),
            Phase("(M Gᵀ) G, momentum", 3 * size + square + read_out, outer, "bfloat16"),
        ]
    return [*gram, Phase("M (Gᵀ G), momentum", 3 * size + square + read_out, outer, "bfloat16")]


def delta(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """The linear memory's, with the delta rule's write for the average."""
    return [
        *delta_write(m, n, dtype, least),
        *newton_schulz(m, n, dtype, least),
        *_apply(m, n, dtype),
    ]


def covariance(
    m: int,
    n: int,
    dtype: str = "bfloat16",
    least: bool = False,
    root_flops: Callable[[int], float] = lambda r: 11.0 * r**3,
    split: bool = False,
) -> Work:
    """The Gram matrix of the short side takes up the gradient, its root, refreshed once in
    ``PERIOD`` steps, multiplies the momentum.

    Args:
        m: rows.
        n: columns.
        dtype: the dtype of Newton-Schulz's products.
        least: as above.
        root_flops: FLOPs of one root of r x r; by default of a decomposition into eigenvectors,
            about 9 r³, and the product of two of them.
        split: as on a GPU, where keys are rounded to bfloat16, each float32 product is three in
            half precision, and a root is 30 of those and ten squares.
    """
    r, big = sorted((m, n))
    size, square, outer = FLOAT * m * n, FLOAT * r * r, 2.0 * r * r * big
    products, times, root = (
        ("bfloat16", 3, 190.0 * r**3) if split else ("float32", 1, root_flops(r))
    )
    return [
        Phase("Gram matrix", size + 2 * square, (0.5 if least else 1.0) * outer, products),
        Phase("root", 2 * square / PERIOD, root / PERIOD, products),
        Phase(
            "root times momentum",
            3 * size + square + m * n * _width(dtype),
            times * outer,
            products,
        ),
        *newton_schulz(m, n, dtype, least),
        *_apply(m, n, dtype),
    ]


def mlp(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """The two averages are compared with the gradient; then they take it up and are mixed."""
    size = FLOAT * m * n
    return [
        Phase("cosines", 3 * size),
        Phase("averages", 5 * size + m * n * _width(dtype)),
        *newton_schulz(m, n, dtype, least),
        *_apply(m, n, dtype),
    ]


def m3(m: int, n: int, dtype: str = "bfloat16", least: bool = False) -> Work:
    """The linear memory's, a slow momentum, its read-out mixed in, and that made anew once in
    ``PERIOD`` steps."""
    size = FLOAT * m * n
    return [
        Phase("momenta", m * n * (5 * FLOAT + _width(dtype))),
        *newton_schulz(m, n, dtype, least),
        *[
            phase.times(1 / PERIOD)
            for phase in (
                Phase("slow read-out", size + m * n * _width(dtype)),
                *newton_schulz(m, n, dtype, least),
                Phase("slow read-out", size + m * n * _width(dtype)),
            )
        ],
        *_apply(m, n, dtype, slow=FLOAT),
    ]


# -- DMGD ----------------------------------------------------------------------------------------


def dmgd_row(m: int, n: int) -> Work:
    """Every row passes forward through both layers, back through both layers' weights and the
    second one's inputs, and forward again: 2 + 3 + 2 products of 2 m n h."""
    size, product = FLOAT * m * n, 2.0 * m * n * HIDDEN
    weights = FLOAT * 2 * n * HIDDEN
    return [
        Phase("norm of G", size),
        Phase("inner learning", size + 3 * weights, 5 * product),
        Phase("read-out", 2 * size + weights, 2 * product),
        Phase("parameter", 3 * size),
    ]


def dmgd_coordinate(m: int, n: int) -> Work:
    """The same for every entry, of three features: the gradient and two averages of it."""
    size, features = FLOAT * m * n, 3
    forward = 2 * HIDDEN * (features + 1)
    return [
        Phase("averages", 5 * size),
        Phase("inner learning", 3 * size, m * n * (2.0 * forward + 2 * HIDDEN)),
        Phase("read-out", 4 * size, m * n * float(forward)),
        Phase("parameter", 3 * size),
    ]


# -- The coordinate MLP operator -----------------------------------------------------------------


def coordinate_mlp_flops(features: int, tanh: int = 1) -> float:
    """Per entry: of each unit F products and F - 1 sums, a tanh, a product and a sum."""
    return float(HIDDEN * (2 * features - 1 + tanh + 2))


def coordinate_mlp_gradient_flops(features: int, tanh: int = 1) -> float:
    """Per entry: of each unit the drive and its tanh; 1 - t² (2), times the error and the read-out
    (2), for each feature a product and a sum, and the same for the read-out's gradient."""
    return float(HIDDEN * (2 * features - 1 + tanh + 4 + 2 * features + 2))


def coordinate_mlp(elements: int, features: int, tanh: int = 1) -> Work:
    size = FLOAT * elements
    return [Phase("MLP", (features + 1) * size, elements * coordinate_mlp_flops(features, tanh))]


def coordinate_mlp_gradient(elements: int, features: int, tanh: int = 1) -> Work:
    size = FLOAT * elements
    flops = elements * coordinate_mlp_gradient_flops(features, tanh)
    return [Phase("gradient", (features + 1) * size, flops)]


# -- Models --------------------------------------------------------------------------------------


def transformer(width: int, layers: int) -> list[tuple[int, int]]:
    """Matrices of a GPT or ViT: fused queries, keys and values, the projection, two of the MLP."""
    sides = ((3, 1), (1, 1), (4, 1), (1, 4))
    return [(a * width, b * width) for _ in range(layers) for a, b in sides]
