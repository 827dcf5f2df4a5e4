"""CMA-ES over the numbers of a memory's MLP, on tasks whose best linear memory is known."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepopt.memory import AnyMemory, EntrywiseMLP, Horizons, Linear
from deepopt.memory.entrywise_mlp import untrained_weights
from deepopt.memory.horizons import width
from deepopt.meta.gains import FEATURES, Gains
from deepopt.meta.tasks import USUAL_KINDS, Task, draw
from deepopt.meta.training import train

BETAS = (0.0, 0.5, 0.7, 0.9)
RATES = (0.01, 0.03, 0.1, 0.3)
LARGEST = 0.5
"""Log losses relative to the baseline are clamped to this, so that no task outweighs others."""
VALIDATION = 1_000_000
"""The first seed of the tasks that evolution never sees."""
SIGMA = 0.2
"""First spread of the candidates. It is small, because further away most weights of
:class:`Horizons` are clipped."""
SAME = 1e-9
"""Up to here, the mean that a log leads to again counts as the one that it has."""
INNER_LR = 0.1
"""The inner learning rate of "mlp online"."""
Line = dict[str, Any]
Scales = tuple[float, ...]


def mean_of_averages(scales: int, units: int) -> Tensor:
    """A φ that takes the plain mean of the averages, with all of its units active."""
    phi = torch.zeros(units, width(scales), dtype=torch.float64)
    phi[:, 2 * scales + 2] = 1.0
    phi[0, 2 * scales + 3 :] = 1 / scales
    return phi


class Searched(NamedTuple):
    """A memory, or gains of the linear memory's updates, whose MLP can be searched for.

    Attributes:
        make: makes it from further time scales, which gains do not have, and the rows of φ.
        start: makes the φ that the search starts from, for given numbers of averages and units.
        units: the MLP's default number of units.
    """

    make: Callable[[Scales, list[list[float]]], AnyMemory | Gains]
    start: Callable[[int, int], Tensor]
    units: int


def no_gains(scales: int, units: int) -> Tensor:
    """A φ of :class:`Gains` whose gains are 1: random units, with a read-out of zeros."""
    return untrained_weights(FEATURES + 1, units)


SEARCHED = {
    "horizons": Searched(Horizons, mean_of_averages, 2),
    "mlp": Searched(lambda scales, phi: EntrywiseMLP(scales, phi=phi), untrained_weights, 4),
    "mlp online": Searched(
        lambda scales, phi: EntrywiseMLP(scales, inner_lr=INNER_LR, phi=phi), untrained_weights, 4
    ),
    "rows": Searched(lambda scales, phi: Gains(False, phi), no_gains, 4),
    "directions": Searched(lambda scales, phi: Gains(True, phi), no_gains, 4),
}

GAINS = tuple(name for name, searched in SEARCHED.items() if searched.start is no_gains)
"""Those that have no averages of their own."""


@dataclass(frozen=True)
class Baseline:
    """The best linear memory on a task, over all pairs of ``BETAS`` and ``RATES``.

    Args:
        task: the task.
        lr: the best rate, at which candidates train too.
        beta: the best retention.
        loss: the log of the loss that it reaches.
    """

    task: Task
    lr: float
    beta: float
    loss: float

    @classmethod
    def of(cls, task: Task) -> "Baseline":
        runs = (
            (train(task, Linear(), lr, beta).item(), lr, beta) for beta in BETAS for lr in RATES
        )
        loss, lr, beta = min(runs)
        return cls(task, lr, beta, loss)


class Log:
    """A file of JSON lines that a run appends to and resumes from.

    Args:
        path: the file. A last line that an interruption has torn is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.lines: list[Line] = [json.loads(line) for line in whole.splitlines()]

    def add(self, line: Line) -> None:
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def of(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line["is"] == kind]


@dataclass(frozen=True)
class Evolution:
    """A search for φ: the same arguments and seed give the same φ on the same kind of processor.

    The log is the checkpoint. It has the values of all candidates of every generation, and telling
    them to CMA-ES again brings it back to where it was. Another processor or number of threads
    rounds differently, so that a search can take another course there.

    Args:
        memory: a key of ``SEARCHED``.
        time_scales: retentions of the averages besides the momentum's own; gains have none.
        units: the MLP's units; None for as many as the memory has by default.
        population: candidates of a generation, trained side by side; two at least.
        pool: tasks to draw from.
        tasks: tasks of a generation, the same for all candidates.
        steps: the range of the length of a run.
        kinds: kinds of tasks to learn from; validation takes the usual ones, whatever these are.
        seed: the seed of the search.

    Raises:
        ValueError: an argument out of range.
    """

    memory: str = "horizons"
    time_scales: Sequence[float] = (0.5,)
    units: int | None = None
    population: int = 12
    pool: int = 12
    tasks: int = 2
    steps: tuple[int, int] = (100, 200)
    kinds: Sequence[str] = USUAL_KINDS
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"units": 1, "population": 2, "pool": 1, "tasks": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"Invalid {name}: {value}; it must be at least {bound}")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise ValueError(
                f"Invalid steps: {self.steps}; give the fewest, at least 1, before the most"
            )
        # What is made checks the time scales.
        SEARCHED[self.memory].make(tuple(self.time_scales), self.start().tolist())

    def start(self) -> Tensor:
        """The φ that the search starts from."""
        searched = SEARCHED[self.memory]
        phi = searched.start(1 + len(self.time_scales), self.units or searched.units)
        return phi.to(torch.float64)

    def run(self, log: Log, generations: int) -> Tensor:
        """The mean of the search after ``generations``, which include those in the log.

        Raises:
            ValueError: fewer ``generations`` than the log has, or a log of another search, or of
                one that went another way on another processor.
        """
        import cmaes

        self._check(log, generations)
        search = cmaes.CMA(
            self.start().flatten().numpy(),
            SIGMA,
            seed=self.seed,
            population_size=self.population,
        )
        finished = log.of("generation")
        for number in range(generations):
            candidates = [search.ask() for _ in range(self.population)]
            if number < len(finished):
                there = finished[number]["mean"]
                if max(abs(a - b) for a, b in zip(search.mean, there, strict=True)) > SAME:
                    raise ValueError(
                        f"Invalid log: generation {number} of {log.path} began elsewhere than its "
                        "values lead here, as they can on another processor; go on there, or give "
                        "another folder"
                    )
                values = finished[number]["values"]
            else:
                chosen = self.tasks_of(number)
                phis = torch.stack([torch.from_numpy(x) for x in candidates])
                losses = [self.relative(task, phis, log) for task in chosen]
                values = torch.stack(losses).mean(0).tolist()
                log.add(
                    {
                        "is": "generation",
                        "number": number,
                        "tasks": [task.seed for task in chosen],
                        "values": values,
                        "mean": search.mean.tolist(),
                    }
                )
            search.tell(list(zip(candidates, values, strict=True)))
        return torch.tensor(search.mean, dtype=torch.float64).view_as(self.start())

    def _check(self, log: Log, generations: int) -> None:
        """Raise ValueError if the log is that of another search, or has more generations."""
        if (known := len(log.of("generation"))) > generations:
            raise ValueError(
                f"Invalid generations: {generations}; {log.path} has {known}: ask for as many at "
                "least, or give another folder"
            )
        baselines = {"betas": BETAS, "rates": RATES}
        header = json.loads(
            json.dumps({"is": "evolution", **dataclasses.asdict(self), "baselines": baselines})
        )
        if not log.lines:
            log.add(header)
        if log.lines[0] != header:
            raise ValueError(
                f"Invalid log: {log.path} is of {log.lines[0]}, and this search is {header}; give "
                "another folder or the same arguments"
            )

    def tasks_of(self, generation: int) -> list[Task]:
        """The tasks of a generation: the pool in random order, shuffled anew for every pass."""
        order = list(range(self.pool))
        rounds, place = divmod(generation * self.tasks, self.pool)
        random.Random(f"{self.seed}/{rounds}").shuffle(order)
        seeds = [order[(place + k) % self.pool] for k in range(self.tasks)]
        return [draw(seed, self.steps, self.kinds) for seed in seeds]

    def baseline(self, task: Task, log: Log) -> Baseline:
        """The task's baseline, read from the log, or measured and added to it."""
        for line in log.of("baseline"):
            if Task(**line["task"]) == task:  # lines may be older than a field of the task
                return Baseline(task, line["lr"], line["beta"], line["loss"])
        measured = Baseline.of(task)
        log.add({"is": "baseline", **dataclasses.asdict(measured)})
        return measured

    def relative(self, task: Task, phis: Tensor, log: Log) -> Tensor:
        """Log loss of every candidate minus that of the best linear memory, shape (P,)."""
        best = self.baseline(task, log)
        start = self.start()
        made = SEARCHED[self.memory].make(tuple(self.time_scales), torch.zeros_like(start).tolist())
        phis = phis.view(-1, *start.shape)
        if isinstance(made, Gains):
            reached = train(task, Linear(), best.lr, best.beta, phis, made)
        else:
            reached = train(task, made, best.lr, phis=phis)
        return (reached - best.loss).clamp(-LARGEST, LARGEST)

    def validate(self, phis: Iterable[Tensor], count: int, log: Log) -> Tensor:
        """Every φ on tasks that evolution never sees, shape (tasks, P), as :meth:`relative`."""
        stacked = torch.stack(list(phis))
        rows = []
        for seed in range(VALIDATION, VALIDATION + count):
            task = draw(seed, self.steps)
            rows.append(self.relative(task, stacked, log))
        return torch.stack(rows)
