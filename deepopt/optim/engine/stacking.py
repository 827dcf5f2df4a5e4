"""The state of many parameters as one tensor, for the time of one step.

torch keeps an optimizer's state per parameter, and there users read it, move it, replace it and
drop it. A batched step wants it stacked. So a step gathers the state of its matrices into one
tensor per key and writes the new values back. Nothing is kept from step to step: whoever holds the
state of one parameter holds that and nothing else. State tensors have a leading dimension, the
number of matrices in their parameter.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@contextmanager
def stacked(
    states: Sequence[State], keys: Sequence[str], differentiable: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The tensors under ``keys``, stacked; what is assigned or written to them reaches the states.

    An exception inside leaves the states as they were, unless there is one state alone and its
    tensors were written into.

    Args:
        states: one per parameter.
        keys: of the tensors.
        differentiable: give the states new tensors, with their history, instead of copying into
            the old ones.
    """
    parts = {key: [state[key] for state in states] for key in keys}
    old = {key: _gathered(own) for key, own in parts.items()}
    versions = {key: _version(tensor) for key, tensor in old.items()}
    new = dict(old)
    yield new
    check_kept(old, new)
    for key, own in parts.items():
        if new[key] is old[key] and (old[key] is own[0] or _version(old[key]) == versions[key]):
            continue
        if differentiable:
            distribute(new[key], states, key, list(map(len, own)))
        elif len(own) == 1:
            own[0].copy_(new[key])
        else:
            torch._foreach_copy_(own, list(new[key].split(list(map(len, own)))))


def distribute(whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int]) -> None:
    """Give ``state[key]`` of every state a copy of its part of ``whole``."""
    if len(states) == 1:
        states[0][key] = whole
        return
    for state, part in zip(states, whole.split(list(counts)), strict=True):
        state[key] = part.clone(memory_format=torch.contiguous_format)


def check_kept(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Raise ValueError where a state tensor's shape or dtype has changed."""
    for key, before in old.items():
        now = new[key]
        if now is before:
            continue
        if not isinstance(now, Tensor) or (now.shape, now.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"state {key!r} was a tensor of {_kind(before)} and cannot become one of "
                f"{_kind(now)}: keep what init made"
            )


def _gathered(own: Sequence[Tensor]) -> Tensor:
    """One contiguous tensor; that of a single state itself, if it is one."""
    return own[0] if len(own) == 1 and own[0].is_contiguous() else torch.cat(list(own))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _kind(value: Any) -> tuple[Any, ...]:
    return (*value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)
