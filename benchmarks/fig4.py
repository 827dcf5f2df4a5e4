"""The toy of the paper's Figure 4: momentum against delta momentum on two variables (Eq 53).

psi(r, theta) = r² + k (r - theta + a sin(omega r))² from (-3.5, 2), a valley that winds towards its
lowest point at the origin. The paper names neither k, a and omega nor any learning rate or
retention, and does not say whether the two variables are one vector or two scalars. So all of them
are run, on a grid, as rows of one batch; it takes seconds. ``fig4.jsonl`` has a line for every
rule, learning rate and retention, ``fig4.md`` the tables and ``fig4.png`` one surface.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.tables import markdown
from deepopt._files import write_atomically
from deepopt.memory.delta_rule import DeltaRule
from deepopt.memory.preconditioned import Preconditioned

START = (-3.5, 2.0)
STEPS = 2000
REACHED = 1e-3
LEARNING_RATES = tuple(1e-4 * 2**n for n in range(13))
RETENTIONS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Surface:
    """The constants of Eq 53."""

    k: float
    amplitude: float
    omega: float

    def __str__(self) -> str:
        return f"k {self.k:g}, a {self.amplitude:g}, ω {self.omega:g}"


@dataclass(frozen=True)
class Method:
    """A rule, on the two variables as one vector or as two scalars, and eta / lr."""

    rule: str
    unit: str = "vector"
    inner: float = 1.0

    def __str__(self) -> str:
        if self == MOMENTUM:
            return self.rule
        return f"{self.rule}, {self.unit}" + (f", η = {self.inner:g} lr" if self.inner != 1 else "")

    def memory(self, lr: Tensor) -> Preconditioned:
        if self == MOMENTUM:
            return Preconditioned()
        return DeltaRule(rule=self.rule, rate=self.inner * lr)  # type: ignore[arg-type]


MOMENTUM = Method("momentum")
METHODS = (
    MOMENTUM,
    Method("implicit"),
    Method("implicit", "scalars"),
    Method("implicit", inner=0.1),
    Method("implicit", inner=0.01),
    Method("derived"),
    Method("derived", "scalars"),
    Method("literal"),
    Method("literal", "scalars"),
)
SURFACES = tuple(Surface(*x) for x in itertools.product((1.0, 10.0), (0.5, 1.0), (1.0, 3.0, 5.0)))
SETTINGS = tuple(itertools.product(LEARNING_RATES, RETENTIONS))
SHOWN = Surface(10.0, 0.5, 3.0)


def psi(points: Tensor, k: Tensor, amplitude: Tensor, omega: Tensor) -> Tensor:
    """Eq 53 at points (..., 2)."""
    r, theta = points.unbind(-1)
    return r.square() + k * (r - theta + amplitude * (omega * r).sin()).square()


def columns(*values: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in zip(*values, strict=True)]


def trajectories(
    method: Method, settings: Sequence[tuple[float, float]], surfaces: Sequence[Surface], steps: int
) -> tuple[Tensor, Tensor]:
    """Points, shape (steps + 1, settings, surfaces, 2), and psi at them."""
    rows = list(itertools.product(settings, surfaces))
    lr, retention = columns(*(setting for setting, _ in rows))
    surface = columns(*((s.k, s.amplitude, s.omega) for _, s in rows))
    size = 2 if method.unit == "scalars" else 1
    lr, retention = (x.repeat_interleave(size)[:, None, None] for x in (lr, retention))
    memory = method.memory(lr)
    point = torch.tensor(START, dtype=torch.float64).repeat(len(rows), 1)
    state = memory.init(point.view(len(lr), -1, 1))
    points, values = [], []
    for step in range(steps + 1):
        point = point.detach().requires_grad_()
        value = psi(point, *surface)
        points.append(point.detach())
        values.append(value.detach())
        (grad,) = torch.autograd.grad(value.sum(), point)
        grad = grad.view(len(lr), -1, 1)
        state["step"] = torch.full((len(lr),), step + 1.0)
        memory.write(state, grad, retention)
        update = lr * memory.read(state, grad, retention)
        point = point - update.view(-1, 2)
    shape = (steps + 1, len(settings), len(surfaces))
    return torch.stack(points).view(*shape, 2), torch.stack(values).view(shape)


def steps_to_reach(values: Tensor) -> Tensor:
    """The step from which psi stays below REACHED to the end, infinity if there is none."""
    above = ~(values < REACHED)  # and where it is not a number
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64).view(-1, 1, 1)
    last = (above * steps).amax(0)
    return torch.where(last < len(values), last, math.inf)


def best(reach: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest steps over all settings for every surface, and the setting's number."""
    return reach.min(0)


def text(steps: float) -> str:
    return f"{steps:.0f}" if math.isfinite(steps) else "-"


def overview(reaches: dict[Method, Tensor], ends: dict[Method, Tensor]) -> str:
    """How often and how soon each rule arrives, over all surfaces and settings."""
    base, momentum = best(reaches[MOMENTUM])[0], reaches[MOMENTUM]
    rows = [
        [
            "rule",
            "surfaces reached",
            "median steps at its best",
            "sooner / later than momentum, both at their best",
            "sooner / later at equal settings",
            "runs that reach it",
            "runs that are not finite",
        ]
    ]
    for method, reach in reaches.items():
        own, _ = best(reach)
        sooner, later = (reach < momentum).double().mean(), (reach > momentum).double().mean()
        rows.append(
            [
                str(method),
                f"{int(own.isfinite().sum())} of {len(SURFACES)}",
                text(statistics.median(own.tolist())),
                f"{int((own < base).sum())} / {int((own > base).sum())}",
                f"{sooner:.0%} / {later:.0%}",
                f"{reach.isfinite().double().mean():.0%}",
                f"{1 - ends[method].isfinite().double().mean():.0%}",
            ]
        )
    return markdown(rows)


def fewest_steps(reaches: dict[Method, Tensor]) -> str:
    """The fewest steps of each rule on each surface, and the setting that takes them."""
    rows = [["surface", *map(str, reaches)]]
    for index, surface in enumerate(SURFACES):
        cells = []
        for reach in reaches.values():
            own, setting = best(reach)
            lr, retention = SETTINGS[int(setting[index])]
            found = text(float(own[index]))
            cells.append(found if found == "-" else f"{found} ({lr:g}, {retention:g})")
        rows.append([str(surface), *cells])
    return markdown(rows)


def by_rate(reaches: dict[Method, Tensor]) -> str:
    """At retention 0.9, surfaces reached and the median of the steps, at every learning rate."""
    rows = [["lr", *map(str, reaches)]]
    for lr in LEARNING_RATES:
        setting = SETTINGS.index((lr, 0.9))
        found = [reach[setting] for reach in reaches.values()]
        cells = [f"{int(x.isfinite().sum())}: {text(statistics.median(x.tolist()))}" for x in found]
        rows.append([f"{lr:g}", *cells])
    return markdown(rows)


def report(reaches: dict[Method, Tensor], ends: dict[Method, Tensor], steps: int) -> str:
    """The tables, in Markdown."""
    arriving = {m: reach for m, reach in reaches.items() if reach.isfinite().any()}
    slopes = start_slopes()
    return "\n\n".join(
        [
            "# Figure 4: delta momentum on a winding valley",
            "Regenerated by `python -m benchmarks fig4`.",
            "The paper's toy (Eq 53) is ψ = r² + k (r - θ + a sin(ωr))² from (-3.5, 2); its text "
            "says that delta momentum arrives sooner than momentum. It gives none of the constants "
            "k, a, ω, no learning rate and no retention, and it does not say whether r and θ are "
            f"one vector or two scalars. Here: {len(SURFACES)} surfaces (k 1 or 10, a 0.5 or 1, "
            f"ω 1, 3 or 5), {len(LEARNING_RATES)} learning rates from {LEARNING_RATES[0]:g} to "
            f"{LEARNING_RATES[-1]:g}, a factor 2 apart, retentions α of "
            f"{', '.join(f'{x:g}' for x in RETENTIONS)}, {steps} steps in float64. A run has "
            f"arrived at the step from which on ψ stays below {REACHED:g}. The inner learning rate "
            "η is the learning rate, as in the paper, unless another is named; P = I.",
            f"The gradient at the start has a norm of {slopes.min():.0f} to {slopes.max():.0f} on "
            "these surfaces. The rule as printed grows beyond sqrt(1 + α) < 1.42, the derived one "
            "beyond sqrt((1 + α)/η); the implicit one is stable everywhere, and takes short steps "
            "where gradients are large.",
            f"torch {torch.__version__}.",
            "## All surfaces and settings",
            overview(reaches, ends),
            "## Fewest steps, with the learning rate and the retention that take them",
            fewest_steps(arriving),
            "## At retention 0.9: surfaces reached, and the median of the steps over all",
            by_rate(arriving),
            f"![trajectories](fig4.png)\n\n{SHOWN}, the rules on a vector at their best settings.",
        ]
    )


def start_slopes() -> Tensor:
    """The norm of the gradient at the start of every surface."""
    start = torch.tensor(START, dtype=torch.float64).repeat(len(SURFACES), 1).requires_grad_()
    surface = columns(*((s.k, s.amplitude, s.omega) for s in SURFACES))
    (grad,) = torch.autograd.grad(psi(start, *surface).sum(), start)
    return grad.norm(dim=-1)


def plot(path: Path, reaches: dict[Method, Tensor], steps: int) -> None:
    """The trajectories of the rules on one surface, and psi along them."""
    index = SURFACES.index(SHOWN)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    r, theta = torch.meshgrid(
        torch.linspace(-4, 1.5, 200), torch.linspace(-4.5, 3, 200), indexing="xy"
    )
    constants = (torch.tensor(x) for x in (SHOWN.k, SHOWN.amplitude, SHOWN.omega))
    height = psi(torch.stack([r, theta], -1), *constants)
    left.contourf(r, theta, (height + 1e-2).log(), 24, cmap="Greys", alpha=0.6)
    for number, method in enumerate(METHODS):
        own, setting = best(reaches[method])
        if method.unit == "scalars" or method.inner == 0.1 or not own[index].isfinite():
            continue
        lr, retention = SETTINGS[int(setting[index])]
        points, values = trajectories(method, [(lr, retention)], [SHOWN], steps)
        last = int(own[index]) + 20
        label = f"{method}, lr {lr:g}, α {retention:g}"
        left.plot(*points[:last, 0, 0].T, ".-", color=f"C{number}", ms=3, lw=0.8, label=label)
        right.semilogy(values[:last, 0, 0], color=f"C{number}", label=label)
    left.plot(0, 0, "k*")
    left.set(xlabel="r", ylabel="θ", xlim=(-4, 1.5), ylim=(-4.5, 3))
    right.axhline(REACHED, color="k", lw=0.5)
    right.set(xlabel="step", ylabel="ψ")
    right.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks fig4", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"({STEPS})")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    reaches, ends, lines = {}, {}, []
    for method in METHODS:
        _, values = trajectories(method, SETTINGS, SURFACES, arguments.steps)
        reaches[method], ends[method] = steps_to_reach(values), values[-1]
        for (lr, retention), reach in zip(SETTINGS, reaches[method].tolist(), strict=True):
            steps = [int(x) if math.isfinite(x) else None for x in reach]
            lines.append({**asdict(method), "lr": lr, "retention": retention, "steps": steps})
    written = report(reaches, ends, arguments.steps)
    print(written)
    (arguments.out / "fig4.md").write_text(written + "\n")
    data = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(arguments.out / "fig4.jsonl", data.encode())
    plot(arguments.out / "fig4.png", reaches, arguments.steps)
    print(f"written: {arguments.out / 'fig4.md'}", file=sys.stderr)
    return 0
