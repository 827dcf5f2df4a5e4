"""The six tasks of mechanistic architecture design (MAD, arXiv 2403.17844), small.

Each asks one thing of a layer that language modeling needs:

- in-context recall: the value that followed a key earlier in the text;
- fuzzy recall: the same, of keys and values of one to three tokens;
- noisy recall: the same, where one pair in five is noise;
- selective copy: some tokens among many blanks, again in order at the end;
- compression: the whole text, read by a small decoder from the model's last token;
- memorization: values that always belong to a key, from the weights alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.hope.task import Batch, Task, generator, right
from benchmarks.transformer import Output
from deepopt.hope import HopeConfig
from deepopt.hope.model import IGNORED

VOCABULARY = 64
BLANK, COPY = 0, 1
KEYS = torch.arange(2, 18)
VALUES = torch.arange(18, 34)
NOISE = torch.arange(34, 50)
COPIED = 12
SYMBOLS = 16  # of the texts that are compressed
NOISY = 0.2

Make = Callable[[int, int, torch.Generator], Batch]


def drawn(of: Tensor, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return of[torch.randint(len(of), shape, generator=random)]


def seen_before(keys: Tensor) -> Tensor:
    """Whether a key stands earlier in its row, (batch, pairs) bool."""
    same = keys[:, :, None] == keys[:, None, :]
    return same.tril(-1).any(2)


def recall(batch: int, tokens: int, random: torch.Generator, noisy: float = 0.0) -> Batch:
    """Pairs of a key and the value it has in this text; to be predicted once both were there."""
    keys = drawn(KEYS, (batch, tokens // 2), random)
    of_key = drawn(VALUES, (batch, len(KEYS)), random)
    values = of_key.gather(1, keys - KEYS[0])
    is_noise = torch.rand(keys.shape, generator=random) < noisy
    noise = drawn(NOISE, (2, *keys.shape), random)
    keys, values = torch.where(is_noise, noise[0], keys), torch.where(is_noise, noise[1], values)
    asked = seen_before(keys) & ~is_noise
    targets = torch.stack([values.where(asked, values.new_tensor(IGNORED)), values], 2)
    targets[:, :, 1] = IGNORED
    return Batch(torch.stack([keys, values], 2).flatten(1), targets.flatten(1))


def noisy_recall(batch: int, tokens: int, random: torch.Generator) -> Batch:
    return recall(batch, tokens, random, NOISY)


def fuzzy_recall(batch: int, tokens: int, random: torch.Generator) -> Batch:
    """Keys and values of one to three tokens; asked are the tokens of values that were seen."""

    def motif(of: Tensor) -> list[int]:
        length = int(torch.randint(1, 4, (), generator=random))
        return drawn(of, (length,), random).tolist()

    rows, wanted = [], []
    for _ in range(batch):
        pairs: dict[tuple[int, ...], list[int]] = {}
        while len(pairs) < len(KEYS) // 2:
            pairs.setdefault(tuple(motif(KEYS)), motif(VALUES))
        known = list(pairs)
        row: list[int] = []
        targets: list[int] = []
        seen: set[tuple[int, ...]] = set()
        while len(row) <= tokens:
            key = known[int(torch.randint(len(known), (), generator=random))]
            value = pairs[key]
            row += [*key, *value]
            asked = value if key in seen else [IGNORED] * len(value)
            targets += [*[IGNORED] * len(key), *asked]
            seen.add(key)
        rows.append(row[: tokens + 1])
        wanted.append(targets[1 : tokens + 1])
    return Batch(torch.tensor(rows)[:, :tokens], torch.tensor(wanted))


def selective_copy(batch: int, tokens: int, random: torch.Generator) -> Batch:
    """Tokens at random places among blanks, the sign to copy, and blanks to answer at."""
    room = tokens - COPIED
    places = torch.rand(batch, room, generator=random).argsort(1)[:, :COPIED].sort(1).values
    content = drawn(VALUES, (batch, COPIED), random)
    text = torch.full((batch, tokens), BLANK)
    text.scatter_(1, places, content)
    text[:, room] = COPY
    targets = torch.full_like(text, IGNORED)
    targets[:, room:] = content
    return Batch(text, targets)


def compression(batch: int, tokens: int, random: torch.Generator) -> Batch:
    """Random tokens, which are the targets at their own places."""
    text = drawn(VALUES[:SYMBOLS], (batch, tokens), random)
    return Batch(text, text)


def memorization(batch: int, tokens: int, random: torch.Generator) -> Batch:
    """Keys, each followed by a blank at which its value is asked; no text has a value."""
    keys = torch.randint(2, VOCABULARY, (batch, tokens // 2), generator=random)
    of_key = torch.randint(2, VOCABULARY, (VOCABULARY,), generator=generator("dictionary", 0))
    blank = torch.full_like(keys, BLANK)
    targets = torch.stack([torch.full_like(keys, IGNORED), of_key[keys]], 2)
    return Batch(torch.stack([keys, blank], 2).flatten(1), targets.flatten(1))


class Kind(NamedTuple):
    """How texts are made, how long they are, and what is asked, for the page."""

    make: Make
    tokens: int
    about: str


KINDS = {
    "in_context_recall": Kind(recall, 64, "the value that followed a key earlier in the text"),
    "fuzzy_recall": Kind(fuzzy_recall, 64, "the same, of keys and values of one to three tokens"),
    "noisy_recall": Kind(noisy_recall, 64, "the same, where one pair in five is noise"),
    "selective_copy": Kind(
        selective_copy, 64, f"{COPIED} tokens among blanks, again in order at the end"
    ),
    "compression": Kind(
        compression, 16, f"a text of {SYMBOLS} symbols from the last token's representation alone"
    ),
    "memorization": Kind(memorization, 64, "the value that always belongs to a key"),
}


class Compressed(nn.Module):
    """A model whose last token must stand for the whole text, and the decoder that asks it.

    Args:
        model: any of the models; its head is taken off.
        dim: its width.
        tokens: length of the texts.
    """

    def __init__(self, model: nn.Module, dim: int, tokens: int) -> None:
        super().__init__()
        model.head = nn.Identity()
        self.model = model
        self.places = nn.Embedding(tokens, dim)
        self.decoder = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU())
        self.head = nn.Linear(2 * dim, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        last = self.model(tokens).logits[:, -1:].expand(-1, tokens.shape[1], -1)
        places = self.places.weight.expand(len(tokens), -1, -1)
        logits = self.head(self.decoder(torch.cat([last, places], -1)))
        return Output.of(logits, targets)


SIZES = HopeConfig(vocab_size=VOCABULARY, dim=64, layers=2, heads=2)


@dataclass(frozen=True)
class Mad(Task):
    """One of the six tasks."""

    kind: str
    steps: int = 300
    batch: int = 32
    texts: int = 128
    sizes: HopeConfig = SIZES
    metric: str = "accuracy"

    @property
    def tokens(self) -> int:  # type: ignore[override]
        return KINDS[self.kind].tokens

    @property
    def about(self) -> str:
        return (
            f"MAD's {self.kind.replace('_', ' ')}: {KINDS[self.kind].about}. *Accuracy*: share of "
            "right answers, in texts that training has not had."
        )

    def data(self, seed: int, step: int) -> Batch:
        return KINDS[self.kind].make(self.batch, self.tokens, generator(seed, step))

    def model(self, name: str) -> nn.Module:
        model = super().model(name)
        if self.kind != "compression":
            return model
        return Compressed(model, self.sizes.dim, self.tokens)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        batch = KINDS[self.kind].make(self.texts, self.tokens, generator("held out", self.tokens))
        asked = batch.targets != IGNORED
        return {"accuracy": right(model, batch)[asked].double().mean().item()}

    @property
    def batches(self) -> str:
        return f"{self.batch} x {self.tokens}, {self.texts} texts"
