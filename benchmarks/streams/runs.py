"""One run: a task learned by one optimizer."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepopt
from benchmarks.streams.tasks import TASKS, Task
from deepopt.hope.trainer import MAX_GRAD_NORM, lr_factor
from deepopt.memory import Covariance, Horizons, Memory

WARMUP_SHARE = 16
SIZE = 0.2
"""The update's root mean square, fixed: memories of different horizons then step equally far."""
AFTER = 10
"""Steps after a switch that count as such."""

MEMORIES: dict[str, Memory | str] = {
    "linear": "linear",
    "covariance": Covariance(power=0.4),
    "delta": "delta",
    "horizons": Horizons(),
}
TRAINED = Path(__file__).parents[2] / "docs/results/mlp-memory/phi.json"
"""What ``python -m deepopt.meta`` found."""


def memory(name: str) -> Memory | str:
    if name != "trained":
        return MEMORIES[name]
    found = json.loads(TRAINED.read_text())
    return Horizons(tuple(found["time_scales"]), found["phi"])


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    The optimizer is a name in ``MEMORIES``, "trained", "M3" or "AdamW".
    """

    task: str
    optimizer: str
    beta: float
    lr: float
    seed: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Run":
        return cls(**{field.name: line[field.name] for field in dataclasses.fields(cls)})


def build(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    groups = [dict(group) for group in deepopt.param_groups(model)]
    for group in groups:
        rate = TASKS[run.task].aux if group["path"] == "elementwise" else run.lr
        group.update(lr=rate, initial_lr=rate)
    betas = (run.beta, 0.99)
    if run.optimizer == "AdamW":
        return torch.optim.AdamW(
            [{key: group[key] for key in ("params", "lr", "initial_lr")} for group in groups],
            betas=betas,
        )
    if run.optimizer == "M3":
        return deepopt.M3(groups, betas=betas, update_rms=SIZE)
    return deepopt.DeepMomentum(groups, betas=betas, memory=memory(run.optimizer), update_rms=SIZE)


def execute(run: Run) -> dict[str, Any]:
    """Train, and return the run with what it reached."""
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = build(run, model)
    losses = train(task, model, optimizer, run.seed)
    line: dict[str, Any] = {**dataclasses.asdict(run), "torch": torch.__version__}
    if not math.isfinite(losses[-1]):
        return {**line, "diverged": len(losses)}
    if task.held_out:
        return {**line, "loss": round(task.held_out(model.eval()), 5)}
    half = range(task.steps // 2, task.steps)
    return {
        **line,
        "loss": round(statistics.fmean(losses[step] for step in half), 5),
        "after_switch": round(
            statistics.fmean(losses[step] for step in half if step % task.period < AFTER), 5
        ),
    }


def train(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
    """The loss on every batch before it is learned from; it ends where one is not finite."""
    losses: list[float] = []
    warmup = task.steps // WARMUP_SHARE
    for step in range(task.steps):
        factor = lr_factor(step, task.steps, warmup)
        if task.period:
            factor = min(1.0, (step + 1) / warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()
        loss = task.loss(model, task.data(seed, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    return losses
