"""W6: digits whose pixels change their places after every pass, without announcement.

Rates fall to zero over a run, as in every workload, and the last tasks with them: their loss tells
optimizers apart, and is no measure of how much of the ability to learn a run has used up.
"""

import functools
import statistics

import torch
from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.online import Online, kept, losses
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import digits_mlp

BATCH, TASK = 16, 89
"""Digits of a step, and steps of a pass over the training part."""
TASKS = 25
ENDS = 5
"""Tasks that the losses of the beginning and of the end of a run are means of."""


@functools.cache
def places(task: int) -> Tensor:
    """The order of the pixels in a task, the same for every seed."""
    return torch.randperm(64, generator=datasets.generator(0, -2 - task))


def data(seed: int, step: int) -> datasets.Part:
    inputs, targets = datasets.digits().batch(BATCH, seed, step)
    return datasets.Part(inputs[:, places(step // TASK)], targets)


def model() -> nn.Module:
    return Online(digits_mlp.model())


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return kept(model, datasets.classification_loss(model, batch))


def metrics(model: nn.Module) -> dict[str, float]:
    inputs, targets = datasets.digits().val
    online = losses(model)
    tasks = [statistics.fmean(online[i : i + TASK]) for i in range(0, len(online), TASK)]
    errors = [
        datasets.classification_metrics(model, datasets.Part(inputs[:, places(i)], targets))
        for i in range(len(tasks))
    ]
    return {
        "val_loss": statistics.fmean(online),
        "first_tasks_loss": statistics.fmean(tasks[:ENDS]),
        "last_tasks_loss": statistics.fmean(tasks[-ENDS:]),
        "last_task_error": errors[-1]["val_error"],
        "all_tasks_error": statistics.fmean(error["val_error"] for error in errors),
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=TASK * TASKS,
    about="25 passes over scikit-learn's digits, each with its own order of the pixels, an MLP "
    "64-256-256-10, batches of 16; val_loss is the mean over the steps of the loss of the batch "
    "that comes next",
    sha256=lambda: datasets.digits().sha256,
)
