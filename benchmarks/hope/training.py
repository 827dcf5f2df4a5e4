"""One training run of one model on one task, for all models and tasks the same."""

import dataclasses
import platform
import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.hope import models
from benchmarks.hope.bytes import Bytes
from benchmarks.hope.continual import Continual
from benchmarks.hope.digits import Digits
from benchmarks.hope.formal import LANGUAGES, STEPS, Formal
from benchmarks.hope.mad import KINDS, Mad
from benchmarks.hope.passkey import Passkey
from benchmarks.hope.reading import Reading
from benchmarks.hope.recall import Recall
from benchmarks.hope.task import Task
from benchmarks.runs import Line
from deepopt.hope.optimizers import build_optimizers, clipped, lr_factor, prepare
from deepopt.memory import resolve
from deepopt.ops.orthogonal_update import LEAST_SIZE, MOST_ENLARGED

TASKS: dict[str, Task] = {
    "bytes": Bytes(),
    "recall": Recall(),
    **{name: Formal(name, STEPS.get(name, Formal.steps)) for name in LANGUAGES},
    "reading": Reading(),
    "continual": Continual(),
    "digits": Digits(),
    "passkey": Passkey(),
    **{kind: Mad(kind) for kind in KINDS},
}
WARMUP = 50
MEMORY = "delta"
"""Every run of DeepMomentum has this memory."""


@dataclass(frozen=True)
class Run:
    """What tells one run from another."""

    task: str
    model: str
    optimizer: str
    lr: float
    seed: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.task}, {self.model}, {self.optimizer}, lr {self.lr:g}, seed {self.seed}, "
            f"{self.steps} steps"
        )


def setting(run: Run) -> Line:
    """What the outcome of a run depends on besides the run itself and the code."""
    return {
        **TASKS[run.task].setting(run.model),
        "weight_decay": TASKS[run.task].weight_decay,
        "warmup": WARMUP,
        "least_size": f"{LEAST_SIZE:g}, enlarged at most {MOST_ENLARGED:g} times",
        "memory": str(resolve(MEMORY)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def execute(run: Run) -> Line:
    """Train and measure; the run with its setting and its outcome."""
    task = TASKS[run.task]
    torch.manual_seed(run.seed)
    model = task.model(run.model)
    began = time.process_time()
    try:
        losses = train(task, model, run)
        outcome: Line = {"train_loss": statistics.fmean(losses[-max(1, run.steps // 10) :])}
        outcome["train_cpu_seconds"] = round(time.process_time() - began, 1)
        outcome["metrics"] = task.metrics(model)
    except FloatingPointError as error:
        outcome = {"diverged": str(error)}
    return {
        **dataclasses.asdict(run),
        **setting(run),
        "parameters": models.parameters(model),
        **outcome,
    }


def train(task: Task, model: nn.Module, run: Run) -> list[float]:
    """Losses of all steps, as `deepopt.hope.trainer.Trainer` takes them.

    Raises:
        FloatingPointError: a loss or the norm of a gradient is not finite.
    """
    tokens = task.data(run.seed, 0).tokens.numel()  # the same number at every step
    memory = MEMORY if run.optimizer == "DeepMomentum" else None
    optimizers = build_optimizers(model, run.optimizer, run.lr, task.weight_decay, memory, tokens)
    losses = []
    for step in range(run.steps):
        prepare(optimizers, lr_factor(step, run.steps, min(WARMUP, run.steps // 2)))
        loss = model(*task.data(run.seed, step)).loss
        loss.backward()
        with clipped(optimizers, model) as norm:
            if not torch.isfinite(loss + norm):
                raise FloatingPointError(f"not finite after {step} steps")
            for optimizer in optimizers:
                optimizer.optimizer.step()
        losses.append(loss.item())
    return losses
