"""What a task is: its data, its model and its metrics, and what the tables say about it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.hope import models
from benchmarks.quality.language import Text
from deepopt.hope import HopeConfig

Batch = Text
"""Tokens and what to predict at each, IGNORED for nothing."""
Mean = Callable[[str, str], float]
"""The mean over the seeds of a model's metric, by the names of both; NaN if there is no run."""


class Goal(NamedTuple):
    """A bound on what the default Hope reaches.

    Attributes:
        what: the quantity, for the table.
        value: computes it.
        limit: the bound.
        at_least: whether the bound is a lower one, or else an upper one.
    """

    what: str
    value: Callable[[Mean], float]
    limit: float
    at_least: bool = True


class Task(ABC):
    """A task: its data, its model and its metrics.

    Attributes:
        sizes: the configuration of Hope; the baselines take their sizes from it.
        steps: optimizer steps of a run.
        tokens: tokens of a training sequence.
        weight_decay: that of all parameters; the learning rate multiplies it.
        metric: the metric that decides between learning rates.
        smaller_is_better: whether less of that metric is better, as with a loss.
        goals: what the default Hope should reach.
        beside: the ablations that a goal compares Hope with; they run with every seed, too.
    """

    sizes: HopeConfig
    steps: int
    tokens: int
    weight_decay: float = 0.1
    metric: str
    smaller_is_better: bool = False
    goals: tuple[Goal, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def unavailable(self) -> str:
        """Why its data is not on this machine, and how to get it; empty where it is."""
        return ""

    @property
    @abstractmethod
    def about(self) -> str:
        """What the task is, for the page."""

    @abstractmethod
    def data(self, seed: int, step: int) -> Batch:
        """The batch of a step: a function of the seed and the step alone."""

    def model(self, name: str) -> nn.Module:
        """The untrained model of that name (one of `models.NAMES`) at the sizes of the task."""
        return models.build(name, self.sizes)

    @abstractmethod
    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What the trained model can do, on data that training has not seen."""

    @property
    @abstractmethod
    def batches(self) -> str:
        """The sizes of the batches and of the tests, for the page."""

    def setting(self, name: str) -> Mapping[str, object]:
        """All that the outcome of a run depends on besides the run and the code."""
        return {"task_config": self.batches, "model_config": models.described(name, self.sizes)}


def generator(seed: int | str, step: int) -> torch.Generator:
    """Random numbers of a step; those of neighboring seeds and steps are unrelated."""
    return torch.Generator().manual_seed(random.Random(f"{seed}/{step}").getrandbits(63))


def shrunk(step: int, grows: tuple[int, int, int]) -> int:
    """How many times shorter the texts of a step are: 8 at first, halved at each of three steps."""
    return 8 >> sum(step >= grown for grown in grows)


@torch.no_grad()
def right(model: nn.Module, batch: Batch, size: int = 32) -> Tensor:
    """Whether the likeliest token is the target, (batch, tokens) bool.

    Args:
        model: the model.
        batch: tokens and targets.
        size: sequences that are computed at once.
    """
    parts = [model(tokens).logits.argmax(-1) for tokens in batch.tokens.split(size)]
    return torch.cat(parts) == batch.targets
