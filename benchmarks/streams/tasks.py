"""The tasks: streams whose regimes recur, with or without a jump, and one that never changes."""

import codecs
import functools
import math
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
        jumps: whether a regime ends at once, so that it can be forgotten and come back.
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
    jumps: bool = True


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
    return answers(*teachers(seed)[step // PERIOD % 3], generator)


def turning_teacher(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A network that is one of the teachers where a period begins, and the next at its end."""
    period, place = divmod(step, PERIOD)
    angle = math.pi / 2 * place / PERIOD
    (now_1, now_2), (next_1, next_2) = (teachers(seed)[k % 3] for k in (period, period + 1))
    now, later = math.cos(angle), math.sin(angle)
    return now * now_1 + later * next_1, now * now_2 + later * next_2


def drift(seed: int, step: int) -> Part:
    """Noisy answers of the turning teacher."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return answers(*turning_teacher(seed, step), generator)


def answers(first: Tensor, second: Tensor, generator: torch.Generator) -> Part:
    """Random inputs, and what a network of these weights answers, with noise."""
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


def permuted_digits(seed: int, step: int) -> Part:
    """All ten digits, with noise, their pixels in one of three orders."""
    known = datasets.digits().train
    order = torch.Generator().manual_seed(1000 * (seed + 1) + step // PERIOD % 3)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    rows = torch.randint(len(known.inputs), (64,), generator=generator)
    pixels = known.inputs[rows][:, torch.randperm(64, generator=order)]
    return Part(pixels + NOISE * torch.randn(64, 64, generator=generator), known.targets[rows])


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
    "permuted": Task(
        permuted_digits, digits_mlp.model, classification_loss, PERIOD, 3, 1000, 0.004,
        (0.001, 0.002, 0.004, 0.008, 0.016, 0.032),
        "scikit-learn's digits with noise of variance 0.09, their pixels in three orders by turns.",
    ),
    "drift": Task(
        drift, regressor, squared_error, PERIOD, 3, 600, 0.004,
        (0.008, 0.016, 0.032, 0.064, 0.128, 0.256),
        "Regression on a network that turns from one of three into the next, without a jump.",
        jumps=False,
    ),
    "code": Task(
        functools.partial(language.batch, SIZE, LENGTH), lm_code.model, language.cross_entropy,
        0, 1, 600, 0.008, (0.012, 0.024, 0.048),
        "Bytes of the standard library's sources alone, the rate decaying.",
        held_out=lambda model: language.held_out(model, LENGTH)["val_loss"],
    ),
}  # fmt: skip
