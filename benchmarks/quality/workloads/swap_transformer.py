"""The default training run, with a Transformer in Hope's place."""

import math

from torch import Tensor, nn

from benchmarks.quality import language
from benchmarks.quality.workload import workload
from benchmarks.transformer import Transformer, TransformerConfig
from deepopt.data import evaluation_batches

BATCH, LENGTH, WINDOWS = 8, 256, 128
"""Sequences of a step, their bytes and the held-out sequences, those of the training command."""


def data(seed: int, step: int) -> language.Text:
    return language.batch(BATCH, LENGTH, seed, step)


def model() -> nn.Module:
    return Transformer(TransformerConfig())


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return model(*batch).loss


def metrics(model: nn.Module) -> dict[str, float]:
    windows = evaluation_batches(language.corpus().val, BATCH, LENGTH, WINDOWS)
    found = language.mean_loss(model, [language.Text(*x) for x in windows], loss)["val_loss"]
    return {"val_loss": found, "val_bits_per_byte": found / math.log(2)}


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=800,
    about="next byte of the standard library's sources, held-out files, a Transformer of width 128 "
    "with three layers, batches of 8 x 256 bytes",
    sha256=lambda: language.corpus().sha256,
)
