"""What is stepped in one call: which parameters, and their state as one tensor.

torch keeps an optimizer's state per parameter, and there users read it, move it, replace it and
drop it. A batched step wants it stacked. So a step gathers the state of its matrices into one
tensor per key and writes the new values back. No state is kept elsewhere: whoever holds the state
of one parameter holds that and nothing else. State tensors have a leading dimension, the number of
matrices in their parameter.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deepopt import routing
from deepopt._compat import capturable_devices, is_distributed
from deepopt.memory import AnyMemory
from deepopt.optim.engine import State, sharding
from deepopt.optim.engine.adamw_path import state_dtype
from deepopt.optim.engine.low_bits import check_dtypes, keeps_low
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
IS_SPARSE, STEP = operator.attrgetter("is_sparse"), operator.itemgetter("step")
CPU = torch.device("cpu")
COUNTS = {torch.float32, torch.float64}
"""Dtypes of step counts, by torch's default dtype."""
NO_DIMS = torch.Size()
SHAPE, DTYPE, DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))


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

    memory: AnyMemory
    output_map: OutputMap
    arguments: dict[str, Any]
    keys: dict[tuple[Any, ...], dict[str, Tensor]]
    """What ``init`` makes of one matrix, on the meta device, by the sides and dtype of the matrix.
    Other entries of a state are the user's."""

    def hold(self, group: Group) -> bool:
        """Whether every argument is the very object that it was.

        Objects of the user decide what equality means, so identity counts. A tensor or a list can
        change in place, and never counts as unchanged.
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
    shapes: list[torch.Size]
    state_dtypes: list[torch.dtype]


Batch: TypeAlias = list[tuple[Bucket, list[State]]]
"""Buckets, each with the states of its parameters."""


class Sorted(NamedTuple):
    """The kinds of a group's parameters, and all that they were derived from."""

    params: list[Tensor]
    arguments: list[Any]
    types: list[type]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    addresses: list[int] | None
    strides: list[tuple[int, ...]]
    self_overlapping: list[int]
    """The numbers of the parameters with several entries in one place, as ``expand`` makes them."""
    members: dict[Kind, list[int]]
    """The numbers of the parameters of each kind."""
    state_dtypes: list[torch.dtype]
    lasting: bool
    """Whether it can be kept: the attributes of a DTensor do not show a new placement."""

    @classmethod
    def of(
        cls, group: Group, least_dims: Mapping[str, int], before: "Sorted | None" = None
    ) -> "Sorted":
        """``before``, if it still holds, else the group sorted anew.

        Raises:
            ValueError: a path, a split or a rounding that does not fit a parameter.
        """
        params = group["params"]
        arguments = list(map(group.get, SORTED_BY))
        types, shapes = list(map(type, params)), list(map(SHAPE, params))
        dtypes, devices = list(map(DTYPE, params)), list(map(DEVICE, params))
        addresses, strides = _addresses(params), list(map(Tensor.stride, params))
        same = (
            before is not None
            and before.addresses == addresses
            and before.strides == strides
            and before.arguments == arguments
            and before.types == types
            and before.shapes == shapes
            and before.dtypes == dtypes
            and before.devices == devices
            and all(map(operator.is_, before.params, params))
        )
        if before is not None and same and before.lasting:
            return before
        if not same:
            check_dtypes(group)
            routing.check_group(group, least_dims)
        members: dict[Kind, list[int]] = {}
        every = zip(params, routing.routes(group), _turns(params, addresses), strict=True)
        for number, each in enumerate(every):
            members.setdefault(_kind(*each), []).append(number)
        return cls(
            list(params),
            [list(value) if isinstance(value, list) else value for value in arguments],
            types,
            shapes,
            dtypes,
            devices,
            addresses,
            strides,
            [number for number, param in enumerate(params) if overlaps_itself(param)],
            members,
            list(map(state_dtype, params)),
            not any(kind.mesh is not None for kind in members),
        )


def check_gradients(
    group: Group, found: Sorted, grads: Sequence[Tensor | None], optimizer: str
) -> None:
    """Raise RuntimeError for a gradient, or a parameter that has one, that cannot be stepped.

    Args:
        group: of an optimizer.
        found: its parameters by kind.
        grads: of its parameters; None where one is not stepped.
        optimizer: the name of its class, for messages.
    """
    given: list[Any] = list(grads)
    shapes, devices = found.shapes, found.devices
    there = list(map(operator.is_not, grads, itertools.repeat(None)))
    if not all(there):
        given, shapes, devices = (
            list(itertools.compress(every, there)) for every in (given, shapes, devices)
        )
    if any(map(IS_SPARSE, given)):
        raise RuntimeError(f"{optimizer} does not support sparse gradients")
    if list(map(SHAPE, given)) != shapes or list(map(DEVICE, given)) != devices:
        _refuse_gradients(group, grads)
    for number in filter(there.__getitem__, found.self_overlapping):
        param = group["params"][number]
        raise RuntimeError(f"{_named(group, param)} cannot be written to: {overlap(param)}")


def _refuse_gradients(group: Group, grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(group["params"], grads, strict=True):
        if grad is not None and (grad.shape, grad.device) != (param.shape, param.device):
            raise RuntimeError(
                f"the gradient of {_named(group, param)} on {param.device} is of shape "
                f"{tuple(grad.shape)} on {grad.device}: the parameter has been replaced since the "
                "backward pass; take a new gradient, or set it to None"
            )


def sort(
    group: Group,
    found: Sorted,
    grads: Sequence[Tensor | None],
    parts: Parts,
) -> list[Bucket]:
    """The parameters that have gradients, by what is stepped in one call.

    Args:
        group: of an optimizer.
        found: its parameters by kind.
        grads: what its parameters are stepped with; None where one is not stepped.
        parts: the group's.

    Raises:
        RuntimeError, AssertionError: what a flag of the group excludes.
    """
    buckets: list[Bucket] = []
    for kind, numbers in found.members.items():
        # No loop in Python: with hundreds of small tensors it would cost as much as their step.
        params = list(map(group["params"].__getitem__, numbers))
        shapes = list(map(found.shapes.__getitem__, numbers))
        dtypes = list(map(found.state_dtypes.__getitem__, numbers))
        own: list[Any] = list(map(grads.__getitem__, numbers))
        bucket = Bucket(kind, group, parts, params, own, shapes, dtypes)
        there = list(map(operator.is_not, own, itertools.repeat(None)))
        if not all(there):
            bucket = part_of(bucket, list(itertools.compress(range(len(there)), there)))
            if not bucket.params:
                continue
        if group["capturable"] or group["rounding"] != "nearest" or kind.mesh is not None:
            _check(kind, group)
        if kind.mesh is not None:
            bucket.grads[:] = map(sharding.place, bucket.grads, bucket.params)
        if kind.elementwise or kind.device.type != "cpu" or len(bucket.params) == 1:
            buckets.append(bucket)
        else:  # on the CPU a few matrices at a time are faster
            buckets += _cut(bucket)
    return buckets


def part_of(bucket: Bucket, numbers: Sequence[int]) -> Bucket:
    """Some of a bucket's parameters, by their numbers in it."""
    return bucket._replace(
        params=list(map(bucket.params.__getitem__, numbers)),
        grads=list(map(bucket.grads.__getitem__, numbers)),
        shapes=list(map(bucket.shapes.__getitem__, numbers)),
        state_dtypes=list(map(bucket.state_dtypes.__getitem__, numbers)),
    )


def _cut(bucket: Bucket) -> Iterator[Bucket]:
    """A bucket in parts of at most ``ENTRIES_AT_ONCE`` entries each, or of one matrix."""
    begin, entries = 0, 0
    for index, size in enumerate(map(Tensor.numel, bucket.params)):
        if index > begin and entries + size > ENTRIES_AT_ONCE:
            yield part_of(bucket, range(begin, index))
            begin, entries = index, 0
        entries += size
    yield part_of(bucket, range(begin, len(bucket.params))) if begin else bucket


def batched(buckets: Iterable[tuple[Bucket, list[State]]]) -> list[Batch]:
    """Buckets of matrices with their states, grouped by whose updates are applied in one call.

    An operator costs little more for twenty small matrices than for one. Those of a batch are of
    one group, and have together at most ``ENTRIES_AT_ONCE`` entries, because their updates are kept
    until the last one is there. A larger bucket goes alone.
    """
    batches: list[Batch] = []
    shared: Any = None
    room = 0
    for bucket, own in buckets:
        kind, entries = bucket.kind, sum(map(Tensor.numel, bucket.params))
        now = id(bucket.group), kind.device, kind.wrapped, kind.turn, own[0]["step"].device
        if now != shared or entries > room:
            batches.append([])
            shared, room = now, ENTRIES_AT_ONCE
        batches[-1].append((bucket, own))
        room -= entries
    return batches


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


def overlaps_itself(param: Tensor) -> bool:
    """Whether entries may lie in one place: a dimension's stride is within the reach of others."""
    if type(param) not in PLAIN or param.is_contiguous() or not param.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def overlap(param: Tensor) -> str:
    """What is wrong with a parameter that overlaps itself, and the remedy."""
    return (
        f"its strides {param.stride()} put several entries in one place, as expand and as_strided "
        "do; give it memory of its own: "
        "param.data = param.data.clone(memory_format=torch.contiguous_format)"
    )


# -- state ---------------------------------------------------------------------------------------


@contextmanager
def stacked(
    states: Sequence[State],
    keys: Iterable[str],
    counts: Sequence[int],
    differentiable: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """The tensors under ``keys``, stacked; what is assigned or written to them reaches the states.

    An exception inside leaves the states as they were, unless there is one state alone and its
    tensors were written into.

    Args:
        states: one per parameter.
        keys: of the tensors.
        counts: matrices of each parameter, which is the leading size of its tensors.
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
            distribute(new[key], states, key, counts)
        elif len(states) > 1:
            own = [state[key] for state in states]
            torch._foreach_copy_(own, list(new[key].split(list(counts))))
        elif new[key] is not states[0][key]:
            states[0][key].copy_(new[key])


def distribute(whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int]) -> None:
    """Give ``state[key]`` of every state its part of ``whole``, in a storage of its own.

    Args:
        whole: all parts, one after the other.
        states: what gets them.
        key: where.
        counts: rows of each part.
    """
    if len(states) == 1:
        states[0][key] = whole
        return
    for state, part in zip(states, whole.split(list(counts)), strict=True):
        state[key] = part.clone(memory_format=torch.contiguous_format)


def check_dicts(bucket: Bucket, states: Sequence[Any]) -> None:
    """Raise RuntimeError where the user has put something else in the place of a state."""
    for param, state in zip(bucket.params, states, strict=True):
        if not isinstance(state, dict):
            raise RuntimeError(
                f"optimizer.state of {_who(bucket, param)} is {state!r} and no dict: put it back, "
                "or delete it to begin anew"
            )


def check_states(bucket: Bucket, states: Sequence[Any], keys: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError where the user has left a state that does not fit its parameter.

    Args:
        bucket: what is about to be stepped.
        states: of its parameters.
        keys: what ``init`` makes of one matrix; on the element-wise path the names alone count.
    """
    kind, params = bucket.kind, bucket.params
    try:
        tensors = [state[key] for key in keys for state in states]
    except KeyError:
        pairs = zip(params, states, strict=True)
        param, lost = next((p, keys.keys() - s) for p, s in pairs if keys.keys() - s)
        raise RuntimeError(
            f"state {min(lost)!r} of {_who(bucket, param)} is missing: put it back, or delete the "
            "whole entry of optimizer.state to begin anew"
        ) from None
    steps = list(map(STEP, states))
    every = [*tensors, *steps]
    types = set(map(type, every))
    if not types <= PLAIN and not all(map(issubclass, types, itertools.repeat(Tensor))):
        raise RuntimeError(
            f"state of {_who(bucket, params[0])} or of one like it has an entry that is no tensor: "
            "put the tensor back, or delete the whole entry of optimizer.state"
        )
    if any(map(Tensor.is_inference, every)) or not all(map(Tensor.is_contiguous, tensors)):
        _check_writable(bucket, states, keys)
    # One property of all tensors after the other: tensor by tensor, it would cost more than the
    # steps of small ones.
    if not (
        {NO_DIMS}.issuperset(map(SHAPE, steps))
        and COUNTS.issuperset(map(DTYPE, steps))
        and {CPU, kind.device}.issuperset(map(DEVICE, steps))
    ):
        _refuse_counts(bucket, steps)
    if bucket.group["rounding"] == "exact":
        check_lows(bucket, states)
    if kind.elementwise:
        shapes, dtypes = bucket.shapes * len(keys), bucket.state_dtypes * len(keys)
    else:
        size = kind.sides[0] * kind.sides[1]
        alike = bucket.shapes.count(bucket.shapes[0]) == len(params)
        shapes, dtypes = [], []
        for like in keys.values():
            dtypes += [like.dtype] * len(params)
            for param in params[:1] if alike else params:
                shape = torch.Size((param.numel() // size, *like.shape[1:]))
                shapes += [shape] * (len(params) if alike else 1)
    if (
        list(map(DTYPE, tensors)) == dtypes
        and list(map(SHAPE, tensors)) == shapes
        and {kind.device}.issuperset(map(DEVICE, tensors))
    ):
        return
    for index, tensor in enumerate(tensors):
        key, param = list(keys)[index // len(params)], params[index % len(params)]
        if tensor.device != kind.device:
            raise RuntimeError(
                f"state {key!r} of {_who(bucket, param)} lies on {tensor.device}, and the "
                f"parameter on {kind.device}: bring what was moved away back before the step"
            )
        if kind.mesh is None and (tensor.shape, tensor.dtype) != (shapes[index], dtypes[index]):
            raise RuntimeError(
                f"state {key!r} of {_who(bucket, param)} has become a tensor of "
                f"{tuple(tensor.shape)} and {tensor.dtype}, which does not fit: replace a "
                "state tensor only by one of its own shape and dtype"
            )


def _check_writable(bucket: Bucket, states: Sequence[Any], keys: Iterable[str]) -> None:
    for param, state in zip(bucket.params, states, strict=True):
        for key in (*keys, "step"):
            tensor = state[key]
            if tensor.layout != torch.strided:
                raise RuntimeError(
                    f"state {key!r} of {_who(bucket, param)} has become a tensor of layout "
                    f"{tensor.layout}: put tensor.to_dense() in its place"
                )
            expanded = overlaps_itself(tensor)
            if expanded or tensor.is_inference():
                raise RuntimeError(
                    f"state {key!r} of {_who(bucket, param)} cannot be written to: it has been "
                    f"{'expanded' if expanded else 'made in inference mode'}; put a clone, made "
                    "outside of it, in its place"
                )


def _refuse_counts(bucket: Bucket, steps: Sequence[Tensor]) -> None:
    for param, step in zip(bucket.params, steps, strict=True):
        if step.dim() or step.dtype not in COUNTS or step.device not in (CPU, bucket.kind.device):
            raise RuntimeError(
                f"state 'step' of {_who(bucket, param)} has become a tensor of "
                f"{tuple(step.shape)} and {step.dtype} on {step.device}: it must be a float32 "
                "scalar on the CPU or where the parameter is"
            )


def check_lows(bucket: Bucket, states: Sequence[Any]) -> None:
    """Raise RuntimeError for low bits that do not fit; a state may have them before its step."""
    for param, state in zip(bucket.params, states, strict=True):
        if "low" not in state or not keeps_low(param, bucket.group):
            continue
        low, wanted = state["low"], (param.shape, torch.int16, param.device)
        if not isinstance(low, Tensor) or (low.shape, low.dtype, low.device) != wanted:
            raise RuntimeError(
                f"state 'low' of {_who(bucket, param)} must be a tensor of {tuple(param.shape)} "
                f"and torch.int16 on {param.device}: put it back, or delete it to begin at zeros"
            )


def _who(bucket: Bucket, param: Tensor) -> str:
    return _named(bucket.group, param)


def _named(group: Mapping[str, Any], param: Tensor) -> str:
    names = group.get("param_names") or []
    known = [n for p, n in zip(group["params"], names, strict=False) if p is param]
    return f"parameter {''.join(known) or '(unnamed)'} of shape {tuple(param.shape)}"


def check_kept(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Raise ValueError where a state tensor's shape or dtype has changed."""
    for key, before in old.items():
        now = new[key]
        if now is before:
            continue
        if not isinstance(now, Tensor) or (now.shape, now.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"state {key!r} was a tensor of {_layout(before)} and cannot become one of "
                f"{_layout(now)}: keep what init made"
            )


_version = operator.attrgetter("_version")


def _layout(value: Any) -> tuple[Any, ...]:
    return (*value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)
