"""What torch asks of an optimizer, once for every class of the package.

A class says in :meth:`MemoryOptimizer._memory` and :meth:`MemoryOptimizer._output_map` which memory
takes the gradient in and which map makes an update of what it recalls; groups, flags, state and
checkpoints are done here.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deepopt._compat import (
    capturable_devices,
    check_fused,
    disable_dynamo,
    graph_capture_health_check,
    is_distributed,
    scalar_dtype,
    use_grad_for_differentiable,
)
from deepopt.memory import Memory
from deepopt.ops import apply_update_
from deepopt.ops.rounding import roundings, store_rounded, to_fp32
from deepopt.optim import elementwise, groups, routing, sharding
from deepopt.optim.elementwise import state_dtype
from deepopt.optim.output_map import Identity, OutputMap
from deepopt.optim.rounding import check_rounding, lows_and_seeds
from deepopt.optim.stacking import Joints, State, distribute, stacked

Group: TypeAlias = dict[str, Any]
IDENTITY = Identity()
NO_ROUNDING: tuple[list[Tensor], list[int]] = ([], [])

ENTRIES_AT_ONCE = 2**19
"""Upper bound on the matrix entries stepped in one call on the CPU.

A single larger matrix still goes alone. The temporaries of a call are then small enough that the
allocator keeps them for the next one. It returns larger ones to the system, and touching fresh
memory can cost more than the arithmetic.
"""


class Kind(NamedTuple):
    """What matrices must share to be stepped in one call."""

    path: routing.Path
    split: int
    sides: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    state_dtype: torch.dtype
    mesh: Any = None
    """The device mesh of DTensors; None for ordinary tensors."""
    dealt: bool = False
    """Whether ranks hold pieces of matrices, or the same matrices: they then share the work out."""


class Bucket(NamedTuple):
    """What is stepped in one call: matrices of one kind, or (kind None) the element-wise path."""

    kind: Kind | None
    group: Group
    params: list[Tensor]
    grads: list[Tensor]

    @property
    def dealt(self) -> bool:
        """Whether ranks share its matrices out among themselves."""
        return self.kind is not None and self.kind.dealt


class Kinds(NamedTuple):
    """The kinds of a group's parameters, and what they were derived from."""

    params: list[Tensor]
    asked: list[Any]
    told: list[tuple[Any, ...]]
    kinds: list[Kind | None]


NO_ARGUMENTS = ("params", "param_names", "reasons")
"""What a group has beside its arguments."""
KIND_OPTIONS = ("path", "split", "param_names", "reasons")
"""Arguments of a group that a kind depends on."""
KIND_ATTRIBUTES = operator.attrgetter("shape", "dtype", "device", "__class__")


class MemoryOptimizer(Optimizer):
    """An optimizer that steps matrices in batches of one shape and the rest by AdamW.

    State of a matrix parameter: ``step``, and the tensors of its memory and its output map with a
    leading dimension, the number of matrices in the parameter. State of any other: that of AdamW.
    """

    _least_dims: ClassVar[dict[str, int]] = {"matrix": 2, "stack": 3}
    """Dimensions that a path asks of a parameter; at 0, a vector is a matrix of one column."""
    _objects: ClassVar[tuple[str, ...]] = ("memory",)
    """Arguments that can be objects or functions: checkpoints have their descriptions instead."""
    _looks_at_inputs: ClassVar[bool] = False
    """Whether :meth:`_gradients` has something to do."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._joints: Joints = {}
        self._kept_kinds: dict[int, Kinds] = {}
        self._made: dict[int, tuple[list[Any], Memory, OutputMap]] = {}
        self._check_group(defaults)  # before anything else: torch's order, and its messages
        super().__init__(params, {"split": 1, **defaults})
        if self._least_dims["matrix"]:  # a rule for vectors too has nothing against embeddings
            groups.warn_of_groups(self.param_groups, stacklevel=4)

    # -- for the subclasses ------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for the first value of ``group`` that is out of range."""
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        _check_foreach(group)
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
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

    def _memory(self, group: Group) -> Memory:
        """What the gradients of a group's matrices are written into; raises for bad arguments."""
        raise NotImplementedError

    def _output_map(self, group: Group) -> OutputMap:
        """What makes an update of the momentum that the memory reads out."""
        return IDENTITY

    def _gradients(self, grads: list[Tensor | None], group: Group) -> list[Tensor | None]:
        """What a group's parameters are stepped with, from their unscaled gradients.

        These must not be written to. None lets a parameter rest.
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
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # which no other process would have

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
            routing.check_group(group, self._least_dims)
        except Exception:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        told = ("    param_names: ", "    reasons: ")  # by the routing, or too long
        lines = [line for line in super().__repr__().splitlines() if not line.startswith(told)]
        return "\n".join([*lines, "Routing:", *groups.describe(self.param_groups)])

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
            RuntimeError: a sparse gradient, or a DTensor of partial sums; no parameter has moved
                then.
            AssertionError: ``capturable=True`` with parameters on a device without graphs.
        """
        graph_capture_health_check(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A GradScaler that leaves unscaling and skipping to the step sets these around it.
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        # All that can be wrong with a parameter or a gradient shows before any parameter moves.
        buckets: list[Bucket] = []
        for group in self.param_groups:
            grads: list[Tensor | None] = [param.grad for param in group["params"]]
            if scale is not None:
                # In float32: what loss scaling keeps from underflow must not underflow here.
                grads = [
                    None if grad is None else grad.to(state_dtype(param)) / scale.to(grad.device)
                    for param, grad in zip(group["params"], grads, strict=True)
                ]
            if group["path"] != "elementwise" and self._looks_at_inputs:
                grads = self._gradients(grads, group)
            buckets += self._buckets(group, grads)
        self._step_buckets(buckets, self.state, found_inf)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(self.defaults["fused"])

    def _buckets(self, group: Group, grads: Sequence[Tensor | None]) -> list[Bucket]:
        """The parameters of a group that have gradients, by what is stepped in one call.

        Args:
            group: of this optimizer.
            grads: what its parameters are stepped with, in their order.
        """
        if isinstance(group["lr"], Tensor):  # torch would find one after matrices have moved
            _check_foreach(group)
        buckets: list[Bucket] = []
        last: dict[Kind | bool, Bucket] = {}
        entries: dict[Kind, int] = {}
        capturable, small = group["capturable"], elementwise.SMALL
        for param, kind, grad in zip(group["params"], self._kinds(group), grads, strict=True):
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if capturable and param.device.type not in capturable_devices():
                raise AssertionError(
                    "If capturable=True, params and state_steps must be on supported devices: "
                    f"{capturable_devices()}."
                )
            if group["rounding"] != "nearest" and is_distributed(param):
                raise RuntimeError(
                    f"rounding={group['rounding']!r} does not support DTensor parameters; use "
                    "rounding='nearest'"
                )
            if kind is None:
                alike: Kind | bool = param.numel() <= small
            else:
                alike = kind
                if kind.mesh is not None:
                    if group["differentiable"]:
                        raise RuntimeError("`differentiable` does not support DTensor parameters")
                    grad = sharding.place(grad, param)
                elif kind.device.type == "cpu":  # where a few matrices at a time are faster
                    entries[kind] = entries.get(kind, 0) + param.numel()
                    if entries[kind] > ENTRIES_AT_ONCE:
                        last.pop(kind, None)
                        entries[kind] = param.numel()
            bucket = last.get(alike)
            if bucket is None:
                bucket = last[alike] = Bucket(kind, group, [], [])
                buckets.append(bucket)
            bucket.params.append(param)
            bucket.grads.append(grad)
        return buckets

    def _kinds(self, group: Group) -> list[Kind | None]:
        """The kind of every parameter of a group; None for those of the element-wise path.

        Kinds are kept from step to step, until a parameter or an argument that they depend on
        changes.
        """
        params = group["params"]
        asked = list(map(group.get, KIND_OPTIONS))
        told = list(map(KIND_ATTRIBUTES, params))
        kept = self._kept_kinds.get(id(group))
        if (
            kept is not None
            and kept.told == told
            and kept.asked == asked
            and all(map(operator.is_, kept.params, params))
        ):
            return kept.kinds
        kinds = [
            self._kind(param, route)
            for param, route in zip(params, routing.routes(group), strict=True)
        ]
        # A DTensor can come to be placed otherwise, which its attributes above do not tell.
        if all(kind is None or kind.mesh is None for kind in kinds):
            self._forget_left_groups()
            self._kept_kinds[id(group)] = Kinds(list(params), _copied(asked), told, kinds)
        return kinds

    def _kind(self, param: Tensor, route: routing.Route) -> Kind | None:
        """What a parameter must share with others to be stepped with them."""
        if route.path == "elementwise" or not param.numel():
            return None
        path, split = route.path, route.split
        kind = Kind(
            path,
            split,
            routing.sides(param, path, split),
            param.dtype,
            param.device,
            state_dtype(param),
        )
        if not is_distributed(param):
            return kind
        dealt = not sharding.at_home(sharding.spread(param, path, split))
        return kind._replace(mesh=sharding.mesh(param), dealt=dealt)

    def _step_buckets(
        self, buckets: Sequence[Bucket], states: dict[Tensor, Any], found_inf: Tensor | None = None
    ) -> None:
        """Step all parameters in place; where ``found_inf`` is 1 nothing changes."""
        owns = [self._init_states(bucket, states) for bucket in buckets]
        joined = len(self._joints)
        if found_inf is not None and is_distributed(found_inf):
            found_inf = sharding.whole(found_inf)
        dealt = [pair for pair in zip(buckets, owns, strict=True) if pair[0].dealt]
        if dealt:
            self._step_dealt([b for b, _ in dealt], [own for _, own in dealt], found_inf)
        for bucket, own in zip(buckets, owns, strict=True):
            found = None if found_inf is None else found_inf.to(bucket.params[0].device)
            if bucket.kind is None:
                elementwise.step(
                    bucket.params, bucket.grads, own, bucket.group, self._joints, found
                )
            elif bucket.kind.mesh is None:
                self._step_matrices(bucket, bucket.kind, own, found)
            elif not bucket.kind.dealt:
                with sharding.at_hand(bucket.params, bucket.grads, own) as (params, grads, here):
                    mine = bucket._replace(params=params, grads=grads)
                    self._step_matrices(mine, bucket.kind, here, found)
        if len(self._joints) > joined:  # keep nothing alive that has left the optimizer
            alive = set(map(id, states.values()))
            self._joints = {key: j for key, j in self._joints.items() if key in alive}

    def _init_states(self, bucket: Bucket, states: dict[Tensor, Any]) -> list[State]:
        """The states of a bucket's parameters, made where there are none yet."""
        kind, group = bucket.kind, bucket.group
        own: list[Any] = list(map(states.get, bucket.params))
        if all(own):
            return own
        fresh = [param for param, state in zip(bucket.params, own, strict=True) if not state]
        if group["fused"]:
            for param in fresh:
                check_fused(param)
        if kind is None:
            for param in fresh:
                states[param] = elementwise.init(param, group)
        else:
            device = kind.device if group["capturable"] else "cpu"
            made: list[State] = [
                {"step": torch.zeros((), dtype=scalar_dtype(), device=device)} for _ in fresh
            ]
            if kind.mesh is not None:
                route = routing.Route(kind.path, kind.split)
                sharding.init(
                    self._sharded(bucket._replace(params=fresh, grads=fresh), kind, made),
                    [self._expected_state(param, route, group) for param in fresh],
                    lambda like: self._make_state(like, group),
                )
            else:
                counts = [len(routing.matrices(param, kind.path, kind.split)) for param in fresh]
                like = torch.empty(
                    sum(counts), *kind.sides, dtype=state_dtype(fresh[0]), device=kind.device
                )
                for key, tensor in self._make_state(like, group).items():
                    distribute(tensor, made, key, counts)
            states.update(zip(fresh, made, strict=True))
        return [states[param] for param in bucket.params]

    def _init_matrices(self, like: Tensor, group: Group) -> State:
        """State for matrices ``like``, shape (B, m, n): tensors with leading size B."""
        whole = dict(self._memory(group).init(like))
        mapped = self._output_map(group).init(like)
        if own := whole.keys() & {"step", "low", *mapped}:
            raise ValueError(
                f"Invalid memory: its state must not use the names {own}, which are the "
                "optimizer's own"
            )
        return {**whole, **mapped}

    def _parts(self, group: Group) -> tuple[Memory, OutputMap]:
        """The group's memory and output map, made anew when an argument of the group is replaced.

        Arguments are compared by identity: what equality means is up to objects of the user. What
        can change in place, tensors and lists, lets nothing be kept.
        """
        values = [value for name, value in group.items() if name not in NO_ARGUMENTS]
        made = self._made.get(id(group))
        if (
            made is not None
            and len(made[0]) == len(values)
            and all(map(operator.is_, made[0], values))
        ):
            return made[1:]
        parts = self._memory(group), self._output_map(group)
        if not any(isinstance(value, Tensor | list) for value in values):
            self._forget_left_groups()
            self._made[id(group)] = (values, *parts)
        return parts

    def _forget_left_groups(self) -> None:
        """Keep nothing alive that has left the optimizer."""
        ids = set(map(id, self.param_groups))
        self._made = {key: made for key, made in self._made.items() if key in ids}
        self._kept_kinds = {key: kept for key, kept in self._kept_kinds.items() if key in ids}

    def _make_state(self, like: Tensor, group: Group) -> State:
        whole = self._init_matrices(like, group)
        for key, tensor in whole.items():
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != like.shape[:1]:
                raise ValueError(
                    f"state {key!r} must be a tensor of leading size {len(like)}, one row per "
                    f"matrix, but is {getattr(tensor, 'shape', tensor)!r}"
                )
        return whole

    def _step_matrices(
        self, bucket: Bucket, kind: Kind, states: list[State], found_inf: Tensor | None
    ) -> None:
        group, params = bucket.group, bucket.params
        grads = [grad.reshape(-1, *kind.sides) for grad in bucket.grads]
        counts = list(map(len, grads))
        if sum(counts):  # a rank of expert parallelism may have none
            grad = torch.cat(grads) if len(grads) > 1 else grads[0]
            grad = grad.to(kind.state_dtype)
            keys = [key for key in states[0] if key not in ("step", "low")]
            with stacked(states, keys, group["differentiable"], self._joints) as whole:
                pairs = zip(states, counts, strict=True)
                steps = [state["step"] for state, count in pairs for _ in range(count)]
                whole["step"] = torch.stack(steps) + 1
                update = self._advance(whole, grad, group, found_inf)
            updates = [
                p.reshape(q.shape) for p, q in zip(update.split(counts), params, strict=True)
            ]
            kept = NO_ROUNDING
            if group["rounding"] != "nearest":
                kept = lows_and_seeds(params, states, group)
            self._move(params, updates, kept, group, found_inf)
        self._count(states, found_inf)

    def _step_dealt(
        self, buckets: list[Bucket], owns: list[list[State]], found_inf: Tensor | None
    ) -> None:
        sharding.step(
            [
                self._sharded(bucket, bucket.kind, own)
                for bucket, own in zip(buckets, owns, strict=True)
                if bucket.kind
            ],
            lambda i, whole, grad: self._advance(whole, grad, buckets[i].group, found_inf),
            lambda i, piece, update: self._move(
                [piece], [update], ([], []), buckets[i].group, found_inf
            ),
        )
        for own in owns:
            self._count(own, found_inf)

    def _sharded(self, bucket: Bucket, kind: Kind, states: list[State]) -> sharding.Bucket:
        spreads = [sharding.spread(param, kind.path, kind.split) for param in bucket.params]
        dtype = state_dtype(bucket.params[0])
        return sharding.Bucket(kind.sides, dtype, bucket.params, spreads, bucket.grads, states)

    def _advance(
        self, state: State, grad: Tensor, group: Group, found_inf: Tensor | None
    ) -> Tensor:
        """The update of matrices (B, m, n), whose new state is assigned."""
        before = dict(state)
        if group["maximize"]:
            grad = -grad
        if found_inf is not None:
            skip = found_inf.to(grad.device).squeeze() > 0
            grad = torch.where(skip, torch.zeros_like(grad), grad)
        (memory, output_map), betas = self._parts(group), group["betas"]
        gain = None
        if both := getattr(memory, "write_and_read", None):
            momentum = both(state, grad, betas[0])
        else:
            memory.write(state, grad, betas[0])
            if factored := getattr(memory, "read_factored", None):
                momentum, gain = factored(state, grad, betas[0])
            else:
                momentum = memory.read(state, grad, betas[0])
        if momentum.shape != grad.shape:
            raise ValueError(
                f"Invalid memory: {memory} read {tuple(momentum.shape)} for gradients of "
                f"{tuple(grad.shape)}; it must return one momentum per gradient"
            )
        update = output_map(momentum, state, grad, betas, gain)
        if unknown := state.keys() - before.keys():
            raise ValueError(f"state {sorted(unknown)} was not made by init, so it is not kept")
        if found_inf is not None:
            for key in before.keys() - {"step"}:
                state[key] = torch.where(skip, before[key], state[key])
        return update

    def _count(self, states: list[State], found_inf: Tensor | None) -> None:
        taken: float | Tensor = 1.0
        for state in states:
            step = state["step"]
            if found_inf is not None and not isinstance(taken, Tensor):  # one trip to the host
                taken = 1 - (found_inf.squeeze() > 0).to(step.device, step.dtype)
            step += taken

    def _move(
        self,
        params: list[Tensor],
        updates: list[Tensor],
        rounding: tuple[list[Tensor], list[int]],
        group: Group,
        found_inf: Tensor | None,
    ) -> None:
        """Change parameters, or pieces of them, by their updates."""
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        on_host = not isinstance(lr, Tensor) or lr.device.type == "cpu"
        if found_inf is None and on_host and not group["differentiable"]:
            apply_update_(params, updates, *rounding, float(lr), float(group["weight_decay"]))
            return
        decay = 1 - lr * group["weight_decay"]
        for param, update, kept in zip(params, updates, roundings(params, *rounding), strict=True):
            old = to_fp32(param, state_dtype(param), kept)
            if group["differentiable"]:  # autograd keeps factors: not what is written to next
                old = old.clone()
            new = old * decay - update * lr
            if found_inf is not None:
                new = torch.where(found_inf.to(param.device).squeeze() > 0, old, new)
            store_rounded(param, new, kept)

    # -- checkpoints -------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._joints, self._made, self._kept_kinds = {}, {}, {}
        for group in self.param_groups:  # flags that an older version did not have
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for kept in self.state.values():  # older versions of torch had a number here
            if isinstance(kept, dict) and isinstance(kept.get("step"), int | float):
                kept["step"] = torch.tensor(float(kept["step"]), dtype=scalar_dtype(), device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """torch's, with objects such as memories replaced by their ``repr``: plain data.

        Beside it, as a record, ``optimizer``, the class, and ``routing``, for every group the
        paths of its parameters in order.
        """

        # First of the post-hooks: the user's see what is saved.
        def describe(_: Optimizer, saved: dict[str, Any]) -> None:
            saved["optimizer"] = type(self).__name__
            saved["routing"] = [groups.labels(group) for group in self.param_groups]
            for group in saved["param_groups"]:
                for key in group.keys() & self._objects:
                    group[key] = self._describe(key, group[key])

        hook = self.register_state_dict_post_hook(describe, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps its precision and shares no storage with ``state_dict``.

        Objects such as memories are not loaded: those the optimizer was made with stay.

        Raises:
            ValueError: the groups, the memory or the state are not those of this optimizer, which
                is unchanged then.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                "Invalid state_dict: it needs the keys 'state' and 'param_groups', as "
                "optimizer.state_dict() has them; is this the model's?"
            )
        incoming: dict[str, Any] = {}
        kept = [{key: g[key] for key in self._objects if key in g} for g in self.param_groups]

        # Last of the pre-hooks and first of the post-hooks: what the user's hooks change counts.
        def adopt(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check_incoming(given)
            incoming.update(given)
            adopted = [dict(group) for group in given["param_groups"]]
            for mine, objects, group in zip(self.param_groups, kept, adopted, strict=False):
                group.update(dict.fromkeys(objects))  # torch would make deep copies of them
                group.setdefault("split", mine["split"])  # from before there were splits
            return {**given, "param_groups": adopted}

        def restore(_: Optimizer) -> None:
            for objects, group in zip(kept, self.param_groups, strict=True):
                group.update(objects)
            ids = [i for group in incoming["param_groups"] for i in group["params"]]
            for index, (group, param, route) in zip(ids, self._routed(), strict=True):
                given = incoming["state"].get(index, {})
                expected = self._expected_state(param, route, group, given) if given else {}
                for key, value in given.items():
                    if isinstance(value, Tensor):
                        dtype, device = expected[key].dtype, param.device
                        if key == "step":  # torch put it where a fused step wants it
                            dtype = self.state[param][key].dtype
                            fused = group["fused"] and route.path == "elementwise"
                            on_device = fused or group["capturable"]
                            device = param.device if on_device else torch.device("cpu")
                        else:
                            path = route.path if param.numel() else "elementwise"
                            value = sharding.place(value, param, path, route.split)
                        self.state[param][key] = value.detach().to(device, dtype, copy=True)

        hooks = (
            self.register_load_state_dict_pre_hook(adopt),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_incoming(self, given: dict[str, Any]) -> None:
        """Raise ValueError unless ``given`` can be this optimizer's, whole and step by step."""
        if (saved_by := given.get("optimizer", type(self).__name__)) != type(self).__name__:
            raise ValueError(
                f"the checkpoint is of {saved_by}, the optimizer a {type(self).__name__}: make the "
                "optimizer with the checkpoint's class"
            )
        for mine, theirs in zip(self.param_groups, given["param_groups"], strict=False):
            if "path" not in theirs and not given["state"]:
                raise ValueError(
                    f"the checkpoint is not of {type(self).__name__}: it has neither state nor the "
                    "arguments of its groups; begin with a fresh optimizer"
                )
            own = {key: mine[key] for key in self._objects if key in mine}
            for key, value in own.items():
                saved = theirs.get(key)
                here, there = self._describe(key, value), self._describe(key, saved)
                if saved is not None and here != there:
                    raise ValueError(
                        f"the checkpoint's {key} is {there}, the optimizer's {here}: make the "
                        "optimizer with the checkpoint's"
                    )
            if len(theirs["params"]) != len(mine["params"]):
                continue  # torch's own check is next, and has the better words
            names, saved_names = mine.get("param_names"), theirs.get("param_names")
            if names and saved_names and names != saved_names and set(names) == set(saved_names):
                raise ValueError(
                    "the checkpoint has the same parameters in another order, and torch gives them "
                    f"their state by position: begin with {saved_names[0]!r}, as it does"
                )
            group = {**mine, **theirs, "params": mine["params"], **own}
            self._check_group(group)
            routing.check_group(group, self._least_dims)
            for index, (param, name, route) in zip(
                theirs["params"], routing.routed(group), strict=True
            ):
                if state := given["state"].get(index):
                    expected = self._expected_state(param, route, group, state)
                    if not 0 <= float(state.get("step", 0.0)) < math.inf:
                        raise ValueError(
                            f"the checkpoint's step of parameter {name or f'number {index}'} is "
                            f"{state['step']}; it must be the number of its steps"
                        )
                    found = {k: tuple(getattr(v, "shape", ())) for k, v in state.items()}
                    if found != {k: tuple(v.shape) for k, v in expected.items()}:
                        raise ValueError(
                            f"the checkpoint's state of parameter {name or f'number {index}'} does "
                            f"not fit its {route.label} path: expected {_shapes(expected)}, "
                            f"found {_shapes(state)}; make the optimizer with the "
                            "checkpoint's class, arguments and groups"
                        )

    def _expected_state(
        self, param: Tensor, route: routing.Route, group: Group, given: State | None = None
    ) -> dict[str, Tensor]:
        """What a fresh state of ``param`` looks like, on the meta device.

        ``given`` is the state that is to be like it: low bits are there once they were needed.
        """
        like = torch.empty(param.shape, dtype=state_dtype(param), device="meta")
        expected = {"step": torch.empty((), device="meta")}
        if given and "low" in given and param.dtype == torch.bfloat16:
            expected["low"] = torch.empty_like(like, dtype=torch.int16)
        if route.path == "elementwise" or not param.numel():
            return {**expected, "exp_avg": like, "exp_avg_sq": like}
        rows = routing.matrices(like, route.path, route.split)
        return {**expected, **self._init_matrices(rows, group)}

    def _routed(self) -> Iterator[tuple[Group, Tensor, routing.Route]]:
        for group in self.param_groups:
            for param, _, route in routing.routed(group):
                yield group, param, route


def _copied(values: list[Any]) -> list[Any]:
    """``values`` with copies of its lists, so that a change in place shows as a difference."""
    return [list(value) if isinstance(value, list) else value for value in values]


def _check_foreach(group: Group) -> None:
    if isinstance(group["lr"], Tensor) and group["foreach"] and not group["capturable"]:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")


def _shapes(state: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(getattr(v, 'shape', ()))}" for key, v in state.items())
