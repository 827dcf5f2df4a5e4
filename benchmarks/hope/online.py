"""Reading a text once, window by window, with weights that may learn from every window read.

A window is predicted first and learned from afterwards. The memories of a Hope carry their state on
through the whole text. Attention is unreliable beyond the context that it was trained with, so
every other model sees two windows: the one before, as context, and the one that is predicted.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deepopt
from benchmarks.hope.task import Goal, Mean
from deepopt.hope import Hope, HopeConfig, Reader, chunk_groups, stack_levels
from deepopt.hope.cms import levels_of
from deepopt.hope.reader import MakeOptimizer
from deepopt.optim import Continuum

WINDOW = 256
"""Tokens of one text that are predicted before any of them is learned from."""


def saved(mean: Mean) -> float:
    """The share of what a Transformer++ with AdamW forgets that the levels of Hope keep."""
    theirs = mean("Transformer++", "forgotten_all_weights")
    return 1 - mean("Hope", "forgotten_levels") / theirs if theirs else math.nan


SAVED = Goal("share of a Transformer++'s forgetting with AdamW that Hope's levels save", saved, 0.3)


def adamw(lr: float) -> MakeOptimizer:
    """Makes an AdamW without weight decay."""
    return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)


def carries(model: nn.Module) -> bool:
    """Whether the model has a state that carries it through a text of any length."""
    return isinstance(model, Hope) and model.config.mixer == "titans"


@torch.no_grad()
def frozen(model: nn.Module, text: Tensor) -> Tensor:
    """Losses in nats, (batch, tokens - 1), of a text (batch, tokens) that nothing is learned from.

    Args:
        model: the model.
        text: int64.
    """
    found, state = [], None
    for at in range(1, text.shape[1], WINDOW):
        if carries(model):
            out = model(text[:, at - 1 : at - 1 + WINDOW][:, : text.shape[1] - at], state=state)
            found.append(_losses(out.logits, text[:, at : at + WINDOW]))
            state = out.state
        else:
            found.append(_windowed(model, text, at))
    return torch.cat(found, 1)


def by_levels(model: nn.Module, text: Tensor, optimizer: MakeOptimizer) -> Tensor:
    """The same losses while the CMS levels of a Hope, or the MLPs of a baseline, learn.

    The levels of a Hope learn as in `Hope.adapt`, the fastest after every window. The MLPs of a
    baseline become levels with the same chunks, by `deepopt.hope.stack_levels`.

    Args:
        model: the model, whose weights change.
        text: int64 (batch, tokens).
        optimizer: makes an optimizer from parameter groups.
    """
    if carries(model):
        reader = Reader(model, optimizer=optimizer, chunk=WINDOW * len(text))
        reader.read(text)
        return reader.losses[:, 1:]
    return _learning(model, text, optimizer, level_parameters(model))


def by_all_weights(model: nn.Module, text: Tensor, optimizer: MakeOptimizer) -> Tensor:
    """The same losses while every weight learns, after every window."""
    return _learning(model, text, optimizer, all_parameters(model))


def level_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those of the CMS levels of a Hope, or of a baseline's MLPs, which become levels."""
    if not levels_of(model):
        stack_levels(model, HopeConfig().cms_chunks)
    return {param for level in levels_of(model) for param in level.module.parameters()}


def all_parameters(model: nn.Module) -> set[nn.Parameter]:
    return set(model.parameters())


def optimizer_of(
    model: nn.Module, learning: set[nn.Parameter], optimizer: MakeOptimizer, tokens: int
) -> Continuum:
    """The optimizer of some parameters of a model; each level has its own frequency.

    Args:
        model: the model.
        learning: the parameters that learn.
        optimizer: makes an optimizer from parameter groups.
        tokens: tokens of a step.
    """
    groups = []
    for group in chunk_groups(model, deepopt.param_groups(model), tokens):
        params = [(name, param) for name, param in group["params"] if param in learning]
        if params:
            groups.append({**group, "params": params})
    return Continuum(optimizer(groups))


def second_half(losses: Tensor) -> float:
    """Mean in bits of the second half of losses in nats (batch, tokens)."""
    return losses[:, losses.shape[1] // 2 :].mean().item() / math.log(2)


def _learning(
    model: nn.Module, text: Tensor, optimizer: MakeOptimizer, learning: set[nn.Parameter]
) -> Tensor:
    """The losses while `learning` takes steps: after every window, levels at a chunk's end."""
    continuum = optimizer_of(model, learning, optimizer, WINDOW * len(text))
    found = []
    for at in range(1, text.shape[1], WINDOW):
        losses = _windowed(model, text, at)
        found.append(losses.detach())
        model.zero_grad()
        losses.mean().backward()
        continuum.step()
    return torch.cat(found, 1)


def _windowed(model: nn.Module, text: Tensor, at: int) -> Tensor:
    """Losses of the window that begins at `at`, after the window before it as context."""
    end, first = min(at + WINDOW, text.shape[1]), max(0, at - 1 - WINDOW)
    logits = model(text[:, first : end - 1]).logits
    return _losses(logits[:, at - 1 - first :], text[:, at:end])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
