"""What torch asks of an optimizer, once for every class of the package.

A class says in :meth:`MemoryOptimizer._memory` and :meth:`MemoryOptimizer._output_map` which memory
takes the gradient in and which map makes an update of what it recalls. Groups, flags and the step
are here; ``checkpoint.py`` saves and loads, ``engine/`` carries a batched step out.
"""

import inspect
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deepopt import routing
from deepopt._arguments import Typed, check_types, typed
from deepopt._compat import (
    NoAutocast,
    check_fused,
    count_function_modes,
    disable_dynamo,
    graph_capture_health_check,
    is_distributed,
    scalar_dtype,
    use_grad_for_differentiable,
    without_function_mode,
)
from deepopt.memory import AnyMemory
from deepopt.ops import apply_update_
from deepopt.ops.rounding import roundings, store_rounded, to_fp32
from deepopt.optim import checkpoint
from deepopt.optim.diagnostics import Diagnosis, watch
from deepopt.optim.engine import State, adamw_path, sharding
from deepopt.optim.engine.adamw_path import dense, state_dtype
from deepopt.optim.engine.buckets import (
    STEP,
    Batch,
    Bucket,
    Group,
    Parts,
    Sorted,
    batched,
    check_dicts,
    check_gradients,
    check_kept,
    check_lows,
    check_states,
    distribute,
    part_of,
    sort,
    stacked,
)
from deepopt.optim.engine.low_bits import check_dtypes, check_rounding, lows_and_seeds
from deepopt.optim.flags import with_flags
from deepopt.optim.output_map import Identity, OutputMap

IDENTITY = Identity()
GRAD = operator.attrgetter("grad")
NO_ROUNDING: tuple[list[Tensor], list[int]] = ([], [])
SCHEDULED = frozenset(("lr", "betas", "eps", "weight_decay"))
OWN_KEYS = ("step", "low")
"""Entries of a state that are neither the memory's nor the output map's."""


class MemoryOptimizer(Optimizer):
    """An optimizer that steps matrices in batches of one shape and the rest by AdamW.

    State of a matrix parameter: ``step``, and the tensors of its memory and its output map with a
    leading dimension, the number of matrices in the parameter. State of any other: that of AdamW.
    Entries of the user's beside these are carried along, saved and loaded.
    """

    _least_dims: ClassVar[dict[str, int]] = {"matrix": 2, "stack": 3}
    """Dimensions that a path asks of a parameter; at 0, a vector is a matrix of one column."""
    _objects: ClassVar[tuple[str, ...]] = ("memory",)
    """Arguments that can be objects or functions: checkpoints have their descriptions instead."""
    _typed: ClassVar[Mapping[str, Typed | None]] = typed(torch.optim.AdamW.__init__)
    """Which arguments are numbers and flags: those of AdamW, and what the annotations of a class's
    constructor say of its own."""
    _looks_at_inputs: ClassVar[bool] = False
    """Whether :meth:`_gradients` has something to do."""

    _own_arguments: ClassVar[frozenset[str]] = frozenset()
    """Arguments that no schedule changes: where one is new, all of the class's checks run again."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._own_arguments = frozenset(inspect.signature(cls.__init__).parameters) - SCHEDULED
        if cls.__doc__:
            cls.__doc__ = with_flags(cls.__doc__)
        if "__init__" in vars(cls):
            cls._typed = {**cls._typed, **typed(cls.__init__)}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget()
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"Invalid params: a model ({type(params).__name__}) and not its parameters; give "
                "deepopt.param_groups(model), or model.parameters()"
            )
        self._check_group(defaults)  # before anything else: torch's order, and its messages
        super().__init__(params, {"split": 1, **defaults})
        checkpoint.describe_when_saved(self)
        if self._least_dims["matrix"]:  # rules that step vectors too may step embeddings
            routing.warn_of_groups(self.param_groups, stacklevel=4)

    # -- for the subclasses ------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for the first value of ``group`` that is out of range.

        TypeError where it is no number or flag at all, RuntimeError for flags that exclude each
        other.
        """
        lr: Any = group["lr"]
        betas: Any = group["betas"]
        check_types(self._typed, group)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        _check_foreach(group)
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas}; two values are needed")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["foreach"] and group["fused"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group["differentiable"] and (group["fused"] or group["foreach"]):
            flag = "fused" if group["fused"] else "foreach"
            raise RuntimeError(f"`{flag}` does not support `differentiable`")
        check_rounding(group)
        if group["path"] not in routing.PATHS:
            raise ValueError(f"Invalid path: {group['path']!r}; choose from {routing.PATHS}")

    def _memory(self, group: Group) -> AnyMemory:
        """What the gradients of a group's matrices are written into; raises for bad arguments."""
        raise NotImplementedError

    def _output_map(self, group: Group) -> OutputMap:
        """What makes an update of the momentum that the memory reads out."""
        return IDENTITY

    def _gradients(self, grads: list[Tensor | None], group: Group) -> list[Tensor | None]:
        """What a group's parameters are stepped with, from their unscaled gradients.

        They must not be written to. A parameter whose gradient is None is not stepped.
        """
        return grads

    def _describe(self, key: str, value: Any) -> str:
        """An argument that can be an object, as plain text: what a checkpoint knows it by."""
        if isinstance(value, str):
            return value
        if hasattr(value, "__qualname__"):  # functions
            return f"{value.__module__}.{value.__qualname__}"
        if type(value).__repr__ is object.__repr__:
            return type(value).__name__
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # another process has other addresses

    # -- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """torch's, which fills in the defaults, and then the same checks as in the constructor.

        Raises:
            ValueError: a value out of range, or a path or split that does not fit a parameter's
                shape; the optimizer is unchanged then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            check_dtypes(group)
            routing.check_group(group, self._least_dims)
        except Exception:
            self.param_groups.pop()
            raise
        self._kept_values[id(group)] = list(group.values())

    def __repr__(self) -> str:
        told = ("    param_names: ", "    reasons: ")  # the routing shows them, shortened
        lines = [line for line in super().__repr__().splitlines() if not line.startswith(told)]
        return "\n".join([*lines, "Routing:", *routing.describe(self.param_groups)])

    def _parts(self, group: Group) -> Parts:
        """The group's memory and output map, made anew when one of their arguments is replaced."""
        parts = self._kept_parts.get(id(group))
        if parts is None or not parts.hold(group):
            recorded = _Recorded(group)
            parts = Parts(self._memory(recorded), self._output_map(recorded), recorded.read, {})
            self._kept_parts[id(group)] = parts
        return parts

    def _forget(self) -> None:
        """Forget everything that was derived from the groups."""
        self._kept_parts: dict[int, Parts] = {}
        self._kept_sorted: dict[int, Sorted] = {}
        self._kept_values: dict[int, list[Any]] = {}

    # -- diagnostics -------------------------------------------------------------------------

    def diagnostics(self, spread: bool = False) -> AbstractContextManager[dict[str, Diagnosis]]:
        """What the steps inside do to every parameter: sizes, directions, what memories erase::

            with optimizer.diagnostics() as seen:
                optimizer.step()
            for name, row in seen.items():
                for key, value in row.scalars().items():
                    writer.add_scalar(f"{key}/{name}", value, number)

        Args:
            spread: compute singular values of the updates of matrices, too, which takes a
                decomposition for each (default: False).

        Returns:
            A context manager. Its value is a dict with a row for every parameter that the last
            step inside has stepped, by name, or by number ("parameter 0") where it has no name.

        Cost: none outside of the context. Inside, all parameters are copied, and they and their
        gradients are moved to the host, which waits for the device.
        """
        return watch(self, spread)

    def _report(self, group: Group, param: Tensor, route: routing.Route) -> dict[str, Tensor]:
        """What the memory says about itself for one parameter."""
        report = getattr(self._parts(group).memory, "report", None)
        if report is None or route.path == "elementwise" or not param.numel():
            return {}
        return report(self.state[param])

    # -- the step ----------------------------------------------------------------------------

    @disable_dynamo
    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        In a compiled training step it is a graph break and runs eagerly: what it depends on, the
        learning rate above all, can change without a recompilation.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.

        Raises:
            RuntimeError: a gradient that is sparse or of another shape or device, a parameter with
                several entries in one place, a DTensor of partial sums, or a state that does not
                fit its parameter; no parameter has moved then, nor where a value of a group was
                changed to one that the constructor refuses, which raises as it does. What a memory
                itself raises leaves the matrices of its call as they were; others may have been
                stepped before it.
            AssertionError: ``capturable=True`` with parameters on a device without graphs.
        """
        graph_capture_health_check(self)
        loss = None if closure is None else evaluated(closure)
        with undisturbed(bool(self.defaults["differentiable"])):
            # A GradScaler that leaves unscaling and skipping to the step sets these around it.
            scale: Tensor | None = getattr(self, "grad_scale", None)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            # All that can be wrong with a parameter or a gradient shows before any parameter moves.
            buckets: list[Bucket] = []
            for group in self.param_groups:
                grads: list[Tensor | None] = list(map(GRAD, group["params"]))
                if scale is not None:
                    grads = _unscaled(group["params"], grads, scale)
                buckets += self._buckets(group, grads, self._looks_at_inputs)
            self._step_buckets(buckets, self.state, found_inf)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(self.defaults["fused"])

    def _buckets(
        self, group: Group, grads: list[Tensor | None], look_at_inputs: bool = False
    ) -> list[Bucket]:
        """The parameters of a group that have gradients, by what is stepped in one call."""
        values, known = list(group.values()), self._kept_values.get(id(group), [])
        if len(values) != len(known):
            self._check_group(group)
        elif not all(same := list(map(operator.is_, values, known))):
            new = {key for key, kept in zip(group, same, strict=True) if not kept}
            if new.isdisjoint(self._own_arguments):
                MemoryOptimizer._check_group(self, group)
            else:
                self._check_group(group)
        self._kept_values[id(group)] = values
        before = self._kept_sorted.get(id(group))
        found = Sorted.of(group, self._least_dims, before)
        if found is not before:
            self._forget_groups_that_left()
            self._kept_sorted[id(group)] = found
        check_gradients(group, found, grads, type(self).__name__)
        if look_at_inputs and group["path"] != "elementwise":
            grads = self._gradients(grads, group)
        return sort(group, found, grads, self._parts(group))

    def _forget_groups_that_left(self) -> None:
        ids = set(map(id, self.param_groups))
        kinds: tuple[dict[int, Any], ...] = (self._kept_parts, self._kept_sorted, self._kept_values)
        for kept in kinds:
            for key in kept.keys() - ids:
                del kept[key]

    def _step_buckets(
        self, buckets: Sequence[Bucket], states: dict[Tensor, Any], found_inf: Tensor | None = None
    ) -> None:
        """Step all parameters in place; where ``found_inf`` is 1 nothing changes."""
        every = self._states(buckets, states)
        if found_inf is not None and is_distributed(found_inf):
            found_inf = sharding.whole(found_inf)
        matrices: Batch = []
        shared: Batch = []
        for bucket, own in zip(buckets, every, strict=True):
            kind = bucket.kind
            if kind.elementwise:
                found = None if found_inf is None else found_inf.to(kind.device)
                adamw_path.step(bucket, own, found)
            elif kind.shared:
                shared.append((bucket, own))
            elif kind.mesh is None:
                matrices.append((bucket, own))
            else:
                matrices.append(sharding.local_pieces(bucket, own))
        for batch in batched(matrices):
            found = None if found_inf is None else found_inf.to(batch[0][0].kind.device)
            self._step_matrices(batch, found)
        if shared:  # together: what travels for one is computed while the next is on its way
            self._step_shared(shared, found_inf)

    # -- state -------------------------------------------------------------------------------

    def _states(self, buckets: Sequence[Bucket], states: dict[Tensor, Any]) -> list[list[State]]:
        """The states of every bucket's parameters, made where there are none yet.

        Raises:
            RuntimeError: a state that the user has changed so that it no longer fits; nothing has
                been made then.
        """
        found: list[list[State]] = []
        made: list[tuple[Tensor, State]] = []
        for bucket in buckets:
            own: list[Any] = list(map(states.get, bucket.params, itertools.repeat({})))
            if not set(map(type, own)) <= {dict}:
                check_dicts(bucket, own)
            begun = list(map(operator.contains, own, itertools.repeat("step")))
            if all(begun):
                check_states(bucket, own, self._keys(bucket))
            else:
                old = list(itertools.compress(range(len(own)), begun))
                if old:
                    check_states(part_of(bucket, old), [own[i] for i in old], self._keys(bucket))
                new = [i for i, there in enumerate(begun) if not there]
                fresh = part_of(bucket, new)
                if bucket.group["rounding"] == "exact":
                    check_lows(fresh, [own[i] for i in new])
                made += zip(fresh.params, self._fresh_states(fresh), strict=True)
            found.append(own)
        if not made:
            return found
        for param, state in made:  # an entry of the user's may be there already
            states.setdefault(param, {}).update(state)
        return [[states[param] for param in bucket.params] for bucket in buckets]

    def _fresh_states(self, bucket: Bucket) -> list[State]:
        kind, group, params = bucket.kind, bucket.group, bucket.params
        if group["fused"]:
            for param in params:
                check_fused(param)
        if kind.elementwise:
            likes = map(dense, params) if kind.wrapped else params
            return [adamw_path.init(like, group) for like in likes]
        device = kind.device if group["capturable"] else "cpu"
        made: list[State] = [
            {"step": torch.zeros((), dtype=scalar_dtype(), device=device)} for _ in params
        ]
        if kind.mesh is not None:
            route = routing.Route(kind.path, kind.split)
            sharding.init(
                sharding.ShardedBucket.of(bucket, made),
                [self._expected_state(param, route, group) for param in params],
                lambda like: _init(bucket.parts, like),
            )
            return made
        counts = [param.numel() // math.prod(kind.sides) for param in params]
        like = torch.empty(sum(counts), *kind.sides, dtype=kind.state_dtype, device=kind.device)
        for key, tensor in _init(bucket.parts, like).items():
            distribute(tensor, made, key, counts)
        return made

    def _keys(self, bucket: Bucket) -> Mapping[str, Tensor]:
        """The state tensors that ``init`` makes, by name; all others are the user's."""
        if bucket.kind.elementwise:
            return adamw_path.KEYS
        keys, kind = bucket.parts.keys, bucket.kind
        layout = (*kind.sides, kind.state_dtype)
        if layout not in keys:  # as after a checkpoint has been loaded
            like = torch.empty(1, *kind.sides, dtype=kind.state_dtype, device="meta")
            _init(bucket.parts, like)
        return keys[layout]

    def _expected_state(
        self, param: Tensor, route: routing.Route, group: Group
    ) -> dict[str, Tensor]:
        """What a fresh state of ``param`` looks like, on the meta device."""
        like = torch.empty(param.shape, dtype=state_dtype(param), device="meta")
        expected = {"step": torch.empty((), device="meta")}
        if route.path == "elementwise" or not param.numel():
            return {**expected, **dict.fromkeys(adamw_path.KEYS, like)}
        rows = routing.matrices(like, route.path, route.split)
        return {**expected, **_init(self._parts(group), rows)}

    # -- matrices ----------------------------------------------------------------------------

    def _step_matrices(self, batch: Batch, found_inf: Tensor | None) -> None:
        """Step buckets one after the other, and apply their updates in one call.

        A tiny matrix costs what its operators cost to call. So those that can take tensors of any
        number and shape run once for all of a batch.
        """
        each: list[Tensor] = []
        matrices: list[int] = []
        for bucket, own in batch:
            size, before = math.prod(bucket.kind.sides), len(each)
            for grad, state in zip(bucket.grads, own, strict=True):
                each += [state["step"]] * (grad.numel() // size)
            matrices.append(len(each) - before)
        params: list[Tensor] = []
        updates: list[Tensor] = []
        states: list[State] = []
        try:
            steps = (torch.stack(each) + 1).split(matrices) if each else [each] * len(batch)
            for (bucket, own), step in zip(batch, steps, strict=True):
                if len(step):  # a rank of expert parallelism may have none
                    updates += self._updates(bucket, own, step, found_inf)
                    params += bucket.params
                states += own
        finally:  # where a memory raises, the buckets before it have been stepped
            if states:
                kind, group = batch[0][0].kind, batch[0][0].group
                lows, seeds = NO_ROUNDING
                if group["rounding"] != "nearest":
                    lows, seeds = lows_and_seeds(params, states, group)
                if params:
                    self._apply(params, updates, lows, seeds, group, found_inf, kind.wrapped)
                _count(list(map(STEP, states)), found_inf)

    def _updates(
        self, bucket: Bucket, states: list[State], step: Tensor, found_inf: Tensor | None
    ) -> list[Tensor]:
        """The updates of a bucket's parameters, whose new state is written."""
        kind, params = bucket.kind, bucket.params
        grads = [grad.reshape(-1, *kind.sides) for grad in bucket.grads]
        counts = list(map(len, grads))
        grad = torch.cat(grads) if len(grads) > 1 else grads[0]
        grad = grad.to(kind.state_dtype)
        with stacked(states, self._keys(bucket), counts, bucket.group["differentiable"]) as whole:
            whole["step"] = step
            update = _advance(bucket, whole, grad, found_inf)
        if len(params) == 1:
            return [update.reshape(params[0].shape)]
        parts = zip(update.split(counts), params, strict=True)
        return [part.reshape(param.shape) for part, param in parts]

    def _step_shared(self, shared: Batch, found_inf: Tensor | None) -> None:
        buckets = [bucket for bucket, _ in shared]

        def advance(index: int, whole: State, grad: Tensor) -> Tensor:
            before = dict(whole)
            update = _advance(buckets[index], whole, grad, found_inf)
            check_kept(before, whole)
            return update

        sharding.step(
            [sharding.ShardedBucket.of(bucket, own) for bucket, own in shared],
            advance,
            lambda i, piece, update: self._apply(
                [piece], [update], [], [], buckets[i].group, found_inf
            ),
        )
        for _, own in shared:
            _count([state["step"] for state in own], found_inf)

    def _apply(
        self,
        params: list[Tensor],
        updates: list[Tensor],
        lows: list[Tensor],
        seeds: list[int],
        group: Group,
        found_inf: Tensor | None,
        wrapped: bool = False,
    ) -> None:
        """Change parameters, or pieces of them, by their updates."""
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if found_inf is None and on_host and not group["differentiable"] and not wrapped:
            apply_update_(params, updates, lows, seeds, float(lr), float(group["weight_decay"]))
            return
        decay = 1 - lr * group["weight_decay"]
        for param, update, kept in zip(
            params, updates, roundings(params, lows, seeds), strict=True
        ):
            old = dense(param) if wrapped else to_fp32(param, state_dtype(param), kept)
            if group["differentiable"]:  # autograd keeps factors: not what is written to next
                old = old.clone()
            new = old * decay - update * lr
            if found_inf is not None:
                new = torch.where(found_inf.to(param.device).squeeze() > 0, old, new)
            store_rounded(param, new, kept)

    # -- checkpoints -------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        checkpoint.describe_when_saved(self)
        for group in self.param_groups:  # flags that an older version did not have
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for kept in self.state.values():  # older versions of torch had a number here
            if isinstance(kept, dict) and isinstance(kept.get("step"), int | float):
                kept["step"] = torch.tensor(float(kept["step"]), dtype=scalar_dtype(), device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps its precision and shares no storage with ``state_dict``.

        Objects such as memories are not loaded: those the optimizer was made with stay. Entries
        that the user has put beside an optimizer's own are loaded as they are, on the parameter's
        device.

        Raises:
            ValueError: the groups, the memory or the state are not those of this optimizer, which
                is unchanged then.
        """
        with undisturbed(), checkpoint.adopting(self, state_dict):
            super().load_state_dict(state_dict)

    def _routed(self) -> Iterator[tuple[Group, Tensor, routing.Route]]:
        for group in self.param_groups:
            for param, _, route in routing.routed(group):
                yield group, param, route


def _advance(bucket: Bucket, state: State, grad: Tensor, found_inf: Tensor | None) -> Tensor:
    """The update of matrices (B, m, n), whose new state is assigned."""
    before = dict(state)
    if bucket.group["maximize"]:
        grad = -grad
    if found_inf is not None:
        skip = found_inf.to(grad.device).squeeze() > 0
        grad = torch.where(skip, torch.zeros_like(grad), grad)
    parts, betas = bucket.parts, bucket.group["betas"]
    memory: Any = parts.memory
    if one_pass := getattr(memory, "write_and_read", None):
        momentum = one_pass(state, grad, betas[0])
    else:
        memory.write(state, grad, betas[0])
        momentum = memory.read(state, grad, betas[0])
    if momentum.shape != grad.shape:
        raise ValueError(
            f"Invalid memory: {memory} read {tuple(momentum.shape)} for gradients of "
            f"{tuple(grad.shape)}; it must return one momentum per gradient"
        )
    update = parts.output_map(momentum, state, grad, betas)
    if unknown := state.keys() - before.keys():
        raise ValueError(f"state {sorted(unknown)} was not made by init, so it is not kept")
    if found_inf is not None:
        for key in before.keys() - {"step"}:
            state[key] = torch.where(skip, before[key], state[key])
    return update


class _Recorded(dict[str, Any]):
    """A group that records which of its arguments are read."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.read[key] = super().__getitem__(key)
        return self.read[key]

    def get(self, key: str, default: Any = None) -> Any:
        self.read[key] = super().get(key)
        return super().get(key, default)


def _init(parts: Parts, like: Tensor) -> State:
    """State for matrices ``like``, shape (B, m, n): tensors with leading size B."""
    whole = dict(parts.memory.init(like))
    mapped = parts.output_map.init(like)
    if own := whole.keys() & {*OWN_KEYS, *mapped}:
        raise ValueError(
            f"Invalid memory: its state must not use the names {own}, which are the optimizer's own"
        )
    whole.update(mapped)
    for key, tensor in whole.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != like.shape[:1]:
            raise ValueError(
                f"state {key!r} must be a tensor of leading size {len(like)}, one row per "
                f"matrix, but is {getattr(tensor, 'shape', tensor)!r}"
            )
    parts.keys[like.shape[1], like.shape[2], like.dtype] = {
        key: torch.empty(1, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
        for key, tensor in whole.items()
    }
    return whole


def arguments_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an optimizer by name, from the ``locals()`` of its constructor."""
    return {n: value for n, value in names.items() if n not in ("self", "params", "__class__")}


def evaluated(closure: Callable[[], Any]) -> Any:
    """The loss of a closure, which computes gradients whatever the grad mode of the step is."""
    with torch.enable_grad():
        return closure()


def undisturbed(grad: bool = False) -> ExitStack:
    """A context in which nothing that the caller has switched on changes what is computed.

    Autocast is off, new tensors are ordinary ones in inference mode too, and neither a default
    device nor another ``TorchFunctionMode`` of the caller's sees the calls.

    Args:
        grad: whether gradients are recorded inside, where the caller is in inference mode.
    """
    stack = ExitStack()
    stack.enter_context(NoAutocast())
    for _ in range(count_function_modes()):
        stack.enter_context(without_function_mode())
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
    return stack


def _unscaled(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], scale: Tensor
) -> list[Tensor | None]:
    """In float32: what loss scaling keeps from underflow must not underflow here."""
    return [
        None if grad is None else grad.to(state_dtype(param)) / scale.to(grad.device)
        for param, grad in zip(params, grads, strict=True)
    ]


def _count(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Count the step, unless it was skipped."""
    if found_inf is None:
        torch._foreach_add_(steps, 1.0)
        return
    # One trip to the host, if the counts are there.
    skip = (found_inf.squeeze() > 0).to(steps[0].device, steps[0].dtype)
    for step in steps:
        step += 1 - skip


def _check_foreach(group: Mapping[str, Any]) -> None:
    if isinstance(group["lr"], Tensor) and group["foreach"] and not group["capturable"]:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
