"""Formal languages, learned on short words and read on long ones: can the model track a state?

After every letter the model says which state an automaton has reached:

- parity: whether the ones so far are odd in number;
- aa, (aa)*: whether the word so far, all of one letter, is odd in length;
- mod5: the ones so far, modulo 5;
- dyck1, Dyck-1: whether a bracket is open. Words are prefixes of balanced words: where nothing is
  open a bracket opens, elsewhere it opens or closes with equal chance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.hope.task import Batch, Goal, Task, generator, right, shrunk
from deepopt.hope import HopeConfig

Language = Callable[[int, int, torch.Generator], Batch]


def counter(modulus: int, letters: int = 2) -> Language:
    """Letters 0 and 1 at random, or 1 alone if there is one letter; counts the ones."""

    def words(batch: int, tokens: int, random: torch.Generator) -> Batch:
        ones = torch.ones(batch, tokens, dtype=torch.long)
        if letters == 2:
            ones = torch.randint(2, (batch, tokens), generator=random)
        return Batch(ones, ones.cumsum(1) % modulus)

    return words


def dyck_1(batch: int, tokens: int, random: torch.Generator) -> Batch:
    """Letter 1 opens and 0 closes; the target is 1 where something is open."""
    coins = torch.randint(2, (tokens, batch), generator=random)
    depth, words, open_ = torch.zeros(batch, dtype=torch.long), [], []
    for coin in coins:
        opens = torch.where(depth == 0, 1, coin)
        depth = depth + 2 * opens - 1
        words.append(opens)
        open_.append((depth > 0).long())
    return Batch(torch.stack(words, 1), torch.stack(open_, 1))


LANGUAGES: dict[str, Language] = {
    "parity": counter(2),
    "aa": counter(2, letters=1),
    "mod5": counter(5),
    "dyck1": dyck_1,
}


STEPS = {"mod5": 800}
"""Optimizer steps of the language that takes more than the others: after 400, it depends on the
seed whether a Hope counts on beyond the trained length."""
SIZES = HopeConfig(vocab_size=5, dim=64, layers=2, heads=2)
GOALS = (Goal("accuracy beyond the trained length", lambda mean: mean("Hope", "beyond"), 0.99),)


@dataclass(frozen=True)
class Formal(Task):
    """One language. The accuracy that counts is that of the letters beyond the trained length.

    Words grow while it is learned, as the texts of recall do: an eighth of the letters, in eight
    times as many words, until the first step of `grows`, and all letters from the last one on. From
    long words alone a model learns modulo 5 as a count that ends at the trained length.
    """

    language: str
    steps: int = 400
    tokens: int = 40
    longer: int = 4
    batch: int = 64
    grows: tuple[int, int, int] = (50, 100, 150)
    words: int = 256
    sizes: HopeConfig = SIZES
    metric: str = "beyond"
    goals: tuple[Goal, ...] = GOALS

    @property
    def about(self) -> str:
        return (
            f"The language {self.language}, learned on words of {self.tokens} letters. *Beyond*: "
            f"share of right answers at letters {self.tokens + 1} to {self.longer * self.tokens}; "
            "*whole words*: words of that length without a wrong answer; *within*: right answers "
            "at the trained length; *chance*: the likeliest answer's share of the letters beyond. "
            "Training starts with an eighth of the letters, in eight times as many words, and "
            f"doubles them at steps {', '.join(map(str, self.grows))}."
        )

    def data(self, seed: int, step: int) -> Batch:
        share = shrunk(step, self.grows)
        words = (self.batch * share, self.tokens // share)
        return LANGUAGES[self.language](*words, generator(seed, step))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        length = self.longer * self.tokens
        batch = LANGUAGES[self.language](self.words, length, generator("held out", length))
        found, beyond = right(model, batch), batch.targets[:, self.tokens :]
        return {
            "beyond": found[:, self.tokens :].double().mean().item(),
            "whole_words": found.all(1).double().mean().item(),
            "within": found[:, : self.tokens].double().mean().item(),
            "chance": beyond.flatten().bincount().max().item() / beyond.numel(),
        }

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {self.words} words x {self.longer}, "
            f"growing at steps {self.grows}"
        )
