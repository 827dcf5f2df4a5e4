"""Tumors by 30 measurements, malignant or benign, an MLP."""

from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload


def data(seed: int, step: int) -> datasets.Part:
    return datasets.breast_cancer().batch(32, seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return datasets.classification_metrics(model, datasets.breast_cancer().val)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    seeds=10,
    about="scikit-learn's 569 tumors, an MLP 30-64-64-2, batches of 32",
    sha256=lambda: datasets.breast_cancer().sha256,
)
