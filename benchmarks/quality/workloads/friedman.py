"""Regression on Friedman's first function: ten inputs, five of which count."""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import datasets
from benchmarks.quality.workload import digest, workload

NOISE = 1.0


@functools.cache
def examples() -> datasets.Dataset:
    """2,000 points in the unit cube; outputs standardized, by fixed numbers near their own."""
    random = datasets.generator(0, 0)
    x = torch.rand(2000, 10, generator=random)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5).square()
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + NOISE * torch.randn(2000, generator=random)
    x, y = (x - 0.5) * 12**0.5, (y[:, None] - 14.4) / 5
    return datasets.split(x, y, digest([x, y]))


def data(seed: int, step: int) -> datasets.Part:
    return examples().batch(64, seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return F.mse_loss(model(batch.inputs), batch.targets)


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    return {"val_loss": loss(model, examples().val).item()}


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=300,
    seeds=10,
    about="Friedman's first function with noise, 2,000 points, an MLP 10-64-64-1, batches of 64; "
    "squared error of the standardized output, of which the noise is 0.04",
    sha256=lambda: examples().sha256,
)
