"""What a checkpoint holds, and what is checked before one is loaded.

A checkpoint is plain data and tensors. Objects such as memories are stored as descriptions. A
checkpoint of another class, other arguments or other shapes is refused before anything changes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from deepopt import routing
from deepopt.optim.engine import sharding
from deepopt.optim.engine.low_bits import keeps_low

if TYPE_CHECKING:
    from deepopt.optim.base import Group, MemoryOptimizer


# -- saving --------------------------------------------------------------------------------------


def describe_when_saved(optimizer: "MemoryOptimizer") -> None:
    """Register the hook that makes ``state_dict`` plain data. It runs before the user's hooks."""
    if _describe not in optimizer._optimizer_state_dict_post_hooks.values():
        optimizer.register_state_dict_post_hook(_describe, prepend=True)


def _describe(optimizer: Any, saved: dict[str, Any]) -> None:
    """Replace objects by their descriptions, and record the class and the routing."""
    saved["optimizer"] = type(optimizer).__name__
    saved["routing"] = [routing.labels(group) for group in optimizer.param_groups]
    for group in saved["param_groups"]:
        for key in group.keys() & optimizer._objects:
            group[key] = optimizer._describe(key, group[key])


# -- loading -------------------------------------------------------------------------------------


@contextmanager
def adopting(optimizer: "MemoryOptimizer", state_dict: Any) -> Iterator[None]:
    """A context for torch's ``load_state_dict``, in which hooks of ours do most of the loading.

    They check the checkpoint first, keep the optimizer's objects, and copy the state. The check
    runs after the user's pre-hooks and the copying before the user's post-hooks, so that what those
    hooks change is what counts.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "Invalid state_dict: it needs the keys 'state' and 'param_groups', as "
            "optimizer.state_dict() has them; is this the model's?"
        )
    incoming: dict[str, Any] = {}
    own_objects = [
        {key: group[key] for key in optimizer._objects if key in group}
        for group in optimizer.param_groups
    ]

    def adopt(_: Optimizer, incoming_dict: dict[str, Any]) -> dict[str, Any]:
        _check_incoming(optimizer, incoming_dict)
        incoming.update(incoming_dict)
        adopted = [dict(group) for group in incoming_dict["param_groups"]]
        for mine, originals, group in zip(
            optimizer.param_groups, own_objects, adopted, strict=False
        ):
            group.update(dict.fromkeys(originals))  # torch would make deep copies of them
            for key in optimizer.defaults:  # older checkpoints lack newer arguments
                group.setdefault(key, mine[key])
        # torch would rebuild and cast all entries, and fails for some of the user's, such as named
        # tuples. So it gets only the step counts, which it moves to the device they belong on.
        ids = {i for group in adopted for i in group["params"]}
        counts = {
            index: {key: state[key] for key in state.keys() & {"step"}} if index in ids else state
            for index, state in incoming_dict["state"].items()
        }
        return {**incoming_dict, "state": counts, "param_groups": adopted}

    def restore(_: Optimizer) -> None:
        for originals, group in zip(own_objects, optimizer.param_groups, strict=True):
            group.update(originals)
        ids = [i for group in incoming["param_groups"] for i in group["params"]]
        for index, (group, param, route) in zip(ids, optimizer._routed(), strict=True):
            if saved := incoming["state"].get(index, {}):
                _restore(optimizer, optimizer.state[param], saved, param, route, group)

    hooks = (
        optimizer.register_load_state_dict_pre_hook(adopt),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _restore(
    optimizer: "MemoryOptimizer",
    state: dict[str, Any],
    saved: Mapping[str, Any],
    param: Tensor,
    route: routing.Route,
    group: "Group",
) -> None:
    """Fill one parameter's state, in the dtypes of a fresh one; torch would cast to the param's."""
    expected = _expected(optimizer, saved, param, route, group)
    for key, value in saved.items():
        if key not in expected:  # the user's
            state[key] = tree_map_only(
                Tensor,
                lambda tensor: _copied(tensor, param.device),
                value,
                is_leaf=lambda node: isinstance(node, torch.Size),  # it would become a tuple
            )
            continue
        if not isinstance(value, Tensor):
            continue
        dtype, device = expected[key].dtype, param.device
        if key == "step":  # torch has cast it already, as it does for fused and capturable steps
            dtype = state[key].dtype
            fused = group["fused"] and route.path == "elementwise"
            device = param.device if fused or group["capturable"] else torch.device("cpu")
        else:
            path = route.path if param.numel() else "elementwise"
            value = sharding.place(value, param, path, route.split)
        state[key] = value.detach().to(device, dtype, copy=True)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``; a tensor on the meta device has no data to move, and stays there."""
    if "meta" in (tensor.device.type, device.type):
        return tensor.detach().clone()
    return tensor.detach().to(device, copy=True)


def _check_incoming(optimizer: "MemoryOptimizer", incoming: dict[str, Any]) -> None:
    """Raise ValueError unless this optimizer can adopt all of ``incoming``."""
    cls = type(optimizer).__name__
    if (saved_by := incoming.get("optimizer", cls)) != cls:
        raise ValueError(
            f"the checkpoint is from {saved_by}, but the optimizer is {cls}: use the checkpoint's "
            "class"
        )
    for mine, theirs in zip(optimizer.param_groups, incoming["param_groups"], strict=False):
        if "path" not in theirs and not incoming["state"]:
            raise ValueError(
                f"the checkpoint is not of {cls}: it has neither state nor the arguments of its "
                "groups; begin with a fresh optimizer"
            )
        own_objects = {key: mine[key] for key in optimizer._objects if key in mine}
        for key, value in own_objects.items():
            saved = theirs.get(key)
            ours, saved_as = optimizer._describe(key, value), optimizer._describe(key, saved)
            if saved is not None and ours != saved_as:
                raise ValueError(
                    f"the checkpoint's {key} is {saved_as}, the optimizer's is {ours}: make the "
                    "optimizer with the checkpoint's"
                )
        if len(theirs["params"]) != len(mine["params"]):
            continue  # torch's own check comes next, and has the better message
        names, saved_names = mine.get("param_names"), theirs.get("param_names")
        if names and saved_names and names != saved_names and set(names) == set(saved_names):
            raise ValueError(
                "the checkpoint has the same parameters in another order, and torch assigns state "
                f"by position: list the parameters in its order, from {saved_names[0]!r} on"
            )
        group = {**mine, **theirs, "params": mine["params"], **own_objects}
        optimizer._check_group(group)
        routing.check_group(group, optimizer._min_dims)
        for index, (param, name, route) in zip(
            theirs["params"], routing.routed(group), strict=True
        ):
            state = incoming["state"].get(index, {})
            if not isinstance(state, Mapping):
                raise ValueError(
                    f"the checkpoint's state of parameter {name or f'number {index}'} is {state!r} "
                    "and not a dict: leave it out to begin that parameter anew"
                )
            if state:
                _check_state(optimizer, state, param, name or f"number {index}", route, group)


def _check_state(
    optimizer: "MemoryOptimizer",
    state: Mapping[str, Any],
    param: Tensor,
    name: str,
    route: routing.Route,
    group: "Group",
) -> None:
    expected = _expected(optimizer, state, param, route, group)
    if "step" not in state and not state.keys() & expected.keys():
        return  # only entries of the user: the parameter has not been stepped yet
    step = state.get("step", 0.0)
    valid = isinstance(step, Real)
    if isinstance(step, Tensor):
        valid = not step.shape and not step.is_meta
    if not valid or not 0 <= float(step) < math.inf:
        raise ValueError(
            f"the checkpoint's step of parameter {name} is {step!r}; it must be the number "
            "of its steps"
        )
    if not expected.keys() <= state.keys() or any(
        key != "step" and not _fits(state[key], like, param) for key, like in expected.items()
    ):
        raise ValueError(
            f"the checkpoint's state of parameter {name} does not fit its {route.label} path: "
            f"expected {_shapes(expected)}, found {_shapes(state)}; make the optimizer with the "
            "checkpoint's class, arguments and groups"
        )


def _expected(
    optimizer: "MemoryOptimizer",
    state: Mapping[str, Any],
    param: Tensor,
    route: routing.Route,
    group: "Group",
) -> dict[str, Tensor]:
    """What the optimizer's entries look like; "low" is among them once the parameter has it."""
    expected = optimizer._expected_state(param, route, group)
    if "low" in state and keeps_low(param, group):
        expected["low"] = torch.empty(param.shape, dtype=torch.int16, device="meta")
    return expected


def _fits(value: Any, like: Tensor, param: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        return False
    return param.is_meta or not value.is_meta  # there would be no data to load


def _shapes(state: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(getattr(v, 'shape', ()))}" for key, v in state.items())
