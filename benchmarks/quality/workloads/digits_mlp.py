"""Handwritten digits of 8 x 8 pixels, an MLP."""

from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload


def data(seed: int, step: int) -> datasets.Part:
    return datasets.digits().batch(64, seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return datasets.classification_metrics(model, datasets.digits().val)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=300,
    seeds=5,
    about="scikit-learn's 1,797 digits, an MLP 64-256-256-10, batches of 64",
    sha256=lambda: datasets.digits().sha256,
)
