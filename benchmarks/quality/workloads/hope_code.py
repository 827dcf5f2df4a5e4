"""W1's bytes, read by a small Hope: self-modifying memories and levels of MLPs."""

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.quality.workloads import lm_code
from deepopt.hope import Hope, HopeConfig


class Logits(nn.Module):
    """Hope, tokens to logits."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.hope = Hope(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.hope(tokens).logits


def data(seed: int, step: int) -> language.Text:
    return lm_code.data(seed, step)


def model() -> nn.Module:
    return Logits(HopeConfig(dim=64, layers=2, heads=2))


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return lm_code.metrics(model)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    about="next byte of the Python standard library's sources, held-out files, Hope of width 64 "
    "with two layers and two heads, all levels at every step, batches of 32 x 64 bytes",
    sha256=lambda: language.corpus().sha256,
)
