"""Which runs there are: sweeps of learning rates, seeds, parts of the layer, optimizers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.hope import models
from benchmarks.hope.formal import LANGUAGES
from benchmarks.hope.training import TASKS, Line, Run
from deepopt.hope.optimizers import optimizers_by_name
from deepopt.hope.trainer import TrainConfig

DEFAULT = TrainConfig.optimizer
RATES = (8e-3, 4e-3, 2e-3, 1.6e-2)
MODELS = (*models.HOPES, *models.BASELINES)
ABLATED = ("bytes", "recall", *LANGUAGES)
"""Tasks on which the parts of Hope's layer are changed: what the layer can do."""
SGD_RATES = (1.2e-2, 4e-3, 1.2e-3, 4e-4)
"""Rates of SGD, on AdamW's scale like all rates; other optimizers are compared with its best."""

Lines = Mapping[Run, Line]


@dataclass(frozen=True)
class Plan:
    """The runs of the benchmark, or the part of them that a page shows.

    Attributes:
        tasks: names of `TASKS`.
        compared: models of the sweep.
        rates: learning rates, on AdamW's scale; the first is tried first.
        seeds: runs of every model at its best rate.
        steps: optimizer steps; None for each task's own.
    """

    tasks: Sequence[str] = tuple(TASKS)
    compared: Sequence[str] = MODELS
    rates: Sequence[float] = RATES
    seeds: int = 3
    steps: int | None = None

    def run(self, task: str, model: str, lr: float, seed: int = 0) -> Run:
        return Run(task, model, DEFAULT, lr, seed, self.steps or TASKS[task].steps)

    def sweep(self, task: str, model: str) -> list[Run]:
        return [self.run(task, model, lr) for lr in self.rates]

    def best(self, task: str, model: str, lines: Lines) -> Run | None:
        """The best run of the sweep; None if there is none yet."""
        found = [run for run in self.sweep(task, model) if run in lines]
        return min(found, key=lambda run: badness(lines[run]), default=None)

    def repeats(self, best: Run) -> list[Run]:
        """The run with every seed."""
        return [self.run(best.task, best.model, best.lr, seed) for seed in range(self.seeds)]

    def hope(self, task: str, part: str, lines: Lines) -> Run:
        """Hope with a part of its layer changed, or "" for none, at the best rate of the whole."""
        best = self.best(task, "Hope", lines)
        name = f"Hope, {part}" if part else "Hope"
        return self.run(task, name, best.lr if best else self.rates[0])

    def ablations(self, tasks: Sequence[str], parts: Sequence[str], lines: Lines) -> list[Run]:
        """Hope with each of the parts changed, those that a goal looks at with every seed."""
        chosen = [(task, part) for task in tasks if task in ABLATED for part in parts]
        runs = [self.hope(task, part, lines) for task, part in chosen]
        beside = [
            self.hope(task, part, lines) for task, part in chosen if part in TASKS[task].beside
        ]
        return [*runs, *(again for run in beside for again in self.repeats(run))]

    def optimizers(self) -> list[Run]:
        """The default training run with every optimizer of the package, and three of torch's."""
        steps = self.steps or TrainConfig.steps
        ours = [
            name
            for name, cls in optimizers_by_name().items()
            if cls.__module__.startswith("deepopt.")
        ]
        rates = {"SGD": SGD_RATES, **dict.fromkeys(["AdamW", "Muon", *ours], (TrainConfig.lr,))}
        return [Run("bytes", "Hope", name, lr, 0, steps) for name in rates for lr in rates[name]]


def value(line: Line, metric: str) -> float:
    """A metric of a line; the worst possible value if its run was not finite."""
    task = TASKS[line["task"]]
    if "diverged" in line:
        return math.inf if task.smaller_is_better else 0.0
    found = line["metrics"][metric]
    return math.inf if math.isnan(found) and task.smaller_is_better else found


def badness(line: Line) -> float:
    """Orders the lines of a task from best to worst."""
    task = TASKS[line["task"]]
    found = value(line, task.metric)
    return found if task.smaller_is_better else -found
