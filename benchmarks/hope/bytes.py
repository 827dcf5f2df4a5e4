"""Next byte of the Python standard library's sources, and reading on beyond the trained length."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.hope.task import Batch, Goal, Task
from benchmarks.quality.language import corpus, mean_loss
from deepopt.data import evaluation_batches, sample_batch
from deepopt.hope import HopeConfig

SIZES = HopeConfig()
BITS = "bits_per_byte"
FROZEN = "memories frozen"
GOALS = (
    Goal(
        "bits per byte / gated DeltaNet's",
        lambda mean: mean("Hope", BITS) / mean("gated DeltaNet", BITS),
        0.99,
        at_least=False,
    ),
    Goal(
        "bits per byte that learning memories are worth",
        lambda mean: mean(f"Hope, {FROZEN}", BITS) - mean("Hope", BITS),
        0.15,
    ),
    Goal(
        "16 x the trained length: bits per byte, state carried on minus resets",
        lambda mean: mean("Hope", "carried_on") - mean("Hope", "with_resets"),
        0.0,
        at_least=False,
    ),
)


@dataclass(frozen=True)
class Bytes(Task):
    """The default training run, read at its own length and at texts `longer` times as long.

    Long texts are read twice: in one call, through which a state is carried on, and in pieces of
    the trained length, each from the initial state.
    """

    steps: int = 400
    tokens: int = 256
    batch: int = 8
    windows: int = 128
    longer: int = 16
    texts: int = 16
    sizes: HopeConfig = SIZES
    metric: str = BITS
    smaller_is_better: bool = True
    goals: tuple[Goal, ...] = GOALS
    beside: tuple[str, ...] = (FROZEN,)

    @property
    def about(self) -> str:
        return (
            "Next byte of the sources of Python's standard library, held-out files. *Carried on*: "
            f"texts of {self.longer} times the trained length in one go; *with resets*: the same "
            "texts in pieces of the trained length, each from the start."
        )

    def data(self, seed: int, step: int) -> Batch:
        return Batch(*sample_batch(corpus().train, self.batch, self.tokens, seed, step))

    @torch.no_grad()
    def metrics(self, model: nn.Module) -> dict[str, float]:
        short = evaluation_batches(corpus().val, self.batch, self.tokens, self.windows)
        long = evaluation_batches(corpus().val, 2, self.longer * self.tokens, self.texts)
        texts = [Batch(*batch) for batch in long]
        pieces = [Batch(*(x.reshape(-1, self.tokens) for x in text)) for text in texts]
        return {
            BITS: bits(model, [Batch(*batch) for batch in short]),
            "carried_on": bits(model, texts),
            "with_resets": bits(model, pieces),
        }

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {self.windows} windows, "
            f"{self.texts} texts x {self.longer}"
        )

    def setting(self, name: str) -> Mapping[str, object]:
        return {**super().setting(name), "data_sha256": corpus().sha256}


def bits(model: nn.Module, batches: list[Batch]) -> float:
    """Mean bits per byte."""
    found = mean_loss(model, batches, lambda model, batch: model(*batch).loss)
    return found["val_loss"] / math.log(2)
