"""The optimizers that the training command can name, how they share a model, and their steps."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import deepopt
from deepopt.hope.cms import chunk_groups
from deepopt.optim.continuum import Continuum

LR_SCALES = {
    "SGD": 250.0,
    "PreconditionedMomentum": 250.0,
    "DeltaMomentum": 250.0,
    "DeltaGradientDescent": 500.0,
    "DMGD": 0.5,
}
"""Multiples of AdamW's learning rate, for optimizers whose updates are as large as the gradient,
and for DMGD, whose updates are as large as AdamW's largest (``docs/results/hope.md``)."""

MAX_GRAD_NORM = 1.0
"""The norm at which all gradients of a step are clipped together."""
TORCH_KEYS = ("chunk", "tokens", "lifetime", "lr", "initial_lr", "weight_decay")
"""The entries of a group that torch's Muon and the AdamW beside it take."""


def optimizers_by_name() -> dict[str, type[Optimizer]]:
    """The optimizers that ``--optimizer`` can name; deepopt's win over torch's of the same name."""
    return {
        name: value
        for module in (torch.optim, deepopt)
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, Optimizer)
        # Those without it need a closure or sparse gradients, or have no use for our options.
        and "weight_decay" in inspect.signature(value).parameters
    }


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the optimizer of that name, in any case."""
    known = optimizers_by_name()
    for candidate, cls in known.items():
        if candidate.lower() == name.lower():
            return cls
    raise ValueError(
        f"optimizer={name!r} is unknown or not for this; choose one of {', '.join(sorted(known))}"
    )


def has_memory(name: str) -> bool:
    """Whether the optimizer of that name has a memory to choose."""
    return "memory" in inspect.signature(optimizer_class(name)).parameters


def build_optimizers(
    model: nn.Module, name: str, lr: float, weight_decay: float, memory: str | None, tokens: int
) -> list[Continuum]:
    """Return the optimizers that share the parameters of ``model``: one, for torch's Muon two.

    An optimizer in :data:`LR_SCALES` takes that multiple of ``lr`` for the parameters that it steps
    by its own rule, and divides their decay by it, so that as much is forgotten per step. A group's
    ``initial_lr`` is its rate, as torch's schedulers expect.

    Args:
        model: the model to train.
        name: a class of deepopt or torch.optim, in any case.
        lr: peak learning rate, on AdamW's scale.
        weight_decay: decoupled weight decay, of all parameters.
        memory: DeepMomentum's memory; None for its default.
        tokens: tokens of a step, over the whole batch.

    Raises:
        ValueError: an unknown optimizer, or a memory for one that has none.
    """
    cls = optimizer_class(name)
    groups = chunk_groups(model, deepopt.param_groups(model), tokens)
    for group in groups:
        by_adamw = group["path"] == "elementwise" and not cls.__module__.startswith("torch.")
        rate = 1.0 if by_adamw else LR_SCALES.get(cls.__name__, 1.0)
        group.update(lr=lr * rate, initial_lr=lr * rate, weight_decay=weight_decay / rate)
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if memory is not None:
        if not has_memory(name):
            raise ValueError(f"memory={memory!r}: {cls.__name__} has none; leave it out")
        options["memory"] = memory
    if cls is torch.optim.SGD:
        options["momentum"] = 0.9
    if cls is deepopt.DeltaGradientDescent:
        deepopt.capture_inputs(model)
    if cls is not torch.optim.Muon:
        return [Continuum(cls(groups, **options))]

    # torch's Muon takes nothing but two-dimensional matrices; AdamW has the rest.
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        is_matrix = [group["path"] == "matrix" and param.ndim == 2 for _, param in group["params"]]
        for flag, chosen in ((True, matrices), (False, rest)):
            params = [p for p, is_ in zip(group["params"], is_matrix, strict=True) if is_ == flag]
            if params:
                chosen.append({**{key: group[key] for key in TORCH_KEYS}, "params": params})
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
    return [Continuum(muon), Continuum(torch.optim.AdamW(rest, **options))]


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate for ``step``, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / (steps - warmup)


def prepare(optimizers: Sequence[Continuum], factor: float) -> None:
    """Set the learning rates to ``factor`` of their peaks and forget the gradients."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()


@contextmanager
def clipped(optimizers: Sequence[Continuum], model: nn.Module) -> Iterator[Tensor]:
    """A context for the update. Inside it, gradients are those to apply, clipped together.

    At the end of a chunk they are the chunk's. Step the wrapped optimizers inside. The value is the
    norm before clipping.
    """
    with ExitStack() as chunks:
        for optimizer in optimizers:
            chunks.enter_context(optimizer.due())
        yield torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
