"""Continual learning: code, then English, then code. What is learned, and what is forgotten?"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.hope import online
from benchmarks.hope.bytes import SIZES, Bytes, bits
from benchmarks.hope.task import Batch, Goal
from benchmarks.quality.language import corpus
from deepopt.data import evaluation_batches, sample_batch
from deepopt.hope import HopeConfig, adaptation
from deepopt.hope.reader import deep_momentum


@functools.cache
def english() -> Tensor:
    """The help pages of Python's own manual, which every installation has: English prose."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return torch.tensor(list("\n\n".join(topics.values()).encode()))


@functools.cache
def code() -> Tensor:
    """The training part of the standard library without the file that has those pages."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None
    assert spec.origin is not None
    content = bytes(corpus().train.tolist()).replace(Path(spec.origin).read_bytes(), b"")
    return torch.tensor(list(content), dtype=torch.uint8)


class Learned(NamedTuple):
    """What a stream of English did to a model of code, in bits per byte.

    Attributes:
        english: bits of the second half of the stream, while it is read.
        after: bits of held-out code after it.
        again: bits of held-out code after some more code was read.
    """

    english: float
    after: float
    again: float


@dataclass(frozen=True)
class Continual(Bytes):
    """Training on code; then a stream of English and one of code, read once each and learned from.

    A stream is `texts` texts side by side, of `length` bytes each.
    """

    steps: int = 200
    windows: int = 64
    texts: int = 4
    length: int = 8192
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    sizes: HopeConfig = SIZES
    metric: str = "code"
    goals: tuple[Goal, ...] = (online.SAVED,)

    @property
    def about(self) -> str:
        return (
            "Trained on the standard library's code, then a stream of English (Python's help "
            f"pages, {self.texts} x {self.length:,} bytes) and one of held-out code are read once, "
            "each window predicted before it is learned from. *Levels*: the CMS levels of a Hope, "
            "or the MLPs of a baseline made levels, learn by DeepMomentum, the rest is frozen; "
            "*all weights*: everything learns, by AdamW; *frozen*: nothing does. *Code*: bits per "
            "byte of held-out code before the streams; *english*: of the second half of the "
            "English stream; *forgotten*: what code has lost after it; *left*: what of that is "
            "still lost after the stream of code. Each way of learning has the rate, out of "
            f"{', '.join(f'{lr:g}' for lr in self.rates)}, that predicts English best."
        )

    def data(self, seed: int, step: int) -> Batch:
        return Batch(*sample_batch(code(), self.batch, self.tokens, seed, step))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        before = self._code(model)
        found = {
            "code": before,
            "english_frozen": online.second_half(online.frozen(model, self._english)),
        }
        ways = {
            "levels": (online.by_levels, deep_momentum),
            "all_weights": (online.by_all_weights, online.adamw),
        }
        for name, (read, optimizer) in ways.items():
            learned = {lr: self._learn(model, read, optimizer(lr)) for lr in self.rates}
            rate = min(learned, key=lambda lr: learned[lr].english)
            best = learned[rate]
            found[f"english_{name}"] = best.english
            found[f"forgotten_{name}"] = best.after - before
            found[f"left_{name}"] = best.again - before
            found[f"rate_{name}"] = rate
        return found

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {self.windows} windows, streams of {self.texts} x "
            f"{self.length}, rates {self.rates}"
        )

    def _learn(
        self,
        model: nn.Module,
        read: Callable[[nn.Module, Tensor, online.MakeOptimizer], Tensor],
        optimizer: online.MakeOptimizer,
    ) -> Learned:
        with adaptation(model):
            losses = read(model, self._english, optimizer)
            after = self._code(model)
            read(model, self._more_code, optimizer)
            return Learned(online.second_half(losses), after, self._code(model))

    @property
    def _english(self) -> Tensor:
        return english()[: self.texts * self.length].view(self.texts, self.length)

    @property
    def _more_code(self) -> Tensor:
        """Windows of the second half of the held-out code; `_code` measures the first half."""
        held_out = corpus().val[len(corpus().val) // 2 :].long()
        return held_out[: self.texts * self.length].view(self.texts, self.length)

    @torch.no_grad()
    def _code(self, model: nn.Module) -> float:
        half = corpus().val[: len(corpus().val) // 2]
        windows = evaluation_batches(half, self.batch, self.tokens, self.windows)
        return bits(model, [Batch(*batch) for batch in windows])
