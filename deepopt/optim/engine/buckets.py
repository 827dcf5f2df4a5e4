"""Which parameters of a group are stepped in one call."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deepopt import routing
from deepopt._compat import capturable_devices, is_distributed
from deepopt.memory import Memory
from deepopt.optim.engine import sharding
from deepopt.optim.engine.adamw_path import state_dtype
from deepopt.optim.engine.rounding import check_dtypes
from deepopt.optim.output_map import OutputMap

Group: TypeAlias = dict[str, Any]

ENTRIES_AT_ONCE = 2**19
"""Upper bound on the matrix entries stepped in one call on the CPU.

A single larger matrix still goes alone. The temporaries of a call are then small enough that the
allocator keeps them for the next one. It returns larger ones to the system, and touching fresh
memory can cost more than the arithmetic.
"""
PLAIN = {Tensor, torch.nn.Parameter}
"""Types of parameters that kernels can write to."""
SORTED_BY = ("path", "split", "param_names", "reasons", "rounding")
"""Arguments of a group that decide about the kinds of its parameters, or exclude some."""
ATTRIBUTES = operator.attrgetter("shape", "dtype", "device", "__class__")


class Kind(NamedTuple):
    """What parameters must share to be stepped in one call."""

    path: routing.Path
    elementwise: bool
    device: torch.device
    split: int = 1
    sides: tuple[int, int] = (0, 0)
    """Rows and columns of the matrices; zeros on the element-wise path, which mixes shapes."""
    dtype: torch.dtype | None = None
    """None on the element-wise path, which mixes dtypes too."""
    state_dtype: torch.dtype | None = None
    wrapped: bool = False
    """Whether they are of a tensor class of the user's, which knows torch's operators alone."""
    distributed: bool = False
    mesh: Any = None
    """The device mesh of DTensors on a path of matrices; None for ordinary tensors."""
    shared: bool = False
    """Whether ranks hold pieces of matrices, or the same matrices: they then share the work out."""
    turn: int = 0
    """Parameters that overlap in memory are stepped one after the other, each in a turn of its own,
    so that the result does not depend on which thread comes first."""


class Parts(NamedTuple):
    """A group's memory and output map, and the arguments of the group that they were made from."""

    memory: Memory
    output_map: OutputMap
    arguments: dict[str, Any]
    keys: dict[tuple[int, int], list[str]]
    """Names of their state tensors, by the sides of the matrices; all others are the user's."""

    def hold(self, group: Group) -> bool:
        """Whether every argument is the very object that it was.

        What equality means is up to objects of the user. Tensors and lists can change in place: of
        these nothing holds.
        """
        for name, value in self.arguments.items():
            if group.get(name) is not value or isinstance(value, Tensor | list):
                return False
        return True


class Bucket(NamedTuple):
    """What is stepped in one call."""

    kind: Kind
    group: Group
    parts: Parts
    params: list[Tensor]
    grads: list[Tensor]


class Sorted(NamedTuple):
    """The kinds of a group's parameters, and all that they were derived from."""

    params: list[Tensor]
    arguments: list[Any]
    attributes: list[tuple[Any, ...]]
    addresses: list[int] | None
    kinds: list[Kind]
    """Equal kinds are one object."""
    lasting: bool
    """A DTensor can come to be placed otherwise, which its attributes do not tell."""

    @classmethod
    def of(cls, group: Group, before: "Sorted | None" = None) -> "Sorted":
        """``before``, if it still holds, else the group sorted anew."""
        params = group["params"]
        arguments = list(map(group.get, SORTED_BY))
        attributes = list(map(ATTRIBUTES, params))
        addresses = _addresses(params)
        if (
            before is not None
            and before.lasting
            and before.attributes == attributes
            and before.addresses == addresses
            and before.arguments == arguments
            and all(map(operator.is_, before.params, params))
        ):
            return before
        check_dtypes(group)
        found = [
            _kind(param, route, turn)
            for param, route, turn in zip(
                params, routing.routes(group), _turns(params, addresses), strict=True
            )
        ]
        one_of_each: dict[Kind, Kind] = {}
        return cls(
            list(params),
            [list(value) if isinstance(value, list) else value for value in arguments],
            attributes,
            addresses,
            [one_of_each.setdefault(kind, kind) for kind in found],
            not any(kind.mesh is not None for kind in found),
        )


def sort(
    group: Group,
    kinds: Sequence[Kind],
    grads: Sequence[Tensor | None],
    parts: Parts,
    optimizer: str,
) -> list[Bucket]:
    """The parameters that have gradients, by what is stepped in one call.

    Args:
        group: of an optimizer.
        kinds: of its parameters, from :class:`Sorted`.
        grads: what they are stepped with; None lets a parameter rest.
        parts: the group's.
        optimizer: the name of its class, for messages.

    Raises:
        RuntimeError, AssertionError: a gradient or parameter that cannot be stepped.
    """
    buckets: list[Bucket] = []
    open_: dict[int, Bucket] = {}  # by the identity of the kind: its hash costs as much as a step
    entries: dict[int, int] = {}
    for param, kind, grad in zip(group["params"], kinds, grads, strict=True):
        if grad is None:
            continue
        if grad.is_sparse:
            raise RuntimeError(f"{optimizer} does not support sparse gradients")
        bucket = open_.get(id(kind))
        if not kind.elementwise:
            if kind.mesh is not None:
                grad = sharding.place(grad, param)
            elif kind.device.type == "cpu":  # where a few matrices at a time are faster
                entries[id(kind)] = entries.get(id(kind), 0) + param.numel()
                if entries[id(kind)] > ENTRIES_AT_ONCE:
                    bucket = None
                    entries[id(kind)] = param.numel()
        if bucket is None:
            if group["capturable"] or group["rounding"] != "nearest" or kind.mesh is not None:
                _check(kind, group)
            bucket = open_[id(kind)] = Bucket(kind, group, parts, [], [])
            buckets.append(bucket)
        bucket.params.append(param)
        bucket.grads.append(grad)
    return buckets


def _check(kind: Kind, group: Mapping[str, Any]) -> None:
    """Raise for what a flag of the group excludes."""
    if group["capturable"] and kind.device.type not in capturable_devices():
        raise AssertionError(
            "If capturable=True, params and state_steps must be on supported devices: "
            f"{capturable_devices()}."
        )
    if group["rounding"] != "nearest" and (kind.distributed or kind.wrapped):
        raise RuntimeError(
            f"rounding={group['rounding']!r} does not support "
            f"{'DTensor' if kind.distributed else 'tensor subclass'} parameters; use "
            "rounding='nearest'"
        )
    if kind.mesh is not None and group["differentiable"]:
        raise RuntimeError("`differentiable` does not support DTensor parameters")


def _kind(param: Tensor, route: routing.Route, turn: int) -> Kind:
    distributed = is_distributed(param)
    wrapped = type(param) not in PLAIN and not distributed
    if route.path == "elementwise" or not param.numel():
        return Kind(
            "elementwise", True, param.device, wrapped=wrapped, distributed=distributed, turn=turn
        )
    path, split = route.path, route.split
    kind = Kind(
        path,
        False,
        param.device,
        split,
        routing.sides(param, path, split),
        param.dtype,
        state_dtype(param),
        wrapped=wrapped,
        turn=turn,
    )
    if not distributed:
        return kind
    shared = not sharding.at_home(sharding.spread(param, path, split))
    return kind._replace(distributed=True, mesh=sharding.mesh(param), shared=shared)


def _addresses(params: Sequence[Tensor]) -> list[int] | None:
    """Where the entries begin; None where there are tensors without memory of their own."""
    if not set(map(type, params)) <= PLAIN:
        return None
    try:
        return list(map(Tensor.data_ptr, params))
    except RuntimeError:  # under a transform such as vmap
        return None


def _turns(params: Sequence[Tensor], addresses: list[int] | None) -> list[int]:
    """0, or for parameters that overlap in memory with others 1, 2, ..."""
    turns = [0] * len(params)
    if addresses is None:
        return turns
    end, last, turn = -math.inf, -1, 0
    for index in sorted(range(len(params)), key=addresses.__getitem__):
        param = params[index]
        if not param.numel() or param.device.type == "meta":
            continue
        begin = addresses[index]
        if begin < end:
            turns[last] = turns[last] or (turn := turn + 1)
            turns[index] = turn = turn + 1
        reach = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
        if begin + (reach + 1) * param.element_size() > end:
            end, last = begin + (reach + 1) * param.element_size(), index
    return turns
