"""W5: multi-query associative recall (Arora et al. 2023), which is learned in a sudden transition.

A text begins with pairs of a key and its value, drawn anew for every text. All that follows are
questions: keys of the text, whose values are to be predicted.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.datasets import generator
from benchmarks.quality.language import Text
from benchmarks.quality.workload import HELD_OUT, workload
from benchmarks.quality.workloads.lm_code import Logits
from benchmarks.transformer import TransformerConfig

VOCABULARY, LENGTH, DIM = 256, 128, 64
PAIRS = (4, 8, 16, 32)
"""Batches by turns; from 32 pairs alone the transition comes late."""


class Embedding(nn.Module):
    """The token and, by a convolution, the one before it: a value is stored beside its key.

    Without it one attention layer must learn this before another one can recall, and a run of a
    minute is too short for that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.convolution = nn.Conv1d(DIM, DIM, 2, groups=DIM, bias=False)
        nn.init.normal_(self.embedding.weight, std=DIM**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return x + self.convolution(F.pad(x.mT, (1, 0))).mT


def texts(count: int, pairs: int, random: torch.Generator) -> Text:
    """Texts (count, LENGTH) and what their questions ask for, (count, LENGTH - 2 * pairs).

    Keys are tokens of the lower half of the vocabulary, values of the upper half.
    """
    half = VOCABULARY // 2
    keys = torch.rand(count, half, generator=random).argsort(1)[:, :pairs]
    values = torch.randint(half, VOCABULARY, (count, pairs), generator=random)
    asked = torch.randint(pairs, (count, LENGTH - 2 * pairs), generator=random)
    known = torch.stack([keys, values], -1).flatten(1)
    return Text(torch.cat([known, keys.gather(1, asked)], 1), values.gather(1, asked))


def answers(model: nn.Module, text: Text) -> Tensor:
    """Logits (questions, VOCABULARY)."""
    return model(text.tokens)[:, -text.targets.shape[1] :].flatten(0, 1)


def data(seed: int, step: int) -> Text:
    return texts(16, PAIRS[step % len(PAIRS)], generator(seed, step))


def model() -> nn.Module:
    model = Logits(TransformerConfig(vocab_size=VOCABULARY, dim=DIM, layers=2, heads=1))
    embedding = Embedding()
    model.transformer.add_module("embedding", embedding)
    model.transformer.head.weight = embedding.embedding.weight
    return model


def loss(model: nn.Module, batch: Text) -> Tensor:
    return F.cross_entropy(answers(model, batch), batch.targets.flatten())


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    text = texts(128, PAIRS[-1], generator(HELD_OUT, 0))
    logits, targets = answers(model, text), text.targets.flatten()
    return {
        "val_loss": F.cross_entropy(logits, targets).item(),
        "val_error": (logits.argmax(-1) != targets).float().mean().item(),
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=400,
    about="multi-query associative recall of 32 pairs in texts of 128 tokens out of 256, learned "
    "from 4, 8, 16 and 32 pairs by turns, a Transformer of width 64 with two layers of one head, "
    "a convolution of width 2 over its embeddings and its head tied to them, batches of 16 texts",
)
