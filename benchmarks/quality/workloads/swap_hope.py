"""The default training run: Hope on the sources of the standard library."""

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import swap_transformer
from deepopt.hope import Hope, HopeConfig


def data(seed: int, step: int) -> language.Text:
    return swap_transformer.data(seed, step)


def model() -> nn.Module:
    return Hope(HopeConfig())


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return swap_transformer.loss(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return swap_transformer.metrics(model)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=800,
    about="next byte of the standard library's sources, held-out files, Hope of width 128 with two "
    "layers, batches of 8 x 256 bytes",
    sha256=lambda: language.corpus().sha256,
)
