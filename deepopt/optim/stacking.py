"""The state of many parameters as one tensor.

torch keeps an optimizer's state per parameter; a batched step wants it stacked. Both hold here:
state tensors have a leading dimension, the number of matrices in their parameter, and those of
parameters that were first stepped together lie one after the other in one storage, so that
stacking them costs nothing and copies nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def distribute(whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int]) -> None:
    """Make ``state[key]`` of every state a view of its part of ``whole``."""
    for state, part in zip(states, whole.split(list(counts)), strict=True):
        state[key] = part


@contextmanager
def stacked(states: Sequence[State], keys: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The tensors under ``keys``, stacked; what is written to them reaches the states."""
    whole: dict[str, Tensor] = {}
    copied = []
    for key in keys:
        parts: list[Tensor] = [state[key] for state in states]
        if _adjacent(parts):
            whole[key] = _joined(parts)
            continue
        whole[key] = torch.cat(parts)
        if all(map(_owns_storage, parts)):  # as after load_state_dict
            distribute(whole[key], states, key, [len(part) for part in parts])
        else:
            # Parts of a larger storage stay in it: each of them would keep all of it alive.
            copied.append(key)
    yield whole
    for key in copied:
        for state, part in zip(
            states, whole[key].split([len(s[key]) for s in states]), strict=True
        ):
            state[key].copy_(part)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    first = parts[0]
    size = (sum(map(len, parts)), *first.shape[1:])
    return first.as_strided(size, first.stride(), first.storage_offset())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    storage, offset = parts[0].untyped_storage().data_ptr(), parts[0].storage_offset()
    for part in parts:
        if (
            part.untyped_storage().data_ptr() != storage
            or part.storage_offset() != offset
            or not part.is_contiguous()
        ):
            return False
        offset += part.numel()
    return True


def _owns_storage(part: Tensor) -> bool:
    return part.untyped_storage().nbytes() == part.numel() * part.element_size()
