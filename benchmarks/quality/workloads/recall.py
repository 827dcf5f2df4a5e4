"""W5: multi-query associative recall, which a Transformer learns in a sudden transition."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hope.recall import texts
from benchmarks.hope.task import IGNORED, Batch
from benchmarks.quality.datasets import generator
from benchmarks.quality.workload import HELD_OUT, workload
from benchmarks.quality.workloads.lm_code import Logits
from benchmarks.transformer import TransformerConfig

VOCABULARY, LENGTH, PAIRS, BATCH = 256, 128, 32, 16
SHARES = (8, 4, 2, 1)
"""Batches by turns have an eighth of the pairs in an eighth of the tokens, a fourth, a half, all:
from the longest texts alone the transition comes late. As many tokens in every batch."""


def drawn(seed: int, step: int, share: int) -> Batch:
    sizes = (BATCH * share, LENGTH // share, PAIRS // share)
    return texts(*sizes, VOCABULARY, generator(seed, step))


def data(seed: int, step: int) -> Batch:
    return drawn(seed, step, SHARES[step % len(SHARES)])


def model() -> nn.Module:
    return Logits(TransformerConfig(vocab_size=VOCABULARY, dim=64, layers=2))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.tokens).flatten(0, 1)
    return F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    batches = [drawn(HELD_OUT, step, 1) for step in range(8)]
    logits = torch.cat([model(batch.tokens) for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    asked = targets != IGNORED
    return {
        "val_loss": F.cross_entropy(logits[asked], targets[asked]).item(),
        "val_error": (logits[asked].argmax(-1) != targets[asked]).float().mean().item(),
    }


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=400,
    about="multi-query associative recall of 32 pairs within 128 tokens out of 256, learned from 4 "
    "to 32 pairs by turns, a Transformer of width 64 with two layers, batches of 2,048 tokens",
)
