"""Class-incremental digits: six are known, four more come two by two. What becomes of the six?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.hope import online
from benchmarks.hope.task import Batch, Goal, Task, generator, right
from benchmarks.quality import datasets
from benchmarks.quality.workload import Unavailable
from deepopt.hope import HopeConfig, adaptation
from deepopt.hope.model import IGNORED
from deepopt.hope.reader import deep_momentum

ASK = 17
"""The token after 64 pixels of 0 to 16, at which the digit is predicted; digits follow it."""
KNOWN, LATER = range(6), (range(6, 8), range(8, 10))

SIZES = HopeConfig(vocab_size=28, dim=64, layers=2, heads=2)


class Learned(NamedTuple):
    """Shares of right answers after the later digits came."""

    online: float
    known: float
    later: float


def texts(part: datasets.Part, classes: range) -> Batch:
    """The images of some digits as texts, in the order of the data."""
    rows = torch.isin(part.targets, torch.tensor(list(classes)))
    pixels = (part.inputs[rows] * 16).round().long()
    text = F.pad(pixels, (0, 1), value=ASK)
    targets = torch.full_like(text, IGNORED)
    targets[:, -1] = ASK + 1 + part.targets[rows]
    return Batch(text, targets)


def levels_and_head(model: nn.Module) -> set[nn.Parameter]:
    return online.level_parameters(model) | set(model.get_submodule("head").parameters())


@dataclass(frozen=True)
class Digits(Task):
    """Six digits are trained as all tasks are; the others are seen once, two by two.

    They come `seen` images at a time.
    """

    steps: int = 200
    tokens: int = 65
    batch: int = 32
    seen: int = 4
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    sizes: HopeConfig = SIZES
    metric: str = "known"
    goals: tuple[Goal, ...] = (online.SAVED,)

    @property
    def unavailable(self) -> str:
        try:
            datasets.digits()
        except Unavailable as missing:
            return str(missing)
        return ""

    @property
    def about(self) -> str:
        return (
            "scikit-learn's digits as texts of 64 pixels. Six digits are trained; then 6 and 7, "
            f"then 8 and 9 are seen once, in batches of {self.seen}, each predicted before it is "
            "learned from. *Known*: share of right answers on the six before the others come; "
            "*later*: on the other four afterwards; *forgotten*: by how much the share on the six "
            "has fallen. *Levels* and *all weights* are as in the task continual, except that the "
            "head learns with the levels: before a digit is seen, its row there is that of any "
            "other token. Each way has the rate, out of "
            f"{', '.join(f'{lr:g}' for lr in self.rates)}, that predicts the later digits best "
            "while they come."
        )

    def data(self, seed: int, step: int) -> Batch:
        known = texts(datasets.digits().train, KNOWN)
        rows = torch.randint(len(known.tokens), (self.batch,), generator=generator(seed, step))
        return Batch(known.tokens[rows], known.targets[rows])

    def metrics(self, model: nn.Module) -> dict[str, float]:
        before = self._right(model, KNOWN)
        found = {"known": before}
        ways = {
            "levels": (levels_and_head, deep_momentum),
            "all_weights": (online.all_parameters, online.adamw),
        }
        for name, (chosen, optimizer) in ways.items():
            learned = {lr: self._learn(model, chosen, optimizer(lr)) for lr in self.rates}
            rate = max(learned, key=lambda lr: learned[lr].online)
            found[f"later_{name}"] = learned[rate].later
            found[f"forgotten_{name}"] = before - learned[rate].known
            found[f"rate_{name}"] = rate
        return found

    @property
    def batches(self) -> str:
        return f"{self.batch} x {self.tokens}, then {self.seen} x {self.tokens}, rates {self.rates}"

    def _stream(self) -> Iterator[Batch]:
        for classes in LATER:
            whole = texts(datasets.digits().train, classes)
            for parts in zip(*(x.split(self.seen) for x in whole), strict=True):
                yield Batch(*parts)

    def _learn(
        self,
        model: nn.Module,
        chosen: Callable[[nn.Module], set[nn.Parameter]],
        optimizer: online.MakeOptimizer,
    ) -> Learned:
        with adaptation(model):
            stepped = online.optimizer_of(model, chosen(model), optimizer, self.seen * self.tokens)
            answers = []
            for batch in self._stream():
                logits = model(batch.tokens).logits[:, -1]
                targets = batch.targets[:, -1]
                answers.append((logits.argmax(-1) == targets).double())
                model.zero_grad()
                F.cross_entropy(logits, targets).backward()
                stepped.step()
            later = range(LATER[0].start, LATER[-1].stop)
            return Learned(
                torch.cat(answers).mean().item(),
                self._right(model, KNOWN),
                self._right(model, later),
            )

    def _right(self, model: nn.Module, classes: range) -> float:
        batch = texts(datasets.digits().val, classes)
        return right(model, batch)[:, -1].double().mean().item()
