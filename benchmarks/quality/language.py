"""Bytes of the standard library's sources, for the language models among the workloads."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepopt.data import Corpus, evaluation_batches, sample_batch, stdlib_corpus


class Text(NamedTuple):
    """Tokens and next tokens, both int64 (batch, length)."""

    tokens: Tensor
    targets: Tensor


@functools.cache
def corpus() -> Corpus:
    return stdlib_corpus()


def batch(size: int, length: int, seed: int, step: int) -> Text:
    """Random windows of the training part."""
    return Text(*sample_batch(corpus().train, size, length, seed, step))


def cross_entropy(model: nn.Module, text: Text) -> Tensor:
    """Mean over the tokens, in nats, of a model of tokens to logits."""
    return F.cross_entropy(model(text.tokens).flatten(0, 1), text.targets.flatten())


@torch.no_grad()
def held_out(model: nn.Module, length: int) -> dict[str, float]:
    """The loss on 256 evenly spaced windows of the held-out files."""
    return mean_loss(model, [Text(*x) for x in evaluation_batches(corpus().val, 64, length, 256)])


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    texts: list[Text],
    loss: Callable[[nn.Module, Text], Tensor] = cross_entropy,
) -> dict[str, float]:
    total = sum(loss(model, text).item() * text.tokens.numel() for text in texts)
    return {"val_loss": total / sum(text.tokens.numel() for text in texts)}
