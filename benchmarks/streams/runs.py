"""One run: a task learned by one optimizer."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepopt
from benchmarks.streams.oracle import Oracle
from benchmarks.streams.tasks import TASKS, Task
from deepopt.hope.optimizers import MAX_GRAD_NORM, lr_factor
from deepopt.memory import AnyMemory, Covariance, Horizons
from deepopt.memory.horizons import HAND_MADE
from deepopt.meta.evolution import SEARCHED
from deepopt.meta.gains import Gains, with_gains

WARMUP_SHARE = 16
SIZE = 0.2
"""Root mean square of an update. It is fixed, so that all memories take steps of the same size."""
OWN_SIZE = ", own size"
"""How names end whose updates have the size that DeepMomentum gives them by default."""
REST_BETA = 0.9
"""AdamW's first beta for heads, embeddings and vectors, whatever memory the matrices have."""
SLOW = 4
"""Steps of a chunk of the slower level, where there are two."""
AFTER = 10
"""Number of steps that count as right after a switch, and as right before one."""
RELEARNED = 5
"""Number of consecutive losses whose mean decides whether a regime is relearned."""
CLOSE = 1.1
"""A regime counts as relearned at this multiple of the loss that it was left with."""

MEMORIES: dict[str, AnyMemory | str] = {
    "linear": "linear",
    "covariance": Covariance(power=0.4),
    "delta": "delta",
    "mlp": "mlp",
    "closed form": Horizons(phi=HAND_MADE),
}
ORACLES = ("told the regime", "told the regime and step")
"""Memories that know what others have to see in the gradients, on streams alone."""
FOUND = Path(__file__).parents[2] / "docs/results/mlp-memory"
"""What ``python -m deepopt.meta`` found, in folders."""


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    The optimizer is a name in ``MEMORIES``, with or without ``OWN_SIZE``, or in ``ORACLES``,
    "trained NAME" (a folder of ``FOUND``), "M3", "Continuum" or "AdamW".
    """

    task: str
    optimizer: str
    beta: float
    lr: float
    seed: int

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Run":
        return cls(**{field.name: line[field.name] for field in dataclasses.fields(cls)})


def memory(run: Run) -> AnyMemory | Gains | str:
    """The memory of a run, or the gains that the linear memory's updates get."""
    name, task = run.optimizer, TASKS[run.task]
    if name in ORACLES:
        return Oracle(task.period, task.regimes, by_step=name == ORACLES[1])
    if not name.startswith("trained "):
        return MEMORIES[name.removesuffix(OWN_SIZE)]
    found = json.loads((FOUND / name.removeprefix("trained ") / "phi.json").read_text())
    return SEARCHED[found["memory"]].make(tuple(found["time_scales"]), found["phi"])


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
    if run.optimizer == "Continuum":
        levels = [part for group in groups for part in by_frequency(group)]
        return deepopt.Continuum(deepopt.DeepMomentum(levels, memory="linear", update_rms=SIZE))
    size = None if run.optimizer.endswith(OWN_SIZE) else SIZE
    made = memory(run)
    if isinstance(made, Gains):
        return with_gains(made)(groups, memory="linear", update_rms=size)
    return deepopt.DeepMomentum(groups, memory=made, update_rms=size)


def by_frequency(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of matrices as two: those nearer to the input learn at every fourth step."""
    if group["path"] == "elementwise":
        return [group]
    middle = len(group["params"]) // 2
    parts = [(SLOW, slice(middle)), (1, slice(middle, None))]
    listed = [key for key, value in group.items() if isinstance(value, list)]
    return [{**group, "chunk": c, **{key: group[key][part] for key in listed}} for c, part in parts]


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
    measured = {
        "loss": statistics.fmean(losses[step] for step in half),
        "after_switch": statistics.fmean(losses[x] for x in half if x % task.period < AFTER),
        **returned(task, losses),
    }
    return {**line, **{name: round(value, 5) for name, value in measured.items()}}


def returned(task: Task, losses: Sequence[float]) -> dict[str, float]:
    """How much is lost between two visits of a regime, over the second half's returns.

    ``forgotten`` is the loss on the first batch minus that on the last ten of the visit before.
    ``relearned`` counts steps from there on until the mean of five losses is within a tenth of what
    it was; a regime that is not relearned while its visit lasts counts with the whole visit.
    """
    forgotten, relearned = [], []
    for start in range(0, task.steps, task.period):
        last_end = start - task.period * (task.regimes - 1)  # of the same regime's visit before
        if start < task.steps // 2 or last_end <= 0:
            continue
        before = statistics.fmean(losses[max(0, last_end - AFTER) : last_end])
        visit = losses[start : start + task.period]
        relearned_at = (
            x
            for x in range(len(visit) - RELEARNED + 1)
            if statistics.fmean(visit[x : x + RELEARNED]) <= CLOSE * before
        )
        forgotten.append(visit[0] - before)
        relearned.append(next(relearned_at, len(visit)))
    if not forgotten:
        return {}
    return {"forgotten": statistics.fmean(forgotten), "relearned": statistics.fmean(relearned)}


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
