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
from deepopt.memory import AnyMemory, Covariance, Horizons
from deepopt.memory.horizons import HAND_MADE

WARMUP_SHARE = 16
SIZE = 0.2
"""The update's root mean square. It is fixed, so that memories of all horizons step equally far."""
REST_BETA = 0.9
"""AdamW's first beta for heads, embeddings and vectors, whatever memory the matrices have."""
AFTER = 10
"""Steps that count as those right after a switch."""

MEMORIES: dict[str, AnyMemory | str] = {
    "linear": "linear",
    "covariance": Covariance(power=0.4),
    "delta": "delta",
    "mlp": "mlp",
    "closed form": Horizons(phi=HAND_MADE),
}
FOUND = Path(__file__).parents[2] / "docs/results/mlp-memory"
"""What ``python -m deepopt.meta`` found, in folders by the retention of the short average."""


def memory(name: str) -> AnyMemory | str:
    if not name.startswith("trained "):
        return MEMORIES[name]
    found = json.loads((FOUND / name.removeprefix("trained ") / "phi.json").read_text())
    return Horizons(tuple(found["time_scales"]), found["phi"])


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    The optimizer is a name in ``MEMORIES``, "trained 0.5", "M3", "AdamW" or the like.
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
        beta = REST_BETA if group["path"] == "elementwise" else run.beta
        group.update(lr=rate, initial_lr=rate, betas=(beta, 0.99))
    if run.optimizer == "AdamW":
        known = ("params", "lr", "initial_lr", "betas")
        return torch.optim.AdamW([{key: group[key] for key in known} for group in groups])
    if run.optimizer == "M3":
        return deepopt.M3(groups, update_rms=SIZE)
    return deepopt.DeepMomentum(groups, memory=memory(run.optimizer), update_rms=SIZE)


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
