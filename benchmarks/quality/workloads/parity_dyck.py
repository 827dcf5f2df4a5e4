"""W11, locked: parity and Dyck-1 on words of 40 letters, read on words four times as long."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hope.formal import LANGUAGES
from benchmarks.hope.task import Batch
from benchmarks.quality.datasets import generator
from benchmarks.quality.workload import HELD_OUT, workload
from benchmarks.quality.workloads.lstm import Recurrent

LENGTH, LONGER, WORDS = 40, 4, 32


def words(length: int, random: torch.Generator) -> Batch:
    """Words of parity, in letters and answers 0 and 1, then words of Dyck-1, in 2 and 3."""
    parity, dyck = (LANGUAGES[name](WORDS, length, random) for name in ("parity", "dyck1"))
    return Batch(*(torch.cat([a, b + 2]) for a, b in zip(parity, dyck, strict=True)))


def data(seed: int, step: int) -> Batch:
    return words(LENGTH, generator(seed, step))


def model() -> nn.Module:
    return Recurrent(dim=32, hidden=64)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten())


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    batches = [words(LONGER * LENGTH, generator(HELD_OUT, step)) for step in range(4)]
    logits = torch.cat([model(batch.tokens) for batch in batches])[:, LENGTH:].flatten(0, 1)
    targets = torch.cat([batch.targets for batch in batches])[:, LENGTH:].flatten()
    return {
        "val_loss": F.cross_entropy(logits, targets).item(),
        "val_error": (logits.argmax(-1) != targets).float().mean().item(),
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=600,
    about="states of parity and Dyck-1 after every letter, an LSTM of width 64, batches of 64 "
    "words of 40 letters; val_loss and val_error are those of letters 41 to 160",
)
