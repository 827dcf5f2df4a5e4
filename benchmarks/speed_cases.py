"""What ``python -m benchmarks speed`` measures: every case, its contenders and its targets."""

import contextlib
import functools
import importlib
import math
import os
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from benchmarks import work
from benchmarks.timing import (
    Contender,
    clock_of,
    interleave,
    measure_rates,
    peak_bytes,
    profiled,
    share_of_products,
    timed,
    turn,
)
from benchmarks.work import Rates, Work
from deepopt import DMGD, M3, DeepMomentum, ops
from deepopt._compat import multiplies_bfloat16_faster
from deepopt.optim.output_map import Orthogonal

Line = dict[str, Any]
Row = dict[str, Any]
Shapes = Sequence[tuple[int, ...]]

LR = 1e-4
PATIENCE = 180.0
"""Seconds that another package may take to compile its first step."""
RARE = 4
"""Rounds to a turn of the slow contenders that no target needs."""


@dataclass(frozen=True)
class Setting:
    """How a case is run."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    def seconds(self, full: float) -> float:
        return full / 20 if self.quick else full


@dataclass(frozen=True)
class Target:
    """A number of a case, computed from its line, and its bound."""

    what: str
    value: Callable[[Line], float]
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Case:
    title: str
    run: Callable[[Setting], Line]
    """In a process of its own, with the threads set."""
    targets: Sequence[Target] = ()
    baseline: str = ""
    """The contender whose time is 1."""
    threads: Sequence[int] = (1, 2)
    note: str = ""


# -- Races ---------------------------------------------------------------------------------------


def race(
    factories: Mapping[str, Callable[[], Contender]],
    seconds: float,
    setting: Setting,
    share: Sequence[str] = (),
) -> Line:
    """Time contenders in turns beside what the machine can do.

    Args:
        factories: of the contenders. Where one of another package raises, its reason is its result.
        seconds: that it should take.
        setting: of the run.
        share: names of contenders whose time is to be split into products and the rest.
    """
    device = setting.device
    sizes = {"elements": 2**23, "size": 512} if setting.quick else {}
    rates = measure_rates(device, **sizes)
    contenders, rows = [], []
    for name, factory in factories.items():
        try:
            with patience(PATIENCE if name in OTHERS else 0.0):
                contender = factory()
                if name in OTHERS:
                    turn(contender, device)
        except Exception as error:
            if name not in OTHERS:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            rows.append({"contender": name, "not_run": reason})
            continue
        contenders.append(contender)
    times = interleave(contenders, setting.seconds(seconds), device)
    raced = []
    for contender, found in zip(contenders, times, strict=True):
        raced.append({"contender": contender.name, **found, **counted(contender, rates)})
        if contender.name in share and setting.threads == 1 and device == "cpu":
            raced[-1]["products_share"] = share_of_products(contender)
    return {"rates": rates._asdict(), "clock": clock_of(device), "rows": raced + rows}


def counted(contender: Contender, rates: Rates) -> Row:
    return {
        "bytes": work.total_bytes(contender.work),
        "flops": work.total_flops(contender.work),
        "least_flops": work.total_flops(contender.least),
        "traffic_seconds": work.traffic_seconds(contender.work, rates),
        "product_seconds": work.product_seconds(contender.work, rates),
        "roofline_seconds": work.roofline_seconds(contender.least, rates),
    }


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds; 0 waits for ever."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"its first step took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def row_of(line: Line, contender: str) -> Row:
    for row in line["rows"]:
        if row["contender"] == contender:
            return row
    raise KeyError(f"no contender {contender!r} in case {line.get('case')!r}")


def seconds_of(line: Line, contender: str) -> float:
    return row_of(line, contender).get(line["clock"], math.nan)


def ratio(contender: str, baseline: str, limit: float, what: str = "") -> Target:
    """A contender's time over another's."""
    return Target(
        what or f"{contender} / {baseline}",
        lambda line: seconds_of(line, contender) / seconds_of(line, baseline),
        limit,
    )


def rest(contender: str) -> Target:
    """What is not products, of a contender's time."""
    return Target(
        f"{contender}: time outside of matrix products",
        lambda line: 1 - row_of(line, contender).get("products_share", math.nan),
        0.15,
    )


# -- Optimizers ----------------------------------------------------------------------------------

Make = Callable[[list[nn.Parameter]], Optimizer]


def gradients(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype) * 0.01 for shape in shapes
    ]


def parameters(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    for param, grad in zip(found, grads, strict=True):
        param.grad = grad
    return found


def contender(
    name: str, make: Make, grads: Sequence[Tensor], phases: Work, least: Work, period: int = 1
) -> Contender:
    """An optimizer with parameters of its own; those of other packages get their own gradients,
    which they may write to or drop."""
    every = RARE if name in (*OTHERS, "DMGD coordinate") else 1
    if name not in OTHERS:
        step = make(parameters(grads)).step
        return Contender(name, step, phases, least, period, every=every)
    params = parameters([grad.clone() for grad in grads])
    optimizer = make(params)

    def prepare() -> None:
        for param, grad in zip(params, grads, strict=True):
            if param.grad is None:
                param.grad = grad.clone()

    return Contender(name, optimizer.step, phases, least, period, prepare, every)


def other_muon(params: list[nn.Parameter]) -> Optimizer:
    package = importlib.import_module("pytorch_optimizer")  # slow to import, not a dependency
    return package.Muon([{"params": params, "use_muon": True}], lr=LR, ns_steps=work.NS_STEPS)


def heavyball_muon(params: list[nn.Parameter]) -> Optimizer:
    if torch.get_num_threads() > 1:
        raise RuntimeError("timed on one thread alone, because it compiles for minutes")
    return importlib.import_module("heavyball").Muon(params, lr=LR)


def products_dtype(m: int, n: int, device: str) -> str:
    """In which DeepMomentum orthogonalises."""
    fast = min(m, n) >= 64 and multiplies_bfloat16_faster(torch.device(device))
    return "bfloat16" if fast else "float32"


def matrix_optimizers(device: str) -> dict[str, tuple[Make, Callable[..., Work], int]]:
    """Name: how it is made, its work per matrix, least or not, and its period."""

    def counted(rule: Callable[[int, int, str, bool], Work]) -> Callable[..., Work]:
        return lambda m, n, least: rule(m, n, products_dtype(m, n, device), least)

    def muon(m: int, n: int, least: bool) -> Work:
        return work.muon(m, n, least=least)

    def same(rule: work.Rule) -> Callable[..., Work]:
        return lambda m, n, least: rule(m, n)

    def deep(memory: str) -> Make:
        return lambda params: DeepMomentum(params, lr=LR, memory=memory, path="matrix")

    def dmgd(granularity: str) -> Make:
        return lambda params: DMGD(params, lr=LR, granularity=granularity)

    return {
        "torch Muon": (lambda params: Muon(params, lr=LR, ns_steps=work.NS_STEPS), muon, 1),
        "DeepMomentum linear": (deep("linear"), counted(work.linear), 1),
        "DeepMomentum delta": (deep("delta"), counted(work.delta), 1),
        "DeepMomentum covariance": (deep("covariance"), counted(work.covariance), work.PERIOD),
        "DeepMomentum mlp": (deep("mlp"), counted(work.mlp), 1),
        "M3": (lambda params: M3(params, lr=LR, path="matrix"), counted(work.m3), work.PERIOD),
        "DMGD row": (dmgd("row"), same(work.dmgd_row), 1),
        "DMGD coordinate": (dmgd("coordinate"), same(work.dmgd_coordinate), 1),
        "pytorch_optimizer Muon": (other_muon, muon, 1),
        "heavyball Muon": (heavyball_muon, muon, 1),
    }


OTHERS = ("pytorch_optimizer Muon", "heavyball Muon")
SPLIT = ("torch Muon", "DeepMomentum linear", "DeepMomentum delta", "DeepMomentum covariance", "M3")


def matrices(
    shapes: Sequence[tuple[int, int]], seconds: float, names: Sequence[str] = ()
) -> Callable[[Setting], Line]:
    """A race of all matrix optimizers, or of the named ones."""

    def run(setting: Setting) -> Line:
        known = matrix_optimizers(setting.device)
        grads = gradients(shapes, torch.float32, setting.device)

        def factory(name: str) -> Callable[[], Contender]:
            make, rule, period = known[name]
            phases, least = (
                work.over(shapes, functools.partial(rule, least=least)) for least in (False, True)
            )
            return lambda: contender(name, make, grads, phases, least, period)

        chosen = {name: factory(name) for name in names or known}
        return race(chosen, seconds, setting, SPLIT)

    return run


def deep_adamw(lr: float) -> Make:
    return lambda params: DeepMomentum(params, lr=lr, path="elementwise")


def elementwise(
    shapes: Shapes,
    seconds: float,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = ("AdamW fused", "AdamW foreach", "AdamW default"),
) -> Callable[[Setting], Line]:
    """A race of the element-wise path against torch's AdamW."""

    def run(setting: Setting) -> Line:
        grads = gradients(shapes, dtype, setting.device)
        elements, width = sum(grad.numel() for grad in grads), dtype.itemsize
        torchs = work.adamw(elements, width, width)
        known: dict[str, tuple[Make, Work]] = {
            "AdamW fused": (lambda p: AdamW(p, lr=LR, fused=True), torchs),
            "AdamW foreach": (lambda p: AdamW(p, lr=LR, foreach=True), torchs),
            "AdamW default": (lambda p: AdamW(p, lr=LR), torchs),
        }
        chosen = {name: known[name] for name in names}
        chosen["DeepMomentum"] = (deep_adamw(LR), work.adamw(elements, width))

        def factory(name: str) -> Callable[[], Contender]:
            make, phases = chosen[name]
            return lambda: contender(name, make, grads, phases, phases)

        return race({name: factory(name) for name in chosen}, seconds, setting)

    return run


# -- Correctness beside speed --------------------------------------------------------------------


def strides(setting: Setting, shape: Sequence[int] = (64, 32, 3, 3), steps: int = 3) -> Line:
    """Parameters in channels-last order, gradients in torch's: the error of a few steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(steps)]

    def stepped(make: Make, dtype: torch.dtype, order: torch.memory_format) -> Tensor:
        value = start.to(dtype).to(setting.device, memory_format=order)
        param = nn.Parameter(value)
        optimizer = make([param])
        for grad in grads:
            param.grad = grad.to(setting.device, dtype)
            optimizer.step()
        return param.detach().double()

    def adamw(params: list[nn.Parameter]) -> Optimizer:
        return AdamW(params, lr=1e-2, foreach=False)

    exact = stepped(adamw, torch.float64, torch.contiguous_format)
    contenders: dict[str, Make] = {
        "AdamW default": adamw,
        "AdamW foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
        "AdamW fused": lambda p: AdamW(p, lr=1e-2, fused=True),
        "DeepMomentum": deep_adamw(1e-2),
    }
    details = []
    for name, make in contenders.items():
        error = stepped(make, torch.float32, torch.channels_last) - exact
        details.append({"contender": name, "largest error": float(error.abs().max())})
    return {"details": details}


def singular_values(setting: Setting, shapes: Shapes = ((768, 768), (768, 3072))) -> Line:
    """How far from 1 the singular values σ of orthogonalised matrices are."""
    device = setting.device
    steps = work.NS_STEPS
    deep = Orthogonal(steps)

    def torchs(matrix: Tensor) -> Tensor:
        param = nn.Parameter(torch.zeros_like(matrix))
        param.grad = matrix
        Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=steps).step()
        m, n = matrix.shape
        return -param.detach() / max(1.0, m / n) ** 0.5  # the learning rate's adjustment

    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "torch Muon": torchs,
        "DeepMomentum": lambda matrix: deep.orthogonalize(matrix[None])[0],
        "DeepMomentum, in float32": lambda matrix: ops.newton_schulz(
            matrix[None], ops.polar_express(steps), torch.float32
        )[0],
    }
    details = []
    for shape in shapes:
        for name, matrix in inputs(*shape).items():
            for contender, orthogonal in maps.items():
                values = torch.linalg.svdvals(orthogonal(matrix.to(device)).double().cpu())
                error = (values - 1).abs()
                details.append(
                    {
                        "shape": " x ".join(map(str, shape)),
                        "input": name,
                        "contender": contender,
                        **{
                            f"{share:.0%} within": float(error.quantile(share))
                            for share in (0.5, 0.9, 0.99)
                        },
                        "all within": float(error.max()),
                        "smallest σ": float(values.min()),
                        "largest σ": float(values.max()),
                    }
                )
    return {"details": details}


def inputs(m: int, n: int) -> dict[str, Tensor]:
    """Gaussian, and with singular values spread evenly over orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(m, n, generator=generator)
    left, _, right = torch.linalg.svd(gaussian.double(), full_matrices=False)
    made = {"gaussian": gaussian}
    for condition in (1e3, 1e6):
        values = torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)
        made[f"condition {condition:.0e}"] = ((left * values) @ right).float()
    return made


def farther(line: Line) -> float:
    """Of the quantiles of the distance from 1 the worst: DeepMomentum's over torch's.

    Not of the largest, that of the direction in which the input is weakest: with singular values
    over many orders of magnitude it is out of the reach of any five steps.
    """
    columns = [key for key in line["details"][0] if key.endswith("% within")]
    rows = {(d["shape"], d["input"], d["contender"]): d for d in line["details"]}
    return max(
        row[column] / rows[shape, name, "torch Muon"][column]
        for (shape, name, contender), row in rows.items()
        if contender == "DeepMomentum"
        for column in columns
    )


# -- The coordinate MLP --------------------------------------------------------------------------


def coordinate_mlp(
    gradient: bool, shape: tuple[int, int, int] = (12, 768, 768), seconds: float = 15.0
) -> Callable[[Setting], Line]:
    """The operator, or its gradient, on its kernel against plain torch."""
    count = work.coordinate_mlp_gradient if gradient else work.coordinate_mlp

    def run(setting: Setting) -> Line:
        device, features, elements = setting.device, 2, math.prod(shape)
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        base, target = drawn(*shape), drawn(*shape)
        keys = [drawn(*shape) for _ in range(features)]
        weights = drawn(shape[0], work.HIDDEN, features + 1)
        scales, ones = drawn(shape[0], features), torch.ones(shape[0], device=device)

        def forced(backend: str) -> Callable[[], Any]:
            def step() -> None:
                with ops.backend(backend):
                    if gradient:
                        ops.coordinate_mlp_gradient(base, ones, keys, scales, weights, target, ones)
                    else:
                        ops.coordinate_mlp(base, ones, keys, scales, weights)

            return step

        phases = count(elements, features)
        backends = {"reference": "reference", "kernel": "cpu" if device == "cpu" else "cuda"}
        racers = {
            name: functools.partial(Contender, name, forced(backend), phases, phases)
            for name, backend in backends.items()
        }
        line = race(racers, seconds, setting)
        details = []
        for row in line["rows"]:
            for tanh in (1, work.TANH_OPERATIONS):
                rate = work.total_flops(count(elements, features, tanh)) / row[line["clock"]]
                details.append(
                    {
                        "contender": row["contender"],
                        "FLOPs of a tanh": tanh,
                        "GFLOP/s": rate / 1e9,
                        "of the float32 products' rate": rate / line["rates"]["float32"],
                    }
                )
        return {**line, "details": details}

    return run


def peak_share(contender: str, tanh: int) -> Target:
    def value(line: Line) -> float:
        found = {(d["contender"], d["FLOPs of a tanh"]): d for d in line["details"]}
        return found[contender, tanh]["of the float32 products' rate"]

    what = f"{contender}: share of the float32 peak, a tanh counted as {tanh} FLOPs"
    return Target(what, value, 0.3, at_least=True)


MLP_TARGETS = (
    ratio("kernel", "reference", 1 / 8),
    *(peak_share("kernel", tanh) for tanh in (1, work.TANH_OPERATIONS)),
)


# -- Scaling -------------------------------------------------------------------------------------

MILLIONS = (1, 3, 10, 30, 100, 300)


def scaling(
    optimizer: str, millions: Sequence[float] = MILLIONS, minute: float = 60.0, side: int = 768
) -> Callable[[Setting], Line]:
    """Step times against the number of parameters, as far as a minute per point and the memory
    allow, and their exponent."""

    def run(setting: Setting) -> Line:
        device, clock = setting.device, clock_of(setting.device)
        details: list[Row] = []
        for million in millions[:3] if setting.quick else millions:
            elements = int(million * 1e6)
            shapes: Shapes = [(elements,)]
            make: Make = deep_adamw(LR)
            if optimizer == "delta":
                shapes = [(side, side)] * max(1, round(elements / side**2))
                make = lambda p: DeepMomentum(p, lr=LR, memory="delta", path="matrix")  # noqa: E731
            elements = sum(math.prod(shape) for shape in shapes)
            if details:
                expected = details[-1]["ms"] / 1e3 * elements / details[-1]["parameters"]
                if 5 * expected > minute or 48 * elements > free_bytes(device):
                    break
            stepped = contender("", make, gradients(shapes, torch.float32, device), (), ())
            (times,) = interleave([stepped], setting.seconds(minute / 20), device, most=50)
            details.append(
                {
                    "parameters": elements,
                    "ms": times[clock] * 1e3,
                    "ns per parameter": times[clock] * 1e9 / elements,
                }
            )
            del stepped
        return {"clock": clock, "details": details, "exponent": exponent(details)}

    return run


def exponent(details: Sequence[Row]) -> float:
    """Of the power law through the points, by least squares of the logarithms; one has none."""
    if len(details) < 2:
        return math.nan
    sizes = [math.log(point["parameters"]) for point in details]
    times = [math.log(point["ms"]) for point in details]
    return statistics.linear_regression(sizes, times).slope


def free_bytes(device: str) -> float:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


LINEAR = Target("exponent of the step time, less 1", lambda line: abs(line["exponent"] - 1), 0.05)


# -- Overheads -----------------------------------------------------------------------------------


def buckets(setting: Setting, count: int = 40, repeats: int = 10) -> Line:
    """Python's share in a step of many tiny tensors, each of a shape, and so a bucket, of its own.

    The time in torch's operators, and deepopt's, comes from profiles, which lengthen the step. How
    much of that falls into the operators is not known: if all, Python's share is what the profile
    has outside of them; if none, the step's time without a profile less theirs. Of all repeats the
    fastest counts.
    """
    shapes = [(8 + index, 16 + index) for index in range(count)]
    grads = gradients(shapes, torch.float32, setting.device)
    details = []
    for memory in ("linear", "delta", "mlp"):
        optimizer = DeepMomentum(parameters(grads), lr=LR, memory=memory, path="matrix")
        optimizer.step()
        plain = min(timed(optimizer.step, setting.device)[1] for _ in range(5 * repeats)) * 1e6
        profiles = [profiled(optimizer.step) for _ in range(repeats)]
        whole, own = min(profiles, key=lambda profile: profile[0])
        inside = sum(time for time, _ in own.values())
        details.append(
            {
                "memory": memory,
                "buckets": count,
                "µs per bucket": plain / count,
                "operators per bucket": sum(calls for _, calls in own.values()) / count,
                "µs in operators": inside / count,
                "µs in Python, at least": max(0.0, plain - inside) / count,
                "at most": (whole - inside) / count,
            }
        )
    return {"details": details}


def python_overhead(memory: str) -> Target:
    def value(line: Line) -> float:
        return next(d["at most"] for d in line["details"] if d["memory"] == memory)

    return Target(f"{memory}: µs of Python per bucket, at most", value, 20.0)


def memory(
    setting: Setting,
    shapes: Sequence[tuple[int, int]] = ((512, 1024), (1024, 512)),
    count: int = 8,
) -> Line:
    """What a step takes beyond parameters, gradients and state: of matrices that are one bucket, of
    as many times more of the same shape, and of as many buckets of different shapes."""
    makers = {
        "DeepMomentum, element-wise": deep_adamw(LR),
        **{name: made[0] for name, made in matrix_optimizers("cpu").items() if name not in OTHERS},
    }
    bucket = count * math.prod(shapes[0]) * work.FLOAT
    details = []
    for name, make in makers.items():

        def peak(chosen: Shapes, make: Make = make) -> float:
            optimizer = make(parameters(gradients(chosen, torch.float32, "cpu")))
            optimizer.step()
            return peak_bytes(optimizer.step) / bucket

        one = max(peak([shape] * count) for shape in shapes)
        more, others = peak([shapes[0]] * count * len(shapes)), peak([*shapes] * count)
        details.append(
            {
                "optimizer": name,
                "MB of a bucket": bucket / 1e6,
                "peak of one, in buckets": one,
                f"of {len(shapes)} times the matrices": more,
                f"of {len(shapes)} shapes": others,
                "growth": max(more, others) / max(one, 1e-9),
            }
        )
    return {"details": details}


def growth(line: Line) -> float:
    return max(
        d["growth"]
        for d in line["details"]
        if d["optimizer"] not in ("DeepMomentum, element-wise", "torch Muon")
    )


# -- The list ------------------------------------------------------------------------------------

MILLION = 2**20
GPT2 = (768, 12)
MUON, FUSED = "torch Muon", "AdamW fused"
FEW_TENSORS = tuple(name for name in matrix_optimizers("cpu") if name != "heavyball Muon")
FULL = (MUON, "DeepMomentum linear", "DeepMomentum delta")
MATRIX_TARGETS = (
    ratio("DeepMomentum linear", MUON, 0.60),
    ratio("DeepMomentum delta", MUON, 0.70),
    ratio("DeepMomentum covariance", MUON, 1.0, "DeepMomentum covariance, refresh included / Muon"),
    ratio("M3", "DeepMomentum linear", 1.15, "M3, over a slow chunk / DeepMomentum linear"),
    ratio("DMGD row", "DeepMomentum linear", 1.5),
)

CASES: dict[str, Case] = {
    "adamw-large": Case(
        "Element-wise, 4 tensors of 8 M, float32",
        elementwise([(8 * MILLION,)] * 4, 12.0),
        [ratio("DeepMomentum", FUSED, 1.05)],
        FUSED,
    ),
    "adamw-huge": Case(
        "Element-wise, one tensor of 100 M, float32",
        elementwise([(100_000_000,)], 12.0, names=(FUSED, "AdamW foreach")),
        [ratio("DeepMomentum", FUSED, 1.05)],
        FUSED,
    ),
    "adamw-bf16": Case(
        "Element-wise, 4 tensors of 8 M, bfloat16",
        elementwise([(8 * MILLION,)] * 4, 12.0, torch.bfloat16),
        [ratio("DeepMomentum", FUSED, 1 / 1.5)],
        FUSED,
        note="torch keeps bfloat16 averages, 14 bytes per element and step; DeepMomentum keeps "
        "them in float32, 22 bytes, because an average in bfloat16 stops moving.",
    ),
    "adamw-400": Case(
        "Element-wise, 400 tensors of 2 k, float32",
        elementwise([(2075,)] * 400, 10.0),
        [ratio("DeepMomentum", FUSED, 1 / 2)],
        FUSED,
    ),
    "adamw-500": Case(
        "Element-wise, 500 tensors of 1 k, float32",
        elementwise([(1000,)] * 500, 10.0),
        (),
        FUSED,
    ),
    "strides": Case(
        "Element-wise, channels-last parameters with contiguous gradients: errors against float64",
        strides,
        [
            Target(
                "DeepMomentum: largest error of three steps of 0.01",
                lambda line: line["details"][-1]["largest error"],
                1e-6,
            )
        ],
        threads=(1,),
    ),
    "gpt2": Case(
        "Matrices of 3 of GPT-2-small's 12 layers",
        matrices(work.transformer(GPT2[0], 3), 120.0),
        [
            *MATRIX_TARGETS,
            *(rest(f"DeepMomentum {m}") for m in ("linear", "delta", "covariance")),
        ],
        MUON,
        note="All layers are alike, and the time of a layer does not depend on their number: "
        "the next case has all twelve.",
    ),
    "gpt2-full": Case(
        "All matrices of GPT-2-small, 85 M parameters",
        matrices(work.transformer(*GPT2), 0.0, FULL),
        MATRIX_TARGETS[:2],
        MUON,
        threads=(1,),
    ),
    "vit": Case(
        "Matrices of ViT-tiny, 5.3 M parameters",
        matrices(work.transformer(192, 12), 40.0),
        MATRIX_TARGETS,
        MUON,
    ),
    "tiny": Case(
        "500 matrices of 32 x 32",
        matrices([(32, 32)] * 500, 20.0, FEW_TENSORS),
        MATRIX_TARGETS,
        MUON,
        note="Without heavyball, which compiles the step of 500 parameters as one piece, for more "
        "than four minutes.",
    ),
    "singular-values": Case(
        "Singular values after five steps of Newton-Schulz",
        singular_values,
        [Target("50, 90, 99 % of σ within: the worst ratio to torch Muon's", farther, 1.0)],
        threads=(1,),
        note="The distance from 1 within which so many of the singular values are.",
    ),
    "coordinate-mlp": Case(
        "The coordinate MLP's value, 7 M entries, 2 features, 8 units",
        coordinate_mlp(gradient=False),
        MLP_TARGETS,
        "reference",
    ),
    "coordinate-mlp-gradient": Case(
        "The coordinate MLP's gradient, 7 M entries, 2 features, 8 units",
        coordinate_mlp(gradient=True),
        MLP_TARGETS,
        "reference",
    ),
    "scaling-elementwise": Case(
        "Element-wise step against parameters", scaling("elementwise"), [LINEAR], threads=(1,)
    ),
    "scaling-delta": Case(
        "Step of matrices of 768 x 768, delta memory, against parameters",
        scaling("delta"),
        [LINEAR],
        threads=(1,),
    ),
    "buckets": Case(
        "Python per bucket: 40 tiny matrices of 40 shapes",
        buckets,
        [python_overhead(m) for m in ("linear", "delta", "mlp")],
        threads=(1,),
    ),
    "memory": Case(
        "Memory of a step beyond parameters, gradients and state",
        memory,
        [Target("peak with two buckets / peak with one, the worst", growth, 1.1)],
        threads=(1,),
        note="Scratch is to be that of one bucket, whatever the size of the model: torch's "
        "allocations above what was held before the step, in units of a bucket's float32 entries.",
    ),
}
