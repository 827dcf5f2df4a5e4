"""Next byte, a recurrent network of one LSTM layer."""

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload


class Recurrent(nn.Module):
    def __init__(self, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.lstm = nn.LSTM(dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def data(seed: int, step: int) -> language.Text:
    return language.batch(16, 64, seed, step)


def model() -> nn.Module:
    return Recurrent()


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return language.held_out(model, 64)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    about="next byte of the standard library's sources, an LSTM of width 128, batches of 16 x 64",
    sha256=lambda: language.corpus().sha256,
)
