"""W1: next byte of the standard library's sources, 2,048 bytes a batch: gradients are noise."""

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.transformer import Transformer, TransformerConfig


class Logits(nn.Module):
    """The small Transformer of the swap benchmark, tokens to logits."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens).logits


def data(seed: int, step: int) -> language.Text:
    return language.batch(32, 64, seed, step)


def model() -> nn.Module:
    return Logits(TransformerConfig(dim=64, layers=2))


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return language.held_out(model, 64)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=600,
    about="next byte of the Python standard library's sources, held-out files, a Transformer of "
    "width 64 with two layers and a zero head, batches of 32 x 64 bytes",
    sha256=lambda: language.corpus().sha256,
)
