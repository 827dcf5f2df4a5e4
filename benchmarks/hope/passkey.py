"""Passkey in bytes: a number said once, somewhere in a text without meaning, and asked at its end.

Trained on short texts, tested on longer ones.
"""

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.hope.task import Batch, Goal, Task, generator, right
from deepopt.hope import HopeConfig
from deepopt.hope.model import IGNORED

FILLER = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
SAID = b"The pass key is %s. Remember it. "
ASKED = b"What is the pass key? The pass key is %s"
DIGITS = 5

SIZES = HopeConfig(dim=64, layers=2, heads=2)
GOALS = (Goal("keys right at 4 x the trained length", lambda mean: mean("Hope", "longer"), 0.95),)


def texts(count: int, length: int, random: torch.Generator) -> Batch:
    """Texts of `length` bytes to predict from; the key's digits at the end are the targets."""
    rows, filler = [], FILLER * (length // len(FILLER) + 2)
    numbers = torch.randint(10**DIGITS, (count,), generator=random).tolist()
    places = torch.rand(count, generator=random).tolist()
    starts = torch.randint(len(FILLER), (count,), generator=random).tolist()
    for number, place, start in zip(numbers, places, starts, strict=True):
        key = str(number).zfill(DIGITS).encode()
        said, asked = SAID % key, ASKED % key
        around = length + 1 - len(said) - len(asked)
        before = round(place * around)
        # After the sentence with the key, the filler goes on where it stopped.
        content = filler[start : start + before] + said
        content += filler[start + before : start + around] + asked
        rows.append(list(content))
    whole = torch.tensor(rows)
    targets = whole[:, 1:].clone()
    targets[:, :-DIGITS] = IGNORED
    return Batch(whole[:, :-1], targets)


@dataclass(frozen=True)
class Passkey(Task):
    """The passkey within `tokens` bytes, then within `longer` times as many.

    Texts grow while it is learned, as those of recall do: half the length, in twice as many texts,
    until the step `grows`. Hope finds its first keys after 200 steps; 400 with a rate that falls
    were too few. The weights do not decay: no text comes twice, so none can be learned by heart,
    and a decay would move the gates away from their start and shorten the memory.
    """

    steps: int = 2000
    weight_decay: float = 0.0
    tokens: int = 256
    longer: int = 4
    batch: int = 8
    grows: int = 500
    texts: int = 64
    sizes: HopeConfig = SIZES
    metric: str = "longer"
    goals: tuple[Goal, ...] = GOALS

    @property
    def about(self) -> str:
        return (
            f"A number of {DIGITS} digits is said once in a text of {self.tokens} bytes without "
            "meaning and asked at its end; only its digits are learned. *Longer*: share of the "
            f"keys of which every digit is predicted, in texts of {self.longer * self.tokens} "
            "bytes, which no training text was; *within*: the same at the trained length. Training "
            f"texts have half the length, and are twice as many, until step {self.grows}. Weight "
            f"decay is {self.weight_decay:g}, for all models."
        )

    def data(self, seed: int, step: int) -> Batch:
        share = 2 if step < self.grows else 1
        return texts(self.batch * share, self.tokens // share, generator(seed, step))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        return {
            name: self._found(model, times * self.tokens)
            for name, times in (("longer", self.longer), ("within", 1))
        }

    def _found(self, model: nn.Module, length: int) -> float:
        batch = texts(self.texts, length, generator("held out", length))
        return right(model, batch, 8)[:, -DIGITS:].all(1).double().mean().item()

    @property
    def batches(self) -> str:
        return (
            f"{self.batch} x {self.tokens}, {self.texts} texts x {self.longer}, "
            f"growing at step {self.grows}"
        )
