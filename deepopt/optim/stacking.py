"""The state of many parameters as one tensor.

torch keeps an optimizer's state per parameter; a batched step wants it stacked. Both hold here:
state tensors have a leading dimension, the number of matrices in their parameter, and those of
parameters that were first stepped together lie one after the other in one storage, so that
stacking them costs nothing and copies nothing.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Any]


class Joint(NamedTuple):
    """State tensors of many parameters and, for every key, the one tensor that they are views of.

    Kept from step to step: to look at every tensor's storage again costs more than small tensors'
    arithmetic.
    """

    own: list[Tensor]
    """Key by key, and under each parameter by parameter."""
    whole: list[Tensor]

    def is_of(self, own: list[Tensor]) -> bool:
        """Whether the state still consists of these very tensors."""
        return (
            len(own) == len(self.own)
            and all(map(operator.is_, own, self.own))
            and own[0].untyped_storage()._cdata == self.whole[0].untyped_storage()._cdata
        )


Joints = dict[int, Joint]
"""By the identity of the first parameter's state; whatever is no longer true is not used."""


def distribute(whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int]) -> None:
    """Make ``state[key]`` of every state a view of its part of ``whole``."""
    for state, part in zip(states, whole.contiguous().split(list(counts)), strict=True):
        state[key] = part


@contextmanager
def stacked(
    states: Sequence[State], keys: Sequence[str], differentiable: bool, joints: Joints
) -> Iterator[dict[str, Tensor]]:
    """The tensors under ``keys``, stacked; what is assigned or written to them reaches the states.

    An exception inside leaves the states as they were, unless tensors were written into.

    Args:
        states: one per parameter.
        keys: of the tensors.
        differentiable: give the states new tensors, with their history, instead of copying into
            the old ones.
        joints: what has been found to be stacked already, for the steps to come.
    """
    own = [state[key] for key in keys for state in states]
    counts = list(map(len, own[: len(states)]))
    old: dict[str, Tensor] = {}
    apart = set()
    joint = joints.get(id(states[0]))
    if joint is not None and keys and not differentiable and joint.is_of(own):
        old = dict(zip(keys, joint.whole, strict=True))
    else:
        for index, key in enumerate(keys):
            parts = own[index * len(states) : (index + 1) * len(states)]
            if not differentiable and _adjacent(parts):
                old[key] = _joined(parts)
                continue
            old[key] = torch.cat(parts)
            if not differentiable and all(map(owns_storage, parts)):  # as after load_state_dict
                distribute(old[key], states, key, counts)
            else:
                # Parts of a larger storage stay in it: each of them would keep all of it alive.
                apart.add(key)
        if keys and not differentiable and not apart:
            own = [state[key] for key in keys for state in states]
            joints[id(states[0])] = Joint(own, list(old.values()))
    new = dict(old)
    yield new
    check_kept(old, new)
    for key in keys:
        if differentiable:
            distribute(new[key], states, key, counts)
        elif key in apart:
            for state, part in zip(states, new[key].split(counts), strict=True):
                state[key].copy_(part)
        elif new[key] is not old[key]:
            old[key].copy_(new[key])


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


def _kind(value: Any) -> tuple[Any, ...]:
    return (*value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    size = (sum(map(len, parts)), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    storage, offset = _storage(parts[0]), parts[0].storage_offset()
    for part in parts:
        if _storage(part) != storage or part.storage_offset() != offset or not part.is_contiguous():
            return False
        offset += part.numel()
    return True


def owns_storage(part: Tensor) -> bool:
    """Whether there is nothing else in the storage of ``part``."""
    return part.untyped_storage().nbytes() == part.numel() * part.element_size()


def _storage(part: Tensor) -> int:
    """The storage's identity, not its address: fake tensors have none."""
    return part.untyped_storage()._cdata
