"""The table of all operators: arguments from a drawn shape, and the error each result may have.

Tolerances are counted, not found: eps of the dtype that is computed in, times the roundings that an
entry goes through, times the size of the terms that are rounded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from deepopt.hope.block_token import BlockTokenArguments
from deepopt.hope.fused import MemoryArguments
from deepopt.ops import ScaleArguments, delta_write, polar_express
from deepopt.ops.operator import OPERATORS

EPS = torch.finfo(torch.float32).eps
TANH = 3 * EPS  # 6 units in the last place, for values of at most 1
SIDES = (1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 130)


@dataclass
class Shape:
    """What is drawn: the stack's shape, how it lies in memory, and the parameter's dtype."""

    sizes: tuple[int, int, int] = (2, 17, 33)
    layout: str = "rows"
    dtype: torch.dtype = torch.float32
    rounding: str = "nearest"
    terms: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=self.generator)

    def positive(self, *sizes: int) -> Tensor:
        return 0.1 + torch.rand(sizes, generator=self.generator)

    def matrices(self, dtype: torch.dtype = torch.float32, layout: str = "") -> Tensor:
        (b, m, n), layout = self.sizes, layout or self.layout
        if layout == "columns":
            return self.normal(b, n, m).to(dtype).mT
        if layout == "gaps":
            return self.normal(b, m, 2 * n).to(dtype)[:, :, ::2]
        return self.normal(b, m, n).to(dtype)


drawn = st.builds(
    Shape,
    sizes=st.tuples(st.sampled_from((0, 1, 3)), *[st.sampled_from((0, *SIDES))] * 2),
    layout=st.sampled_from(("rows", "columns", "gaps")),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    rounding=st.sampled_from(("nearest", "stochastic", "exact")),
    terms=st.sampled_from((1, 2)),
    seed=st.integers(0, 1000),
)

Arguments = list[Any]


@dataclass
class Case:
    """An operator's arguments, and the error that each of its results may have."""

    arguments: Callable[[Shape], Arguments]
    bounds: Callable[[Arguments, str], list[Tensor]]
    """From the arguments in float64 and the backend."""
    written: tuple[int, ...] = ()
    """Lists that the operator writes into, its results: the parameters and state."""
    lows: int = 0
    """The argument with parameters' low bits, which the seeds follow."""
    empty: bool = True
    """Whether matrices without entries are allowed; there may always be none."""
    on_host: int | None = None
    """The argument that stays on the CPU."""
    small: bool = False
    """Whether matrices are cut to what counts as small, which is for the CPU alone."""


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for part in value for item in tensors(part)] if isinstance(value, list) else []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [mapped(item, change) for item in value]
    if isinstance(value, ScaleArguments | MemoryArguments | BlockTokenArguments):
        return type(value)(*mapped(list(value), change))
    return change(value) if isinstance(value, Tensor) else value


def combine_arguments(shape: Shape) -> Arguments:
    b, m, _ = shape.sizes
    kinds = [
        (shape.dtype, shape.layout),
        (torch.float32, "rows"),
        (shape.dtype, "columns"),
        (torch.float32, shape.layout),
    ]
    tensors = [shape.matrices(dtype, layout) for dtype, layout in kinds[: shape.terms]]
    by_row = shape.seed % 2
    return [tensors, shape.normal(shape.terms, b, *[m] * by_row)]


def combine_bounds(given: Arguments, backend: str) -> list[Tensor]:
    tensors, factors = given  # a product and a sum per term
    factors = factors.reshape(*factors.shape, *[1] * (4 - factors.dim()))
    return [EPS * len(tensors) * sum(f.abs() * x.abs() for f, x in zip(factors, tensors))]  # noqa: B905


def row_products_bounds(given: Arguments, backend: str) -> list[Tensor]:
    x = given[0]
    sizes = [(a * b).abs().sum(-1) for i, a in enumerate(x) for b in x[i:]]
    # Kernels add in double and round once.
    return [EPS * (1 if backend == "cpu" else x[0].shape[-1] + 1) * torch.stack(sizes)]


def frobenius_bounds(given: Arguments, backend: str) -> list[Tensor]:
    roundings = 1 if backend == "cpu" else given[0].shape[1:].numel() / 2 + 4
    return [EPS * roundings * torch.linalg.matrix_norm(given[0])]


def scale_update_arguments(shape: Shape) -> Arguments:
    """One or two updates, each state there or not, zero rows and matrices, three scales."""
    (b, m, n), seed = shape.sizes, shape.seed
    scale = (1.0, 1e-30, 1e30)[seed % 3]
    updates = [shape.matrices() / n**0.5, shape.matrices(layout="rows")][: shape.terms]
    momentum, grad, norm = scale * shape.matrices(), scale * shape.matrices(), shape.positive(b)
    moment, weight = shape.positive(b, m) / n, shape.positive(b, m)
    for x in updates:
        x[:, 1::3] = 0  # rows that have been seen before
        x[1::2] = 0
    if seed % 2:
        moment[:, ::3], weight[:, ::3] = 0, 0
        grad[1:], norm[1:] = 0, 0
    steps = torch.arange(1.0, b + 1) ** (seed % 4)
    rows = [moment, weight] if seed // 2 % 2 else [None, None]
    rms, grad_norm = (0.2, None) if seed // 4 % 2 else (1.5, scale * n * norm)
    mixed = shape.positive(b) if shape.terms == 2 else None
    scale = (momentum, grad, steps, 0.9, 0.99, 1.5, rms, grad_norm, *rows, mixed)
    return [updates, ScaleArguments(*scale)]


def scale_update_bounds(given: Arguments, backend: str) -> list[Tensor]:
    """Relative errors, named as what they are of, through the rule's lines."""
    updates, scale = given
    steps, betas, mixed = scale.step, (scale.beta1, scale.beta2), scale.weight
    grad_norm, moment, seen = scale.grad_norm, scale.row_moment, scale.row_weight
    result, *states = OPERATORS["scale_update"].reference(*given)
    (m, n), kernel = result.shape[-2:], backend == "cpu"
    share, summed = 1 - betas[1], EPS * (1 if kernel else m)
    other = 0 * updates[0] if mixed is None else mixed[:, None, None] * updates[1]
    terms, both = updates[0].abs() + other.abs(), updates[0] + other
    square, length = both.square().sum(-1), torch.linalg.matrix_norm(both)

    def ratio(a: Tensor, b: Tensor) -> Tensor:  # nothing is wrong with zeros
        return torch.where(b > 0, a / b.where(b > 0, 1), 0)

    products = EPS * (1 if kernel else n + 1) + (4 * EPS if mixed is not None else 0)
    squares = ratio(products * terms.square().sum(-1), square)
    norm = (products + summed) / 2 + EPS
    shrink = 0 * length
    if mixed is not None:
        shrink = norm + (ratio((squares * square).sum(-1), square.sum(-1)) + summed) / 2 + 3 * EPS
    factor = shrink + norm + 6 * EPS
    bounds = []
    if grad_norm is not None:
        root = EPS * ((1 if kernel else m * n / 2 + 4) + 4)
        corrections = sum(2 * EPS / (1 - beta**steps) for beta in betas)
        factor = factor + 2 * root + 5 * EPS + (0 if kernel else corrections)
        bounds.append(root * states[0])
    gains = torch.zeros_like(square)
    if moment is not None:
        new, weight = states[-2:]
        scaled = ratio(torch.linalg.matrix_norm(updates[0]), length)[:, None]
        now, now_wrong = square * scaled**2 / n, squares + 2 * shrink[:, None] + 3 * EPS
        bounds.append(share * now_wrong * now + 2 * EPS * (share * (now + moment) + new))
        bounds.append(2 * EPS * (share * (1 + seen) + weight))
        mean_wrong = ratio(bounds[-2], new) + ratio(bounds[-1], weight) + EPS
        even = now * ratio(weight, new)
        before = ratio((now_wrong * now).sum(-1), now.sum(-1))
        after = ratio(((now_wrong + mean_wrong + 4 * EPS) * even).sum(-1), even.sum(-1))
        gains = mean_wrong / 2 + (before + after)[:, None] / 2 + summed + 4 * EPS
    size = ratio(torch.linalg.vector_norm(result, dim=-1), square.sqrt())[..., None]
    wrong = factor[:, None] + gains + (len(updates) + 1) * EPS
    return [size * terms * wrong[..., None], *bounds]


def mlp_arguments(shape: Shape) -> Arguments:
    b = shape.sizes[0]
    features = [shape.matrices() for _ in range(shape.terms)]
    scales = shape.positive(b, shape.terms)
    weights = shape.normal(b, 3 + shape.seed % 4, shape.terms + 1)
    return [shape.matrices(), shape.positive(b), features, scales, weights]


def mlp_errors(given: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tanh of the units and of the value with their errors, and the keys, units first."""
    _, _, features, scales, weights = given[:5]
    keys = torch.stack([x * s[:, None, None] for x, s in zip(features, scales.unbind(1))])  # noqa: B905
    w = weights[..., :-1].permute(1, 2, 0)[..., None, None]
    v = weights[..., -1].T[..., None, None]
    active = (w * keys).sum(1).tanh()
    wrong = TANH + EPS * (len(keys) + 1) * (w * keys).abs().sum(1)
    value = (v * active).sum(0)
    off = TANH + (v.abs() * (wrong + EPS * len(v))).sum(0)
    return active, wrong, value.tanh(), off, keys


def mlp_bounds(given: Arguments, backend: str) -> list[Tensor]:
    _, _, _, off, _ = mlp_errors(given)
    reach = given[1][:, None, None]
    return [reach * off + EPS * (given[0].abs() + reach)]


def mlp_gradient_arguments(shape: Shape) -> Arguments:
    target, unit = shape.matrices(), shape.positive(shape.sizes[0])
    return [*mlp_arguments(shape), target, unit]


def mlp_gradient_bounds(given: Arguments, backend: str) -> list[Tensor]:
    base, reach, _, _, weights, target, unit = given
    active, wrong, c, off, keys = mlp_errors(given)
    reach, unit = reach[:, None, None], unit[:, None, None]
    entries = max(1, target.shape[1:].numel())
    share = reach / unit / entries
    error = (base + reach * c - target) / unit
    in_error = (reach * off + 2 * EPS * (base.abs() + reach + target.abs())) / unit
    slope = error.abs() * share * (1 - c**2)
    in_slope = share * (in_error + error.abs() * (2 * off + 4 * EPS))
    # Kernels add in 16 lanes and tiles of 512 entries, which come to fewer additions than these.
    sums = EPS * (min(entries, 128) if backend == "cpu" else entries)
    v = weights[..., -1].T[..., None, None].abs()
    parts = [
        (v * key.abs() * (in_slope + slope * (2 * wrong + 3 * EPS + sums))).sum((-2, -1))
        for key in keys
    ]
    readout = (in_slope * active.abs() + slope * (wrong + EPS + sums)).sum((-2, -1))
    return [torch.stack([*parts, readout], -1).transpose(0, 1)]


def rounding_arguments(shape: Shape, params: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    lows, seeds = [], []
    if shape.rounding == "exact":
        for param in params:
            drawn = torch.randint(-(2**15), 2**15, param.shape, generator=shape.generator)
            lows.append(drawn.to(torch.int16))
    elif shape.rounding == "stochastic":
        seeds = [shape.seed + 2**40 * index for index in range(len(params))]
    return lows, seeds


def parameters(shape: Shape) -> list[Tensor]:
    """Parameters of many kinds: the drawn one, a scalar, an empty one, some of other strides."""
    first = shape.matrices(shape.dtype)
    more = [shape.normal(size).to(shape.dtype) for size in (1, 5, 16)]
    return [first, *more, torch.zeros(0, 3, dtype=shape.dtype), shape.normal().to(shape.dtype)]


def state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def like(shape: Shape, params: list[Tensor]) -> list[Tensor]:
    """For every parameter a tensor of its shape and its state's dtype, in row order."""
    return [shape.normal(*param.shape).to(state_dtype(param)) for param in params]


def apply_update_arguments(shape: Shape) -> Arguments:
    params = parameters(shape)
    return [params, like(shape, params), *rounding_arguments(shape, params), 1e-2, 0.1]


def kept(param: Tensor, new: Tensor, rounding: str) -> Tensor:
    """The error of rounding ``new`` to what a parameter is kept in."""
    if param.dtype == state_dtype(param) or (param.dtype, rounding) == (torch.bfloat16, "exact"):
        return torch.zeros_like(new)
    info = torch.finfo(param.dtype)
    stochastic = (param.dtype, rounding) == (torch.bfloat16, "stochastic")
    return info.eps * (1 if stochastic else 0.5) * new.abs().clamp_min(info.tiny)


def apply_update_bounds(given: Arguments, backend: str) -> list[Tensor]:
    params, updates, *_, lr, _ = given  # two products and a sum
    return [2 * EPS * (p.abs() + lr * u.abs()) for p, u in zip(params, updates, strict=True)]


def adamw_arguments(shape: Shape) -> Arguments:
    params = parameters(shape)
    grads = [g.to(p.dtype) for g, p in zip(like(shape, params), params, strict=True)]
    firsts, seconds = like(shape, params), [x.square() for x in like(shape, params)]
    steps = [torch.tensor(float(3 + index)) for index in range(len(params))]
    rounding = rounding_arguments(shape, params)
    return [params, grads, firsts, seconds, steps, *rounding, 1e-2, 0.9, 0.99, 1e-8, 0.1, False]


def adamw_bounds(given: Arguments, backend: str) -> list[Tensor]:
    params, grads, firsts, seconds, steps, *_ = given
    lr, beta1, beta2, eps = given[7:11]
    bounds: list[list[Tensor]] = [[], [], []]
    for p, g, m, v, t in zip(params, grads, firsts, seconds, steps, strict=True):
        second = beta2 * v + (1 - beta2) * g**2
        root = (second / (1 - beta2 ** (t + 1))).sqrt() + eps
        step = lr / (1 - beta1 ** (t + 1)) * (m.abs() + g.abs()) / root
        bounds[0].append(2 * EPS * p.abs() + 8 * EPS * step)
        bounds[1].append(3 * EPS * (m.abs() + g.abs()))
        bounds[2].append(3 * EPS * second)
    return [bound for kind in bounds for bound in kind]


def newton_schulz_arguments(shape: Shape) -> Arguments:
    return [shape.matrices(), polar_express(1 + shape.seed % 6), torch.float32]


def newton_schulz_bounds(given: Arguments, backend: str) -> list[Tensor]:
    matrices, coefficients, _ = given
    # The polynomials enlarge by the product of their slopes what rounding does to small values.
    off = 8 * EPS * math.prod(a for a, _, _ in coefficients) * min(matrices.shape[-2:]) ** 0.5
    return [torch.full_like(matrices, off)]


def orthogonal_update_arguments(shape: Shape) -> Arguments:
    updates, scale = scale_update_arguments(shape)
    beside = updates[1] if scale.weight is not None else None
    scale = scale._replace(row_moment=None, row_weight=None)
    return [polar_express(1 + shape.seed % 3), torch.float32, beside, scale]


def orthogonal_update_bounds(given: Arguments, backend: str) -> list[Tensor]:
    """Those of what it is made of; with rows it has the bits of both, which is tested apart."""
    coefficients, dtype, beside, scale = given
    momentum, weight = scale.momentum, scale.weight
    update = OPERATORS["newton_schulz"].reference(momentum, coefficients, dtype)
    updates = [update] if beside is None else [update, beside]
    own, *bounds = scale_update_bounds([updates, scale], backend)
    off = newton_schulz_bounds([momentum, coefficients, dtype], backend)[0]
    both = update if beside is None else update + weight[:, None, None] * beside
    result = OPERATORS["orthogonal_update"].reference(*given)[0]
    norms = torch.linalg.matrix_norm
    size = norms(result) / norms(both)
    # In every entry, and in the norms that it is divided by.
    factor = norms(off) * (2 / norms(update) + 1 / norms(both))
    return [own + size[:, None, None] * off + result.abs() * factor[:, None, None], *bounds]


def delta_write_arguments(shape: Shape) -> Arguments:
    b, *sides = shape.sizes
    momentum, grad, norm = shape.matrices(), shape.matrices(), shape.positive(b) * max(sides)
    return [momentum, grad, norm, shape.positive(b), 0.1 * (shape.seed % 11), 0.95]


def delta_write_bounds(given: Arguments, backend: str) -> list[Tensor]:
    momentum, grad, _, erasure, rate, retention = given
    norms = torch.linalg.matrix_norm
    wide, roundings = grad.shape[-2] < grad.shape[-1], 2 * sum(grad.shape[-2:]) + 12
    gram, size = ((x @ x.mT if wide else x.mT @ x) for x in (grad, grad.abs()))
    power = norms(gram @ gram)
    in_power = EPS * roundings * norms(size @ size) / power  # as a share of it
    new = delta_write.reference(*given)[1]
    divisor = torch.maximum(new, power**0.25)
    shrink = (rate / divisor**2)[:, None, None]
    erased = shrink * (momentum.abs() @ (grad.abs().mT @ grad.abs()))
    in_erased = (EPS * roundings + in_power)[:, None, None] * erased
    in_momentum = in_erased + 2 * EPS * (retention * momentum.abs() + erased + grad.abs())
    in_share = norms(in_erased) / norms(momentum)
    gain = 1 + (erasure / (1 - retention))[:, None, None]
    in_ahead = gain * (2 * in_erased + 6 * EPS * (momentum.abs() + 2 * erased + 2 * grad.abs()))
    in_erasure = 0.1 * in_share + 4 * EPS * (erasure + 1)
    return [in_momentum, (in_power + 4 * EPS) * new, in_erasure, in_ahead]


def multi_scale_write_arguments(shape: Shape) -> Arguments:
    """Chunks of several lengths: in the middle, where they begin, and before beta3 is reached."""
    b, chunk = shape.sizes[0], 1 + shape.seed % 4
    steps = torch.arange(1.0, b + 1) ** (1 + shape.seed % 3)
    kinds = ("rows", shape.layout, shape.layout)
    matrices = [shape.matrices(layout=layout) for layout in kinds]
    retention = (0.9, 0.3)[shape.seed % 2]
    return [*matrices, steps, retention, chunk, (0.0, 0.5, 0.99)[shape.seed % 3]]


def multi_scale_write_bounds(given: Arguments, backend: str) -> list[Tensor]:
    momentum, slow, grad, *_ = given
    # A difference, a weight and a fused sum; of the look-ahead as much again.
    fast = 3 * EPS * (momentum.abs() + grad.abs())
    # A factor, a product and a sum for each of both.
    return [fast, 3 * EPS * (slow.abs() + grad.abs()), 2 * fast + 3 * EPS * grad.abs()]


def horizons_write_arguments(shape: Shape) -> Arguments:
    """Two averages or more, an MLP of up to three units, sizes from one end to the other."""
    (b, m, n), seed, scales = shape.sizes, shape.seed, 1 + shape.terms
    scale = (1.0, 1e-30, 1e30)[seed % 3]
    grad = scale * shape.matrices(layout=("rows", shape.layout)[seed % 2])
    averages = [scale * shape.matrices() + 0.5 * grad for _ in range(scales)]
    averages[0][1::3] = 0  # as before the first gradient
    foresight = 2 * shape.positive(b, scales) - 1.2
    phi = shape.normal(b, seed % 4, 3 * scales + 2)
    steps = torch.arange(1.0, b + 1) ** (1 + seed % 5)
    size = scale * (m * n) ** 0.5 * shape.positive(b)
    retentions = [0.9, 0.7, 0.99, 0.5, 0.0][:scales]
    return [averages, grad, foresight, size, phi, steps, retentions]


def horizons_write_bounds(given: Arguments, backend: str) -> list[Tensor]:
    """Relative or absolute errors, named as what they are of, through the rule's lines."""
    averages, grad, foresight, _, phi, steps, retentions = given
    scales, entries, kernel = len(averages), grad.shape[1:].numel(), backend == "cpu"
    flat, kept = grad.flatten(1), torch.tensor(retentions, dtype=torch.float64)
    *_, foresees, running, weights, _ = OPERATORS["horizons_write"].reference(*given)

    def over(a: Tensor, b: Tensor) -> Tensor:  # nothing is wrong with zeros
        return torch.where(b > 0, a / b.where(b > 0, 1), 0)

    norm = EPS * (1 if kernel else entries / 2 + 4)
    sizes = torch.stack([x.flatten(1).norm(dim=1) for x in averages], 1)
    both = flat.norm(dim=1, keepdim=True) * sizes
    dots = torch.stack([(flat.abs() * x.flatten(1).abs()).sum(1) for x in averages], 1)
    cosine = 2 * norm + 4 * EPS + over((0 if kernel else EPS * (entries + 4)) * dots, both)
    foresee = 0.3 * cosine + 2 * EPS * (1 + foresight.abs())
    root = norm + 6 * EPS

    best = foresees.amax(1, keepdim=True)
    floor, above = best.clamp_min(0) + 0.01, foresees.clamp_min(0) + 0.01
    trust, wrong = above / floor, foresee.amax(1, keepdim=True)
    ratio, time = over(sizes, running[:, None]), steps.log10()[:, None] / 3
    features = torch.cat([trust, best, ratio, time], 1)
    off = [(foresee + trust * wrong) / floor + 3 * EPS * trust, wrong]
    off += [ratio * (norm + root + 2 * EPS), 3 * EPS * (time + 1)]
    inputs = features.shape[1]
    into, out = phi[..., :inputs].abs(), phi[..., inputs + 1 :].abs()
    terms = (into * features.abs()[:, None]).sum(-1) + phi[..., inputs].abs()
    drive = (into * torch.cat(off, 1)[:, None]).sum(-1) + EPS * (inputs + 1) * terms
    value = (out * (drive + EPS * (phi.shape[1] + 1) * terms)[..., None]).sum(1)
    weight = value + weights * value.sum(1, keepdim=True) + 3 * EPS * weights

    power = kept ** steps[:, None]
    unbias = EPS * (steps[:, None] * power + 2 * power + 1) / (1 - power)
    gain = (1 - power[:, :1]) / (1 - power[:, 1:])
    share = gain * (weight + weights * (unbias[:, :1] + unbias[:, 1:] + 3 * EPS))
    whole = gain * weights
    fast = [3 * EPS * (x.abs() + grad.abs()) for x in averages]
    limits = [x.abs() + grad.abs() for x in averages]  # of the new averages
    in_read = (weight.sum(1) + EPS * scales)[:, None, None] * limits[0] + 3 * fast[0]
    in_read += ((share * (1 - kept[1:])).sum(1))[:, None, None] * grad.abs()
    for k in range(1, scales):
        s, d = whole[:, k - 1, None, None], share[:, k - 1, None, None]
        in_read += d * limits[k] + s * (fast[k] + EPS * (scales + 4) * limits[k])
    in_read += EPS * (scales + 2) * (limits[0] + grad.abs())
    return [*fast, foresee, root * running, weight, in_read]


def memory_arguments(shape: Shape) -> Arguments:
    """In mid-chunk, with two sizes of chunks; weights, anchors and initial weights differ."""
    (b, m, n), seed = shape.sizes, shape.seed
    heads, dim, hidden, tokens = 1 + seed % 2, 3 + min(m, 61), 4 + min(n, 92), 1 + (7 * m + n) % 40
    sizes = (b, heads, dim, tokens)
    inputs = [shape.normal(*sizes), shape.normal(*sizes[:2], tokens, dim).mT]
    query = shape.normal(*sizes[:3], 2 * tokens)[..., ::2]
    inputs.append(query / query.norm(dim=-2, keepdim=True).clamp_min(0.1))

    def weights(count: int, *lead: int) -> list[Tensor]:
        rows = hidden if count == 4 else 2 + 2 * (seed % 3) * hidden // 3
        w2 = shape.normal(*lead, count, rows, dim) / dim**0.5
        return [w2, shape.normal(*lead, count, dim, rows) / rows**0.5]

    states = [x for count in (4, 4, 1, 1) for x in weights(count, b, heads)]
    pulls = [x for count in (4, 1) for x in weights(count, heads)]
    gates = shape.normal(heads, 6) + torch.tensor([-2.0, 4.0, 0.0, 0.0, 0.0, 2.0])
    chunks = ((4, 4), (16, 32), (32, 32), (5, 3), (1, 7))[seed % 5]
    floors_and_sharpness = (1.0, 1e-4, (6.0, 2.0)[seed % 2])
    numbers = (0.5 / max(chunks), 2.0, 1.5, *floors_and_sharpness, *chunks, seed % 50)
    return [bool(seed % 3), MemoryArguments(*inputs, *states, *pulls, gates, *numbers)]


def memory_gradient_arguments(shape: Shape) -> Arguments:
    _, given = memory_arguments(shape)
    *results, starts = OPERATORS["memories"].reference(True, given)
    grads = [shape.normal(*x.shape) for x in results]
    for index in range(shape.seed % 4, len(grads), 3):
        grads[index] = torch.zeros(0)  # a result that is not used
    return [grads, starts, given]


def block_token_arguments(shape: Shape) -> Arguments:
    """Heads that turn or not, levels of two widths or none, with and without initial weights."""
    (b, m, n), seed = shape.sizes, shape.seed
    heads, d, hidden, mem = 1 + seed % 3, 3 + min(m, 30), 1 + min(n, 40), 2 + (m * n) % 37
    dim, turning, width = heads * d, min(seed % 3, heads), 1 + seed % 4

    def weight(*sizes: int) -> torch.Tensor:
        return shape.normal(*sizes) / sizes[-1] ** 0.5

    def memory(rows: int, *lead: int) -> list[Tensor]:
        return [weight(*lead, rows, d), weight(*lead, d, rows)]

    hiddens = ((), (5,), (2 * dim, 17))[seed % 3]
    gates = shape.normal(heads, 6) + torch.tensor([-2.0, 4.0, 0.0, 0.0, 0.0, 2.0])
    pulls = [*memory(hidden, heads, 4), *memory(mem, heads, 1)] if seed % 2 else []
    states = [x for rows, count in ((hidden, 4), (mem, 1)) for _ in range(2)
              for x in memory(rows, b, heads, count)]  # fmt: skip
    given = BlockTokenArguments(
        shape.normal(b, dim), shape.normal(dim), *(weight(dim, dim) for _ in range(5)),
        weight(2 * turning, dim) if turning else None, shape.normal(d), gates,
        [weight(dim, 1, width) for _ in range(3)], [shape.normal(dim) for _ in hiddens],
        [weight(h, dim) for h in hiddens], [weight(dim, h) for h in hiddens], pulls, states,
        [shape.normal(b, dim, width - 1) for _ in range(3)], 3 * shape.normal(b, turning).abs(),
        0.02, 2.0, 1.5, 1.0, 1e-4, (6.0, 2.0)[seed % 2], 1e-6,
    )  # fmt: skip
    return [given]


def conv_arguments(shape: Shape) -> Arguments:
    """Of any width, and as the layouts of the stack have them."""
    width = 1 + shape.seed % 5
    b, m, n = shape.sizes
    shape.sizes = (b, m, n + width - 1)
    return [shape.matrices(), shape.normal(m, width)]


def conv_bounds(given: Arguments, backend: str) -> list[Tensor]:
    padded, weight = (x.abs() for x in given)
    return [EPS * (weight.shape[1] + 1) * OPERATORS["causal_conv"].reference(padded, weight)]


def conv_gradient_arguments(shape: Shape) -> Arguments:
    grad = shape.matrices()
    return [grad, *conv_arguments(shape)]


def conv_gradient_bounds(given: Arguments, backend: str) -> list[Tensor]:
    grad, padded, weight = (x.abs() for x in given)
    terms = OPERATORS["causal_conv_gradient"].reference(grad, padded, weight)
    added = (weight.shape[1], grad.shape[0] * grad.shape[2])
    return [EPS * (count + 1) * size for count, size in zip(added, terms, strict=True)]


def as_far_as_torch(name: str) -> Callable[[Arguments, str], list[Tensor]]:
    """Errors go round through every later token, which nobody counts. What torch's own float32
    makes of the numbers, and float64 of arguments that are wrong in their last bit, says what such
    errors grow to: eight times the largest of them, and what rounding the results takes."""

    def bounds(given: Arguments, backend: str) -> list[Tensor]:
        operator = OPERATORS[name]
        exact = operator.reference(*given)
        random = torch.Generator().manual_seed(0)

        def nudged(x: Tensor) -> Tensor:
            return x * (1 + EPS * torch.randn(x.shape, generator=random, dtype=x.dtype))

        others = [operator.reference(*mapped(given, lambda x: x.float()))]
        others += [operator.reference(*mapped(given, nudged)) for _ in range(3)]
        worst = [max(float((x - y).abs().max()) for y in ys) if x.numel() else 0.0
                 for x, *ys in zip(exact, *others, strict=True)]  # fmt: skip
        return [
            torch.full_like(x, 8 * error + 8 * EPS * float(x.abs().max())) if x.numel() else x
            for x, error in zip(exact, worst, strict=True)
        ]

    return bounds


def memory_gradient_bounds(given: Arguments, backend: str) -> list[Tensor]:
    """The gradients of the gates, moreover, are sums over all weights, whose terms cancel."""
    grads, _, forward = given
    results = OPERATORS["memories"].reference(False, forward)
    terms = sum((g * x).abs().sum() for g, x in zip(grads, results, strict=False) if g.numel())
    *others, gates = as_far_as_torch("memories_gradient")(given, backend)
    return [*others, gates + EPS * terms]


TABLE = {
    "causal_conv": Case(conv_arguments, conv_bounds),
    "causal_conv_gradient": Case(conv_gradient_arguments, conv_gradient_bounds),
    "memories": Case(memory_arguments, as_far_as_torch("memories")),
    "block_token": Case(block_token_arguments, as_far_as_torch("block_token")),
    "memories_gradient": Case(memory_gradient_arguments, memory_gradient_bounds),
    "combine": Case(combine_arguments, combine_bounds),
    "row_products": Case(
        lambda shape: [[shape.matrices() for _ in range(shape.terms)]], row_products_bounds
    ),
    "frobenius": Case(lambda shape: [shape.matrices()], frobenius_bounds, empty=False),
    "scale_update": Case(scale_update_arguments, scale_update_bounds, empty=False),
    "coordinate_mlp": Case(mlp_arguments, mlp_bounds),
    "coordinate_mlp_gradient": Case(mlp_gradient_arguments, mlp_gradient_bounds, empty=False),
    "newton_schulz": Case(newton_schulz_arguments, newton_schulz_bounds, empty=False, small=True),
    "orthogonal_update": Case(
        orthogonal_update_arguments, orthogonal_update_bounds, empty=False, small=True
    ),
    "multi_scale_write": Case(multi_scale_write_arguments, multi_scale_write_bounds),
    "horizons_write": Case(horizons_write_arguments, horizons_write_bounds, empty=False),
    "delta_write": Case(delta_write_arguments, delta_write_bounds, empty=False, small=True),
    "apply_update_": Case(apply_update_arguments, apply_update_bounds, written=(0,), lows=2),
    "adamw_": Case(adamw_arguments, adamw_bounds, written=(0, 2, 3), lows=5, on_host=4),
}

ELSEWHERE = {
    "newton_schulz": "ops/test_newton_schulz_forms.py",
    "delta_write": "ops/test_delta_write.py",
    "gram_average": "ops/test_gram_average.py",
}
"""In bfloat16 their errors depend on the spectrum: their own tests draw spectra."""
