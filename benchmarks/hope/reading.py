"""Learning while reading: is a file easier to predict once its first half was learned from?"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.hope import online
from benchmarks.hope.bytes import SIZES, Bytes
from benchmarks.hope.task import Goal
from benchmarks.quality.language import corpus
from deepopt.hope import HopeConfig, adaptation
from deepopt.hope.reader import deep_momentum

GOALS = (Goal("bits per byte that adapt is worth", lambda mean: mean("Hope", "worth"), 0.05),)


@functools.cache
def files(length: int) -> list[Tensor]:
    """The first `length` bytes of every held-out file that long, except character tables."""
    found, at = [], 0
    for name, size in corpus().held_out.items():
        if size >= length and not name.startswith("encodings/"):
            found.append(corpus().val[at : at + length].long()[None])
        at += size
    return found


@dataclass(frozen=True)
class Reading(Bytes):
    """The training run of `Bytes`; what is measured is the second half of files it has not seen.

    Every file is read on its own, by the weights as they were trained. With `adapt` its levels
    learn from the file alone while it is read. Every second file helps to choose the rate for that;
    the others are measured.
    """

    length: int = 8192
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    sizes: HopeConfig = SIZES
    metric: str = "adapted"
    goals: tuple[Goal, ...] = GOALS

    @property
    def about(self) -> str:
        return (
            "Bits per byte of the second half of held-out files of the standard library, each of "
            f"{self.length:,} bytes, without those of `encodings`, which are tables. *Adapted*: "
            "the CMS levels of a Hope, or the MLPs of a baseline made levels, learn from the file "
            "while it is read, by DeepMomentum; *frozen*: nothing learns; *worth*: the "
            "difference. The rate of learning, out of "
            f"{', '.join(f'{lr:g}' for lr in self.rates)}, is the best on every other file; the "
            "rest is measured. Training is that of the task bytes."
        )

    def metrics(self, model: nn.Module) -> dict[str, float]:
        texts = files(self.length)
        choosing, measured = texts[0::2], texts[1::2]
        rate = min(self.rates, key=lambda lr: adapted(model, choosing, lr))
        with_adapt, without = adapted(model, measured, rate), frozen(model, measured)
        return {
            "adapted": with_adapt,
            "frozen": without,
            "worth": without - with_adapt,
            "rate": rate,
        }

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {len(files(self.length))} files x {self.length}, "
            f"rates {self.rates}"
        )


def adapted(model: nn.Module, texts: Sequence[Tensor], lr: float) -> float:
    """Bits per byte of the second halves, with levels that learn from their own text alone."""
    found = []
    for text in texts:
        with adaptation(model):
            found.append(online.by_levels(model, text, deep_momentum(lr)))
    return second_halves(found)


def frozen(model: nn.Module, texts: Sequence[Tensor]) -> float:
    """Bits per byte of the second halves, without learning."""
    return second_halves([online.frozen(model, text) for text in texts])


def second_halves(losses: Sequence[Tensor]) -> float:
    """Mean in bits over texts of one length."""
    return online.second_half(torch.cat(list(losses)))
