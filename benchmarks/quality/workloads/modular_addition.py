"""W9, locked: a + b modulo 97 from half of the pairs, and late the other half (grokking)."""

import functools

import torch
from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import digest, workload

MODULUS = 97


@functools.cache
def pairs() -> datasets.Dataset:
    """All pairs (n, 2) int64 and their sums, half of them held out."""
    every = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
    order = torch.randperm(len(every), generator=datasets.generator(0, -1))
    train, val = (datasets.Part(x, x.sum(1) % MODULUS) for x in every[order].tensor_split(2))
    return datasets.Dataset(train, val, digest([train, val]))


def data(seed: int, step: int) -> datasets.Part:
    return pairs().batch(512, seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(MODULUS, 64),
        nn.Flatten(),
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, MODULUS),
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return datasets.classification_metrics(model, pairs().val)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=2000,
    about="a + b modulo 97 from half of the pairs, an embedding and an MLP 128-256-97, batches of "
    "512",
    sha256=lambda: pairs().sha256,
)
