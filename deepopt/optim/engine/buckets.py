"""Buckets: the parameters that one call steps, and their state stacked into one tensor per key.

torch keeps an optimizer's state per parameter, and users read, move, replace and drop it there. A
batched step needs it stacked. So a step gathers the state of its matrices into one tensor per key
and writes the new values back. No state is kept elsewhere: whoever holds the state of one parameter
holds that and nothing else. State tensors have a leading dimension, the number of matrices in their
parameter.
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
"""One of an optimizer's ``param_groups``."""
ENTRIES_AT_ONCE = 2**19
"""Upper bound on the matrix entries stepped in one call on the CPU.

A single larger matrix still goes alone. The temporaries of a call are then small enough that the
allocator keeps them for the next one. It returns larger ones to the system, and touching fresh
memory can cost more than the arithmetic. On every device this also bounds the updates that a batch
holds at once.
"""
PLAIN = {Tensor, torch.nn.Parameter}
"""Types of parameters that kernels can write to."""
SORTED_BY = ("path", "split", "param_names", "reasons", "rounding")
"""Arguments of a group on which the kinds of its parameters depend, or that exclude some kinds."""
CPU = torch.device("cpu")
STEP_DTYPES = {torch.float32, torch.float64}
"""Dtypes of step counts: the one that is torch's default dtype when the state is made."""
NO_DIMS = torch.Size()
# Getters for map(): a loop in Python over hundreds of small tensors costs as much as their step.
SHAPE, DTYPE, DEVICE = map(operator.attrgetter, ("shape", "dtype", "device"))
IS_SPARSE, VERSION = map(operator.attrgetter, ("is_sparse", "_version"))
STEP = operator.itemgetter("step")


class Kind(NamedTuple):
    """What parameters must share to be stepped in one call."""

    path: routing.Path
    device: torch.device
    split: int = 1
    sides: tuple[int, int] = (0, 0)
    """Rows and columns of the matrices; zeros on the element-wise path, which mixes shapes."""
    dtype: torch.dtype | None = None
    """None on the element-wise path, which mixes dtypes too."""
    state_dtype: torch.dtype | None = None
    wrapped: bool = False
    """Whether they are of a user's tensor class, on which kernels cannot work directly."""
    distributed: bool = False
    """Whether they are DTensors."""
    mesh: Any = None
    """The device mesh of DTensors on the matrix or stack path; None for all others."""
    across_ranks: bool = False
    """Whether their matrices lie in pieces on several ranks, or are replicated: each matrix is then
    stepped by one rank, and sent to the others."""
    overlap_id: int = 0
    """0, or a different number for each parameter that overlaps another one in memory. Such
    parameters are stepped one after the other, so that the result does not depend on which thread
    comes first."""


class UpdateRule(NamedTuple):
    """A group's memory and output map, and the arguments of the group that they were made from."""

    memory: AnyMemory
    output_map: OutputMap
    arguments: dict[str, Any]
    layouts: dict[tuple[Any, ...], dict[str, Tensor]]
    """The state tensors that ``init`` makes for one matrix, on the meta device, by the sides and
    dtype of the matrix. Other entries of a state are the user's."""

    def are_current(self, group: Group) -> bool:
        """Whether every argument is still the same object.

        Identity counts, because a user's object decides what its equality means. A tensor or a list
        can change in place, so it never counts as unchanged.
        """
        for name, value in self.arguments.items():
            if group.get(name) is not value or isinstance(value, Tensor | list):
                return False
        return True


class Bucket(NamedTuple):
    """Parameters of one kind that are stepped in one call; the lists have an entry for each."""

    kind: Kind
    group: Group
    rule: UpdateRule
    params: list[Tensor]
    grads: list[Tensor]
    shapes: list[torch.Size]
    state_dtypes: list[torch.dtype]


Batch: TypeAlias = list[tuple[Bucket, list[State]]]
"""Buckets, each with the states of its parameters."""


class SortedGroup(NamedTuple):
    """The kinds of a group's parameters, kept from step to step, and all that they depend on."""

    params: list[Tensor]
    arguments: list[Any]
    types: list[type]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    addresses: list[int] | None
    strides: list[tuple[int, ...]]
    self_overlapping: list[int]
    """Indices of the parameters with several entries in one place, as ``expand`` makes them."""
    members: dict[Kind, list[int]]
    """Indices of the parameters of each kind."""
    state_dtypes: list[torch.dtype]
    reusable: bool
    """False if there are DTensors on the matrix or stack path: none of the attributes above shows
    that one has been redistributed."""

    @classmethod
    def of(
        cls, group: Group, min_dims: Mapping[str, int], previous: "SortedGroup | None" = None
    ) -> "SortedGroup":
        """``previous`` if nothing that it depends on has changed, else the group sorted anew.

        Raises:
            ValueError: a path, a split or a rounding that does not fit a parameter.
        """
        params = group["params"]
        arguments = list(map(group.get, SORTED_BY))
        types, shapes = list(map(type, params)), list(map(SHAPE, params))
        dtypes, devices = list(map(DTYPE, params)), list(map(DEVICE, params))
        addresses, strides = _addresses(params), list(map(Tensor.stride, params))
        same = (
            previous is not None
            and previous.addresses == addresses
            and previous.strides == strides
            and previous.arguments == arguments
            and previous.types == types
            and previous.shapes == shapes
            and previous.dtypes == dtypes
            and previous.devices == devices
            # The lists are equally long, because the shapes are equal.
            and all(map(operator.is_, previous.params, params))
        )
        if previous is not None and same and previous.reusable:
            return previous
        if not same:
            check_dtypes(group)
            routing.check_group(group, min_dims)
        members: dict[Kind, list[int]] = {}
        routes, overlap_ids = routing.routes(group), _overlap_ids(params, addresses)
        for index, what_decides in enumerate(zip(params, routes, overlap_ids, strict=True)):
            members.setdefault(_kind(*what_decides), []).append(index)
        return cls(
            list(params),
            # Copies, because a list of names can change in place.
            [list(value) if isinstance(value, list) else value for value in arguments],
            types,
            shapes,
            dtypes,
            devices,
            addresses,
            strides,
            [index for index, param in enumerate(params) if overlaps_itself(param)],
            members,
            list(map(state_dtype, params)),
            not any(kind.mesh is not None for kind in members),
        )


def check_gradients(
    group: Group, sorted_group: SortedGroup, grads: Sequence[Tensor | None], optimizer: str
) -> None:
    """Raise RuntimeError for a gradient, or a parameter that has one, that cannot be stepped.

    Args:
        group: one of an optimizer's ``param_groups``.
        sorted_group: its parameters by kind.
        grads: the gradients of its parameters; None for one that is not stepped.
        optimizer: the name of its class, for messages.
    """
    present: list[Any] = list(grads)
    shapes, devices = sorted_group.shapes, sorted_group.devices
    has_grad = list(map(operator.is_not, grads, itertools.repeat(None)))
    if not all(has_grad):
        present, shapes, devices = (
            list(itertools.compress(values, has_grad)) for values in (present, shapes, devices)
        )
    if any(map(IS_SPARSE, present)):
        raise RuntimeError(f"{optimizer} does not support sparse gradients")
    if list(map(SHAPE, present)) != shapes or list(map(DEVICE, present)) != devices:
        _refuse_gradients(group, grads)
    for index in filter(has_grad.__getitem__, sorted_group.self_overlapping):
        param = group["params"][index]
        raise RuntimeError(
            f"{param_label(group, param)} cannot be written to: {overlap_text(param)}"
        )


def _refuse_gradients(group: Group, grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(group["params"], grads, strict=True):
        if grad is not None and (grad.shape, grad.device) != (param.shape, param.device):
            raise RuntimeError(
                f"the gradient of {param_label(group, param)} on {param.device} has shape "
                f"{tuple(grad.shape)} on {grad.device}: the parameter has been replaced since the "
                "backward pass; compute a new gradient, or set it to None"
            )


def make_buckets(
    group: Group,
    sorted_group: SortedGroup,
    grads: Sequence[Tensor | None],
    rule: UpdateRule,
) -> list[Bucket]:
    """The parameters of a group that have gradients, in buckets.

    Args:
        group: one of an optimizer's ``param_groups``.
        sorted_group: its parameters by kind.
        grads: what its parameters are stepped with; None for one that is not stepped.
        rule: the group's.

    Raises:
        RuntimeError, AssertionError: a flag of the group does not support a parameter.
    """
    buckets: list[Bucket] = []
    for kind, indices in sorted_group.members.items():
        params = list(map(group["params"].__getitem__, indices))
        shapes = list(map(sorted_group.shapes.__getitem__, indices))
        dtypes = list(map(sorted_group.state_dtypes.__getitem__, indices))
        kind_grads: list[Any] = list(map(grads.__getitem__, indices))
        bucket = Bucket(kind, group, rule, params, kind_grads, shapes, dtypes)
        has_grad = list(map(operator.is_not, kind_grads, itertools.repeat(None)))
        if not all(has_grad):
            bucket = part_of(bucket, list(itertools.compress(range(len(has_grad)), has_grad)))
            if not bucket.params:
                continue
        if group["capturable"] or group["rounding"] != "nearest" or kind.mesh is not None:
            _check_flags(kind, group)
        if kind.mesh is not None:
            bucket.grads[:] = map(sharding.place, bucket.grads, bucket.params)
        if kind.path == "elementwise" or kind.device.type != "cpu" or len(bucket.params) == 1:
            buckets.append(bucket)
        else:  # on the CPU a few matrices at a time are faster: see ENTRIES_AT_ONCE
            buckets += _split_by_size(bucket)
    return buckets


def part_of(bucket: Bucket, indices: Sequence[int]) -> Bucket:
    """A bucket of some of a bucket's parameters, by their indices in it."""
    return bucket._replace(
        params=list(map(bucket.params.__getitem__, indices)),
        grads=list(map(bucket.grads.__getitem__, indices)),
        shapes=list(map(bucket.shapes.__getitem__, indices)),
        state_dtypes=list(map(bucket.state_dtypes.__getitem__, indices)),
    )


def _split_by_size(bucket: Bucket) -> Iterator[Bucket]:
    """A bucket in parts of at most ``ENTRIES_AT_ONCE`` entries, or of one larger parameter."""
    begin, entries = 0, 0
    for index, size in enumerate(map(Tensor.numel, bucket.params)):
        if index > begin and entries + size > ENTRIES_AT_ONCE:
            yield part_of(bucket, range(begin, index))
            begin, entries = index, 0
        entries += size
    yield part_of(bucket, range(begin, len(bucket.params))) if begin else bucket


def batched(buckets: Iterable[tuple[Bucket, list[State]]]) -> list[Batch]:
    """Consecutive buckets of matrices, with their states, whose updates are applied in one call.

    An operator costs little more for twenty small matrices than for one. The buckets of a batch are
    of one group, and have together at most ``ENTRIES_AT_ONCE`` entries, because all their updates
    are held until the last one is computed. A larger bucket goes alone.
    """
    batches: list[Batch] = []
    batch_key: Any = None
    room = 0
    for bucket, states in buckets:
        kind, entries = bucket.kind, sum(map(Tensor.numel, bucket.params))
        key = id(bucket.group), kind.device, kind.wrapped, kind.overlap_id, states[0]["step"].device
        if key != batch_key or entries > room:
            batches.append([])
            batch_key, room = key, ENTRIES_AT_ONCE
        batches[-1].append((bucket, states))
        room -= entries
    return batches


def _check_flags(kind: Kind, group: Mapping[str, Any]) -> None:
    """Raise for a flag of the group that parameters of this kind exclude."""
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


def _kind(param: Any, route: routing.Route, overlap_id: int) -> Kind:
    distributed = is_distributed(param)
    wrapped = type(param) not in PLAIN and not distributed
    if route.path == "elementwise" or not param.numel():
        return Kind(
            "elementwise",
            param.device,
            wrapped=wrapped,
            distributed=distributed,
            overlap_id=overlap_id,
        )
    path, split = route.path, route.split
    kind = Kind(
        path,
        param.device,
        split,
        routing.sides(param, path, split),
        param.dtype,
        state_dtype(param),
        wrapped=wrapped,
        overlap_id=overlap_id,
    )
    if not distributed:
        return kind
    across_ranks = not sharding.is_local(sharding.spread(param, path, split))
    return kind._replace(distributed=True, mesh=param.device_mesh, across_ranks=across_ranks)


def _addresses(params: Sequence[Tensor]) -> list[int] | None:
    """Where the entries of each parameter begin; None if some have no memory of their own."""
    if not set(map(type, params)) <= PLAIN:
        return None
    try:
        return list(map(Tensor.data_ptr, params))
    except RuntimeError:  # under a transform such as vmap
        return None


def _overlap_ids(params: Sequence[Tensor], addresses: list[int] | None) -> list[int]:
    """The overlap id of each parameter: 0, or 1, 2, ... for those that overlap others in memory."""
    overlap_ids = [0] * len(params)
    if addresses is None:
        return overlap_ids
    # By address: a parameter overlaps an earlier one if it begins before the farthest end so far.
    # `last` is the parameter that reaches this end.
    end, last, number = -math.inf, -1, 0
    for index in sorted(range(len(params)), key=addresses.__getitem__):
        param = params[index]
        if not param.numel() or param.device.type == "meta":
            continue
        begin = addresses[index]
        if begin < end:
            overlap_ids[last] = overlap_ids[last] or (number := number + 1)
            overlap_ids[index] = number = number + 1
        reach = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
        if begin + (reach + 1) * param.element_size() > end:
            end, last = begin + (reach + 1) * param.element_size(), index
    return overlap_ids


def overlaps_itself(param: Tensor) -> bool:
    """Whether two entries may lie in one place.

    They do not if, from the smallest stride to the largest, each exceeds the distance that the
    dimensions before it span.
    """
    if type(param) not in PLAIN or param.is_contiguous() or not param.numel():
        return False
    reach = 0
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def overlap_text(param: Tensor) -> str:
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

    An exception inside leaves the states as they were, except where a memory writes in place into
    the tensors of a single state: those are not copies.

    Args:
        states: one per parameter.
        keys: those of the tensors.
        counts: matrices of each parameter, which is the leading size of its tensors.
        differentiable: give the states new tensors, with their history, instead of copying into
            the old ones.
    """
    if len(states) == 1:
        old = {key: states[0][key].contiguous() for key in keys}
    else:
        old = {key: torch.cat([state[key] for state in states]) for key in keys}
    new, versions = dict(old), list(map(VERSION, old.values()))
    yield new
    check_same_layout(old, new)
    for key, version in zip(keys, versions, strict=True):
        if new[key] is old[key] and VERSION(new[key]) == version:  # neither assigned nor written to
            continue
        if differentiable:
            distribute(new[key], states, key, counts)
        elif len(states) > 1:
            targets = [state[key] for state in states]
            torch._foreach_copy_(targets, list(new[key].split(list(counts))))
        elif new[key] is not states[0][key]:
            states[0][key].copy_(new[key])


def distribute(whole: Tensor, states: Sequence[State], key: str, counts: Sequence[int]) -> None:
    """Assign its part of ``whole`` to ``state[key]`` of every state, in a storage of its own.

    Args:
        whole: all parts, one after the other along dimension 0.
        states: one for each part.
        key: the entry that is assigned.
        counts: rows of each part.
    """
    if len(states) == 1:
        states[0][key] = whole
        return
    for state, part in zip(states, whole.split(list(counts)), strict=True):
        state[key] = part.clone(memory_format=torch.contiguous_format)


def check_dicts(bucket: Bucket, states: Sequence[Any]) -> None:
    """Raise RuntimeError if the user has replaced a state by something that is not a dict."""
    for param, state in zip(bucket.params, states, strict=True):
        if not isinstance(state, dict):
            raise RuntimeError(
                f"optimizer.state of {param_label(bucket.group, param)} is {state!r} and not a "
                "dict: put the dict back, or delete the entry to begin anew"
            )


def check_states(bucket: Bucket, states: Sequence[Any], keys: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError if a state does not fit its parameter, because the user changed it.

    Args:
        bucket: what is about to be stepped.
        states: the states of its parameters.
        keys: what ``init`` makes of one matrix; on the element-wise path the names alone count.
    """
    # One property of all tensors after the other: tensor by tensor, it would cost more than the
    # steps of small ones.
    kind, params = bucket.kind, bucket.params
    try:
        tensors = [state[key] for key in keys for state in states]
    except KeyError:
        pairs = zip(params, states, strict=True)
        param, lost = next((p, keys.keys() - s) for p, s in pairs if keys.keys() - s)
        raise RuntimeError(
            f"state {min(lost)!r} of {param_label(bucket.group, param)} is missing: put it back, "
            "or delete the whole entry of optimizer.state to begin anew"
        ) from None
    steps = list(map(STEP, states))
    state_tensors = [*tensors, *steps]
    types = set(map(type, state_tensors))
    if not types <= PLAIN and not all(map(issubclass, types, itertools.repeat(Tensor))):
        raise RuntimeError(
            f"state of {param_label(bucket.group, params[0])}, or of a parameter in its bucket, "
            "has an entry that is not a tensor: put the tensor back, or delete the whole entry of "
            "optimizer.state"
        )
    if any(map(Tensor.is_inference, state_tensors)) or not all(map(Tensor.is_contiguous, tensors)):
        _check_writable(bucket, states, keys)
    if not (
        {NO_DIMS}.issuperset(map(SHAPE, steps))
        and STEP_DTYPES.issuperset(map(DTYPE, steps))
        and {CPU, kind.device}.issuperset(map(DEVICE, steps))
    ):
        _refuse_counts(bucket, steps)
    if bucket.group["rounding"] == "exact":
        check_lows(bucket, states)
    if kind.path == "elementwise":
        shapes, dtypes = bucket.shapes * len(keys), bucket.state_dtypes * len(keys)
    else:
        size = kind.sides[0] * kind.sides[1]
        one_shape = bucket.shapes.count(bucket.shapes[0]) == len(params)
        shapes, dtypes = [], []
        for like in keys.values():
            dtypes += [like.dtype] * len(params)
            for param in params[:1] if one_shape else params:
                shape = torch.Size((param.numel() // size, *like.shape[1:]))
                shapes += [shape] * (len(params) if one_shape else 1)
    if not (
        list(map(DTYPE, tensors)) == dtypes
        and list(map(SHAPE, tensors)) == shapes
        and {kind.device}.issuperset(map(DEVICE, tensors))
    ):
        _refuse_tensors(bucket, tensors, list(keys), shapes, dtypes)


def _refuse_tensors(
    bucket: Bucket,
    tensors: Sequence[Tensor],
    keys: Sequence[str],
    shapes: Sequence[torch.Size],
    dtypes: Sequence[torch.dtype],
) -> None:
    kind, params = bucket.kind, bucket.params
    for index, tensor in enumerate(tensors):
        key, param = keys[index // len(params)], params[index % len(params)]
        if tensor.device != kind.device:
            raise RuntimeError(
                f"state {key!r} of {param_label(bucket.group, param)} lies on {tensor.device}, and "
                f"the parameter on {kind.device}: move the state back before the step"
            )
        # Under a mesh the shapes are those of pieces, which the exchange itself checks.
        if kind.mesh is None and (tensor.shape, tensor.dtype) != (shapes[index], dtypes[index]):
            raise RuntimeError(
                f"state {key!r} of {param_label(bucket.group, param)} has become a tensor of "
                f"{tuple(tensor.shape)} and {tensor.dtype}, which does not fit: replace a "
                "state tensor only by one of the same shape and dtype"
            )


def _check_writable(bucket: Bucket, states: Sequence[Any], keys: Iterable[str]) -> None:
    for param, state in zip(bucket.params, states, strict=True):
        for key in (*keys, "step"):
            tensor = state[key]
            if tensor.layout != torch.strided:
                raise RuntimeError(
                    f"state {key!r} of {param_label(bucket.group, param)} has become a tensor of "
                    f"layout {tensor.layout}: replace it by tensor.to_dense()"
                )
            expanded = overlaps_itself(tensor)
            if expanded or tensor.is_inference():
                raise RuntimeError(
                    f"state {key!r} of {param_label(bucket.group, param)} cannot be written to: it "
                    f"has been {'expanded' if expanded else 'made in inference mode'}; replace it "
                    "by a clone that is made outside of inference mode"
                )


def _refuse_counts(bucket: Bucket, steps: Sequence[Tensor]) -> None:
    for param, step in zip(bucket.params, steps, strict=True):
        if (
            step.dim()
            or step.dtype not in STEP_DTYPES
            or step.device not in (CPU, bucket.kind.device)
        ):
            raise RuntimeError(
                f"state 'step' of {param_label(bucket.group, param)} has become a tensor of "
                f"{tuple(step.shape)} and {step.dtype} on {step.device}: it must be a float32 "
                "or float64 scalar on the CPU or where the parameter is"
            )


def check_lows(bucket: Bucket, states: Sequence[Any]) -> None:
    """Raise RuntimeError for low bits that do not fit their parameter.

    They need not come with a "step": a user may set them before the first step.
    """
    for param, state in zip(bucket.params, states, strict=True):
        if "low" not in state or not keeps_low(param, bucket.group):
            continue
        low, expected = state["low"], (param.shape, torch.int16, param.device)
        if not isinstance(low, Tensor) or (low.shape, low.dtype, low.device) != expected:
            raise RuntimeError(
                f"state 'low' of {param_label(bucket.group, param)} must be a tensor of "
                f"{tuple(param.shape)} and torch.int16 on {param.device}: put it back, or delete "
                "it to begin at zeros"
            )


def param_label(group: Mapping[str, Any], param: Tensor) -> str:
    """How messages name a parameter of a group."""
    names = group.get("param_names") or []
    known = [n for p, n in zip(group["params"], names, strict=False) if p is param]
    return routing.param_text(param, "".join(known))


def check_same_layout(old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Raise ValueError if the shape or dtype of a state tensor has changed."""
    for key, before in old.items():
        now = new[key]
        if now is before:
            continue
        if not isinstance(now, Tensor) or (now.shape, now.dtype) != (before.shape, before.dtype):
            raise ValueError(
                f"state {key!r} was a tensor of {_layout(before)} and cannot become one of "
                f"{_layout(now)}: keep the shape and dtype that init made"
            )


def _layout(value: Any) -> tuple[Any, ...]:
    return (*value.shape, value.dtype) if isinstance(value, Tensor) else (type(value),)
