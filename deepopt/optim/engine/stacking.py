"""The state of many parameters as one tensor, for the time of one step.

torch keeps an optimizer's state per parameter, and there users read it, move it, replace it and
drop it. A batched step wants it stacked. So a step gathers the state of its matrices into one
tensor per key and writes the new values back. Nothing is kept from step to step: whoever holds the
state of one parameter holds that and nothing else. State tensors have a leading dimension, the
number of matrices in their parameter.
"""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deepopt.optim.engine.buckets import Bucket

State: TypeAlias = dict[str, Any]

SHAPE, DEVICE = operator.attrgetter("shape"), operator.attrgetter("device")


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
    if len(states) == 1:
        old = {key: states[0][key].contiguous() for key in keys}
    else:
        old = {key: torch.cat([state[key] for state in states]) for key in keys}
    new, versions = dict(old), list(map(_version, old.values()))
    yield new
    check_kept(old, new)
    for key, version in zip(keys, versions, strict=True):
        if new[key] is old[key] and _version(new[key]) == version:
            continue
        if differentiable:
            distribute(new[key], states, key)
        elif len(states) > 1:
            own = [state[key] for state in states]
            torch._foreach_copy_(own, list(new[key].split(list(map(len, own)))))
        elif new[key] is not states[0][key]:
            states[0][key].copy_(new[key])


def distribute(
    whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int] = ()
) -> None:
    """Give ``state[key]`` of every state a copy of its part of ``whole``.

    Args:
        whole: all parts, one after the other.
        states: what gets them.
        key: where.
        counts: rows of each part (default: those of the tensors that are there).
    """
    if len(states) == 1:
        states[0][key] = whole
        return
    counts = counts or [len(state[key]) for state in states]
    for state, part in zip(states, whole.split(list(counts)), strict=True):
        state[key] = part.clone(memory_format=torch.contiguous_format)


def check_states(bucket: "Bucket", states: Sequence[Any], keys: Sequence[str]) -> None:
    """Raise RuntimeError where the user has left a state that does not fit its parameter.

    Args:
        bucket: what is about to be stepped.
        states: of its parameters; one without a step is yet to be made, and passes.
        keys: the tensors that ``init`` makes.
    """
    kind, params = bucket.kind, bucket.params
    if not all(states):
        made = [(p, s) for p, s in zip(params, states, strict=True) if s and "step" in s]
        params, states = [p for p, _ in made], [s for _, s in made]
    try:
        tensors = [state[key] for key in keys for state in states]
    except KeyError:
        pairs = zip(params, states, strict=True)
        param, lost = next((p, set(keys) - s.keys()) for p, s in pairs if set(keys) - s.keys())
        raise RuntimeError(
            f"state {min(lost)!r} of {_who(bucket, param)} is missing: put it back, or delete the "
            "whole entry of optimizer.state to begin anew"
        ) from None
    if set(map(DEVICE, tensors)) - {kind.device}:
        where = next(tensor.device for tensor in tensors if tensor.device != kind.device)
        raise RuntimeError(
            f"state lies on {where}, and its parameters on {kind.device}: bring what was moved "
            "away back before the step"
        )
    if kind.mesh is not None:
        return
    if kind.elementwise:
        found, wanted = list(map(SHAPE, tensors)), list(map(SHAPE, params)) * len(keys)
    else:
        count = kind.sides[0] * kind.sides[1]
        found = list(map(len, tensors))
        wanted = [param.numel() // count for param in params] * len(keys)
    if found != wanted:
        index = next(i for i, size in enumerate(wanted) if size != found[i])
        key, param = keys[index // len(params)], params[index % len(params)]
        raise RuntimeError(
            f"state {key!r} of {_who(bucket, param)} has the shape {tuple(tensors[index].shape)}, "
            "which does not fit: replace a state tensor only by one of its own shape"
        )


def _who(bucket: "Bucket", param: Tensor) -> str:
    names = bucket.group.get("param_names") or []
    known = [n for p, n in zip(bucket.group["params"], names, strict=False) if p is param]
    return f"parameter {''.join(known) or '(unnamed)'} of shape {tuple(param.shape)}"


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


_version = operator.attrgetter("_version")


def _kind(value: Any) -> tuple[Any, ...]:
    return (*value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)
