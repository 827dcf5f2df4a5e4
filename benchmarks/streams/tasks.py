"""The tasks: streams that switch between regimes which recur, and one that never changes."""

import codecs
import functools
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality import datasets, language
from benchmarks.quality.datasets import Part, classification_loss
from benchmarks.quality.workloads import digits_mlp, lm_code
from deepopt.data import sample_batch

PERIOD = 50
"""Steps of a regime before the next one."""
SIZE, LENGTH = 16, 64
INPUTS, OUTPUTS, EXAMPLES = 16, 16, 256
NOISE = 0.3
CLASSES = 10
WRONG = 0.75
"""Share of the labels that are drawn at random while a burst lasts."""


@dataclass(frozen=True)
class Task:
    """What is learned, and on which schedule.

    Args:
        data: the batch of a seed and a step, a function of the two alone.
        model: makes the untrained model.
        loss: the loss of the model on a batch.
        period: steps of a regime before the next one; 0 where nothing switches.
        regimes: the number of regimes that take turns.
        steps: optimizer steps of a run.
        aux: the learning rate of embeddings, heads and vectors, whatever the matrices' is.
        rates: learning rates of the matrices that every optimizer is tried at.
        held_out: the loss after training where the rate decays to zero; None for a stream, which
            has a constant rate and is measured while it is learned.
        about: the task in a sentence.
    """

    data: Callable[[int, int], Any]
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    period: int
    regimes: int
    steps: int
    aux: float
    rates: tuple[float, ...]
    about: str
    held_out: Callable[[nn.Module], float] | None = None


@functools.cache
def english() -> Tensor:
    """The language reference that every Python carries for ``help()``, as bytes.

    Letters are shifted by 13 (ROT13): plain English shares many words with the sources, and would
    leave little to relearn.
    """
    topics = pydoc_data.topics.topics
    text = codecs.encode("\n".join(topics[name] for name in sorted(topics)), "rot13")
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def code_and_english(seed: int, step: int) -> language.Text:
    if step // PERIOD % 2:
        return language.Text(*sample_batch(english(), SIZE, LENGTH, seed, step))
    return language.batch(SIZE, LENGTH, seed, step)


@functools.cache
def teachers(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three random networks of one hidden layer."""
    generator = torch.Generator().manual_seed(1000 + seed)
    hidden = 8
    return [
        (
            torch.randn(INPUTS, hidden, generator=generator) / INPUTS**0.5,
            torch.randn(hidden, OUTPUTS, generator=generator) / hidden**0.5,
        )
        for _ in range(3)
    ]


def regimes(seed: int, step: int) -> Part:
    """Noisy answers of one teacher, and of the next one from the next period on."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    first, second = teachers(seed)[step // PERIOD % 3]
    x = torch.randn(EXAMPLES, INPUTS, generator=generator)
    y = torch.tanh(2 * x @ first) @ second
    return Part(x, y + NOISE * torch.randn(EXAMPLES, OUTPUTS, generator=generator))


def regressor() -> nn.Module:
    return nn.Sequential(
        nn.Linear(INPUTS, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, OUTPUTS)
    )


def bursts(seed: int, step: int) -> Part:
    """Classes that a random network tells apart; every other period most labels are wrong."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    first, second = teachers(seed)[0]
    x = torch.randn(EXAMPLES, INPUTS, generator=generator)
    labels = (torch.tanh(2 * x @ first) @ second)[:, :CLASSES].argmax(-1)
    wrong = torch.rand(EXAMPLES, generator=generator) < WRONG * (step // PERIOD % 2)
    other = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    return Part(x, torch.where(wrong, other, labels))


def digit_classes(seed: int, step: int) -> Part:
    """Two of the ten digits at a time, with noise, so that no two batches are alike."""
    known = datasets.digits().train
    pair = step // PERIOD % 5
    rows = torch.nonzero(known.targets // 2 == pair).flatten()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = rows[torch.randint(len(rows), (64,), generator=generator)]
    noise = NOISE * torch.randn(64, 64, generator=generator)
    return Part(known.inputs[rows] + noise, known.targets[rows])


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Linear(INPUTS, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, CLASSES)
    )


def squared_error(model: nn.Module, batch: Part) -> Tensor:
    return F.mse_loss(model(batch.inputs), batch.targets)


TASKS = {
    "text": Task(
        code_and_english, lm_code.model, language.cross_entropy, PERIOD, 2, 800, 0.008,
        (0.006, 0.012, 0.024),
        "Bytes of the standard library's sources, and of the language reference in English "
        "(`pydoc_data.topics`, letters moved on by 13), by turns.",
    ),
    "regimes": Task(
        regimes, regressor, squared_error, PERIOD, 3, 600, 0.004,
        (0.008, 0.016, 0.032, 0.064, 0.128, 0.256),
        "Regression on three random networks by turns, with noise of variance 0.09.",
    ),
    "bursts": Task(
        bursts, classifier, classification_loss, PERIOD, 2, 600, 0.004,
        (0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256),
        "Ten classes that a random network tells apart; every other period three labels in four "
        "are random.",
    ),
    "digits": Task(
        digit_classes, digits_mlp.model, classification_loss, PERIOD, 5, 1000, 0.004,
        (0.001, 0.002, 0.004, 0.008, 0.016),
        "scikit-learn's digits with noise of variance 0.09, two classes of "
        "the ten at a time.",
    ),
    "code": Task(
        functools.partial(language.batch, SIZE, LENGTH), lm_code.model, language.cross_entropy,
        0, 1, 600, 0.008, (0.012, 0.024, 0.048),
        "Bytes of the standard library's sources alone, the rate decaying.",
        held_out=lambda model: language.held_out(model, LENGTH)["val_loss"],
    ),
}  # fmt: skip
