"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): keys, values, questions.

A text begins with pairs of a key and its value. Later every key appears once more, at a random
place, and there its value is to be predicted; all other tokens are 0. Keys are tokens of the lower
half of the vocabulary, values of the upper half, and both are drawn anew for every text.
"""

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.hope.task import Batch, Goal, Task, generator, right, shrunk
from deepopt.hope import HopeConfig
from deepopt.hope.model import IGNORED


def texts(batch: int, tokens: int, pairs: int, vocabulary: int, random: torch.Generator) -> Batch:
    """Texts (batch, tokens) with `pairs` pairs of a key and its value."""
    half, rest = vocabulary // 2, tokens - 2 * pairs
    keys = 1 + torch.rand(batch, half - 1, generator=random).argsort(1)[:, :pairs]
    values = torch.randint(half, vocabulary, (batch, pairs), generator=random)
    places = 2 * pairs + torch.rand(batch, rest, generator=random).argsort(1)[:, :pairs]
    text = torch.zeros(batch, tokens, dtype=torch.long)
    text[:, 0 : 2 * pairs : 2], text[:, 1 : 2 * pairs : 2] = keys, values
    targets = torch.full_like(text, IGNORED)
    return Batch(text.scatter(1, places, keys), targets.scatter(1, places, values))


SIZES = HopeConfig(vocab_size=256, dim=64, layers=2, heads=2)
GOALS = (Goal("accuracy", lambda mean: mean("Hope", "accuracy"), 0.99),)


@dataclass(frozen=True)
class Recall(Task):
    """Recall of `pairs` pairs within `tokens` tokens.

    Texts grow, as lessons do: an eighth of the pairs within an eighth of the tokens, in eight times
    as many texts, until the first step of `grows`; then a fourth, a half, and all from the last one
    on. From long texts alone no model learned to recall within a thousand steps.
    """

    steps: int = 1500
    tokens: int = 256
    pairs: int = 32
    batch: int = 4
    grows: tuple[int, int, int] = (400, 600, 800)
    texts: int = 128
    sizes: HopeConfig = SIZES
    metric: str = "accuracy"
    goals: tuple[Goal, ...] = GOALS

    @property
    def about(self) -> str:
        return (
            f"{self.pairs} pairs of key and value, then every key once more, within {self.tokens} "
            f"tokens out of {self.sizes.vocab_size}. *Accuracy*: share of the keys whose value is "
            f"predicted; a guess is right once in {self.sizes.vocab_size // 2}. Training starts "
            "with an eighth of the pairs within an eighth of the tokens, in eight times as many "
            f"texts, and doubles both at steps {', '.join(map(str, self.grows))}."
        )

    def data(self, seed: int, step: int) -> Batch:
        return self._texts(self.batch, generator(seed, step), shrunk(step, self.grows))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        batch = self._texts(self.texts, generator("held out", self.tokens), 1)
        asked = batch.targets != IGNORED
        return {"accuracy": right(model, batch)[asked].double().mean().item()}

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {self.pairs} pairs, {self.texts} texts, "
            f"growing at steps {self.grows}"
        )

    def _texts(self, batch: int, random: torch.Generator, share: int) -> Batch:
        sizes = (batch * share, self.tokens // share, self.pairs // share)
        return texts(*sizes, self.sizes.vocab_size, random)
