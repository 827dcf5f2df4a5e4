"""W10, locked: tumors and wines by their measurements, an MLP for each, learned side by side."""

import statistics
from typing import NamedTuple

from torch import Tensor, nn

from benchmarks.quality import datasets
from benchmarks.quality.workload import workload


class Both(NamedTuple):
    tumors: datasets.Part
    wines: datasets.Part


class MLPs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tumors, self.wines = (
            nn.Sequential(
                nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, kinds)
            )
            for inputs, kinds in ((30, 2), (13, 3))
        )


def data(seed: int, step: int) -> Both:
    return Both(
        *(found.batch(32, seed, step) for found in (datasets.breast_cancer(), datasets.wine()))
    )


def model() -> nn.Module:
    return MLPs()


def loss(model: nn.Module, batch: Both) -> Tensor:
    return sum(
        (
            datasets.classification_loss(model.get_submodule(name), part)
            for name, part in batch._asdict().items()
        ),
        start=Tensor([0.0]).squeeze(),
    )


def metrics(model: nn.Module) -> dict[str, float]:
    held_out = {"tumors": datasets.breast_cancer().val, "wines": datasets.wine().val}
    found = {
        name: datasets.classification_metrics(model.get_submodule(name), part)
        for name, part in held_out.items()
    }
    return {
        "val_loss": statistics.fmean(each["val_loss"] for each in found.values()),
        **{f"{name}_error": each["val_error"] for name, each in found.items()},
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    seeds=10,
    about="scikit-learn's 569 tumors and 178 wines, MLPs 30-64-64-2 and 13-64-64-3 learned side by "
    "side, batches of 32 of each; val_loss is the mean of the two",
    sha256=lambda: datasets.digest_of(datasets.breast_cancer(), datasets.wine()),
)
