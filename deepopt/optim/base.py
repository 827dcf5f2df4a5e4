"""The base class of every optimizer here: parameter groups, flags and the step.

A subclass says in :meth:`MemoryOptimizer._memory` which memory gradients are written into, and in
:meth:`MemoryOptimizer._output_map` which map turns what the memory recalls into an update.
``checkpoint.py`` saves and loads; ``engine/`` batches the step. In the paper's words, memories are
a faster level inside the one that learns the weights (Eq 19, Eq 20, Eq 98, Eq 99).

A gradient on the matrix path goes through these functions, in this order: ``step``, ``_buckets``
(which parameters are stepped together), ``_step_buckets``, ``_step_matrices``, ``_updates`` (their
state as one tensor), ``_advance`` (write, read, output map), ``_apply`` (the parameter changes).
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
    SortedGroup,
    UpdateRule,
    batched,
    check_dicts,
    check_gradients,
    check_lows,
    check_same_layout,
    check_states,
    distribute,
    make_buckets,
    part_of,
    stacked,
)
from deepopt.optim.engine.low_bits import check_dtypes, check_rounding, lows_and_seeds
from deepopt.optim.flags import with_flags
from deepopt.optim.output_map import Identity, OutputMap

IDENTITY = Identity()
GRAD = operator.attrgetter("grad")
NO_ROUNDING: tuple[list[Tensor], list[int]] = ([], [])
SCHEDULED = frozenset(("lr", "betas", "eps", "weight_decay"))
"""Arguments that schedulers may change before each step."""
RESERVED_KEYS = ("step", "low")
"""State entries of the optimizer itself. No memory and no output map may use these names."""


class MemoryOptimizer(Optimizer):
    """An optimizer that steps matrices in batches of one shape and the rest by AdamW.

    The state of a matrix parameter holds ``step``, and the tensors of its memory and its output
    map. Their leading dimension is the number of matrices in the parameter. The state of any other
    parameter is AdamW's. Entries that the user adds are kept, saved and loaded.
    """

    _min_dims: ClassVar[dict[str, int]] = {"matrix": 2, "stack": 3}
    """Fewest dimensions of a parameter on a path; with 0, a vector is a matrix of one column."""
    _objects: ClassVar[tuple[str, ...]] = ("memory",)
    """Arguments that can be objects or functions: a checkpoint stores their descriptions."""
    _typed: ClassVar[Mapping[str, Typed | None]] = typed(torch.optim.AdamW.__init__)
    """Which arguments are numbers and flags: those of AdamW, and those that the annotations of a
    subclass's constructor add."""
    _transforms_gradients: ClassVar[bool] = False
    """Whether a step calls :meth:`_transform_gradients`. False saves the call."""
    _unscheduled: ClassVar[frozenset[str]] = frozenset()
    """Arguments that no scheduler changes. When one changes, all checks of the class run again;
    when a scheduled one changes, only those of the base class do."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._unscheduled = frozenset(inspect.signature(cls.__init__).parameters) - SCHEDULED
        if cls.__doc__:
            cls.__doc__ = with_flags(cls.__doc__)
        if "__init__" in vars(cls):
            cls._typed = {**cls._typed, **typed(cls.__init__)}

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._clear_caches()
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"Invalid params: a model ({type(params).__name__}) and not its parameters; give "
                "deepopt.param_groups(model), or model.parameters()"
            )
        self._check_group(defaults)  # before anything else: torch's order, and its messages
        super().__init__(params, {"split": 1, **defaults})
        checkpoint.describe_when_saved(self)
        if self._min_dims["matrix"]:  # rules that step vectors too may step embeddings
            routing.warn_of_groups(self.param_groups)

    # -- for the subclasses ------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Check the values of ``group``.

        Raises:
            ValueError: a value out of range.
            TypeError: an argument that is not a number or flag at all.
            RuntimeError: flags that exclude each other.
        """
        lr: Any = group["lr"]
        betas: Any = group["betas"]
        check_types(self._typed, group)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if isinstance(lr, Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
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
        """The map from the momentum that the memory reads out to the update."""
        return IDENTITY

    def _transform_gradients(self, grads: list[Tensor | None], group: Group) -> list[Tensor | None]:
        """What a group's parameters are stepped with instead of their (unscaled) gradients.

        The gradients must not be written to. A parameter whose entry is None is not stepped.
        """
        return grads

    def _describe(self, key: str, value: Any) -> str:
        """The text by which a checkpoint recognizes an argument that can be an object."""
        if isinstance(value, str):
            return value
        if hasattr(value, "__qualname__"):  # functions
            return f"{value.__module__}.{value.__qualname__}"
        if type(value).__repr__ is object.__repr__:
            return type(value).__name__
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # another process has other addresses

    # -- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """torch's method, which fills in the defaults, then the checks of the constructor.

        Raises:
            ValueError: a value out of range, or a path or split that does not fit a parameter's
                shape; the optimizer is unchanged then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            check_dtypes(group)
            routing.check_group(group, self._min_dims)
        except Exception:
            self.param_groups.pop()
            raise
        self._checked_values[id(group)] = list(group.values())

    def __repr__(self) -> str:
        in_routing = ("    param_names: ", "    reasons: ")  # the routing shows them, shortened
        lines = super().__repr__().splitlines()
        lines = [line for line in lines if not line.startswith(in_routing)]
        return "\n".join([*lines, "Routing:", *routing.describe(self.param_groups)])

    def _update_rule(self, group: Group) -> UpdateRule:
        """The group's memory and output map, rebuilt only when one of their arguments changes."""
        rule = self._rule_cache.get(id(group))
        if rule is None or not rule.are_current(group):
            recording = _RecordingGroup(group)
            memory, output_map = self._memory(recording), self._output_map(recording)
            rule = UpdateRule(memory, output_map, recording.read, {})
            self._rule_cache[id(group)] = rule
        return rule

    def _clear_caches(self) -> None:
        """Forget everything that was derived from the groups."""
        # All are keyed by the id of a group, because a dict has no hash.
        self._rule_cache: dict[int, UpdateRule] = {}
        self._sorted_cache: dict[int, SortedGroup] = {}
        self._checked_values: dict[int, list[Any]] = {}  # which passed _check_group

    # -- diagnostics -------------------------------------------------------------------------

    def diagnostics(
        self, condition_number: bool = False
    ) -> AbstractContextManager[dict[str, Diagnosis]]:
        """Record what the steps inside do to every parameter: sizes, directions, erasure::

            with optimizer.diagnostics() as seen:
                optimizer.step()
            for name, row in seen.items():
                for key, value in row.scalars().items():
                    writer.add_scalar(f"{key}/{name}", value, number)

        Args:
            condition_number: also compute the condition numbers of matrix updates, which takes one
                decomposition per matrix (default: False).

        Returns:
            A context manager. Its value is a dict with a row for every parameter that the last
            step inside has stepped, by name, or by number ("parameter 0") where it has no name.

        Cost: none outside of the context. Inside, all parameters are copied, and they and their
        gradients are moved to the host, which waits for the device.
        """
        return watch(self, condition_number)

    def _report(self, group: Group, param: Tensor, route: routing.Route) -> dict[str, Tensor]:
        """What the memory says about itself for one parameter."""
        report = getattr(self._update_rule(group).memory, "report", None)
        if report is None or route.path == "elementwise" or not param.numel():
            return {}
        return report(self.state[param])

    # -- the step ----------------------------------------------------------------------------

    @disable_dynamo
    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        In a compiled training step it is a graph break and runs eagerly. So what it depends on,
        above all the learning rate, can change without a recompilation.

        When a memory raises, the matrices of its call stay as they were, but others may have been
        stepped before it. All other errors are raised before any parameter moves.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.

        Raises:
            RuntimeError: a gradient that is sparse or of another shape or device, a parameter with
                several entries in one place, a DTensor of partial sums, or a state that does not
                fit its parameter.
            ValueError, TypeError, RuntimeError: a value of a group was changed to one that the
                constructor refuses.
            AssertionError: ``capturable=True`` with parameters on a device without graphs.
        """
        graph_capture_health_check(self)
        loss = None if closure is None else evaluate_closure(closure)
        with isolated_from_caller(bool(self.defaults["differentiable"])):
            # torch's GradScaler sets these attributes for the duration of the step if
            # _step_supports_amp_scaling says that the step itself unscales and skips.
            grad_scale: Tensor | None = getattr(self, "grad_scale", None)
            found_inf: Tensor | None = getattr(self, "found_inf", None)
            # All groups are checked before any parameter moves.
            buckets: list[Bucket] = []
            for group in self.param_groups:
                grads: list[Tensor | None] = list(map(GRAD, group["params"]))
                if grad_scale is not None:
                    grads = _unscaled(group["params"], grads, grad_scale)
                buckets += self._buckets(group, grads, self._transforms_gradients)
            self._step_buckets(buckets, self.state, found_inf)
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(self.defaults["fused"])

    def _buckets(
        self, group: Group, grads: list[Tensor | None], transform_gradients: bool = False
    ) -> list[Bucket]:
        """The parameters of a group that have gradients, in the buckets of one call each.

        Args:
            group: the group.
            grads: a gradient, or None, for each of its parameters.
            transform_gradients: False for ``functional``, whose parameters are copies: what a
                subclass has recorded belongs to the originals.
        """
        # By identity: `==` may raise for a user's objects, or wait for a device.
        values, checked = list(group.values()), self._checked_values.get(id(group), [])
        if len(values) != len(checked):
            self._check_group(group)
        elif not all(unchanged := list(map(operator.is_, values, checked))):
            changed = {key for key, same in zip(group, unchanged, strict=True) if not same}
            if changed.isdisjoint(self._unscheduled):
                MemoryOptimizer._check_group(self, group)
            else:
                self._check_group(group)
        self._checked_values[id(group)] = values
        cached = self._sorted_cache.get(id(group))
        sorted_group = SortedGroup.of(group, self._min_dims, cached)
        if sorted_group is not cached:
            self._evict_removed_groups()
            self._sorted_cache[id(group)] = sorted_group
        check_gradients(group, sorted_group, grads, type(self).__name__)
        if transform_gradients and group["path"] != "elementwise":
            grads = self._transform_gradients(grads, group)
        return make_buckets(group, sorted_group, grads, self._update_rule(group))

    def _evict_removed_groups(self) -> None:
        # The id of a removed group may be given to a new one.
        ids = set(map(id, self.param_groups))
        caches: list[dict[int, Any]] = [self._rule_cache, self._sorted_cache, self._checked_values]
        for cache in caches:
            for key in cache.keys() - ids:
                del cache[key]

    def _step_buckets(
        self, buckets: Sequence[Bucket], states: dict[Tensor, Any], found_inf: Tensor | None = None
    ) -> None:
        """Step all parameters in place; where ``found_inf`` is 1 nothing changes."""
        states_by_bucket = self._states(buckets, states)
        if found_inf is not None:
            found_inf = sharding.whole(found_inf)
        local: Batch = []
        across_ranks: Batch = []
        for bucket, bucket_states in zip(buckets, states_by_bucket, strict=True):
            kind = bucket.kind
            if kind.path == "elementwise":
                near = None if found_inf is None else found_inf.to(kind.device)
                adamw_path.step(bucket, bucket_states, near)
            elif kind.across_ranks:
                across_ranks.append((bucket, bucket_states))
            elif kind.mesh is None:
                local.append((bucket, bucket_states))
            else:
                local.append(sharding.local_pieces(bucket, bucket_states))
        for batch in batched(local):
            near = None if found_inf is None else found_inf.to(batch[0][0].kind.device)
            self._step_matrices(batch, near)
        if across_ranks:  # in one call, so that one bucket travels while another is computed
            self._step_across_ranks(across_ranks, found_inf)

    # -- state -------------------------------------------------------------------------------

    def _states(self, buckets: Sequence[Bucket], states: dict[Tensor, Any]) -> list[list[State]]:
        """The states of every bucket's parameters; those that are missing are made.

        Raises:
            RuntimeError: a state that the user has changed so that it no longer fits. No state has
                been made then.
        """
        states_by_bucket: list[list[State]] = []
        fresh: list[tuple[Tensor, State]] = []
        for bucket in buckets:
            # One dict stands for all that are missing; nothing is written to it.
            found: list[Any] = list(map(states.get, bucket.params, itertools.repeat({})))
            if not set(map(type, found)) <= {dict}:
                check_dicts(bucket, found)
            # A state without "step" is empty, or holds entries of the user's alone.
            begun = list(map(operator.contains, found, itertools.repeat("step")))
            if all(begun):
                check_states(bucket, found, self._state_layout(bucket))
            else:
                old = list(itertools.compress(range(len(found)), begun))
                if old:
                    check_states(
                        part_of(bucket, old), [found[i] for i in old], self._state_layout(bucket)
                    )
                new = [i for i, has_step in enumerate(begun) if not has_step]
                unstepped = part_of(bucket, new)
                if bucket.group["rounding"] == "exact":
                    check_lows(unstepped, [found[i] for i in new])
                fresh += zip(unstepped.params, self._fresh_states(unstepped), strict=True)
            states_by_bucket.append(found)
        if not fresh:
            return states_by_bucket
        for param, state in fresh:  # the user's entries stay
            states.setdefault(param, {}).update(state)
        return [[states[param] for param in bucket.params] for bucket in buckets]

    def _fresh_states(self, bucket: Bucket) -> list[State]:
        kind, group, params = bucket.kind, bucket.group, bucket.params
        if group["fused"]:
            for param in params:
                check_fused(param)
        if kind.path == "elementwise":
            likes = map(dense, params) if kind.wrapped else params
            return [adamw_path.init(like, group) for like in likes]
        device = kind.device if group["capturable"] else "cpu"
        states: list[State] = [
            {"step": torch.zeros((), dtype=scalar_dtype(), device=device)} for _ in params
        ]
        if kind.mesh is not None:
            route = routing.Route(kind.path, kind.split)
            sharding.init(
                sharding.ShardedBucket.of(bucket, states),
                [self._expected_state(param, route, group) for param in params],
                lambda like: _init(bucket.rule, like),
            )
            return states
        counts = [param.numel() // math.prod(kind.sides) for param in params]
        like = torch.empty(sum(counts), *kind.sides, dtype=kind.state_dtype, device=kind.device)
        for key, tensor in _init(bucket.rule, like).items():
            distribute(tensor, states, key, counts)
        return states

    def _state_layout(self, bucket: Bucket) -> Mapping[str, Tensor]:
        """The state tensors that ``init`` makes, by name; all others are the user's."""
        if bucket.kind.path == "elementwise":
            return adamw_path.KEYS
        layouts, kind = bucket.rule.layouts, bucket.kind
        layout = (*kind.sides, kind.state_dtype)
        if layout not in layouts:  # init has not run yet: after a checkpoint, or with a new rule
            like = torch.empty(1, *kind.sides, dtype=kind.state_dtype, device="meta")
            _init(bucket.rule, like)  # for its record in `layouts`
        return layouts[layout]

    def _expected_state(
        self, param: Tensor, route: routing.Route, group: Group
    ) -> dict[str, Tensor]:
        """What a fresh state of ``param`` looks like, on the meta device."""
        like = torch.empty(param.shape, dtype=state_dtype(param), device="meta")
        expected = {"step": torch.empty((), device="meta")}
        if route.path == "elementwise" or not param.numel():
            return {**expected, **dict.fromkeys(adamw_path.KEYS, like)}
        rows = routing.matrices(like, route.path, route.split)
        return {**expected, **_init(self._update_rule(group), rows)}

    # -- matrices ----------------------------------------------------------------------------

    def _step_matrices(self, batch: Batch, found_inf: Tensor | None) -> None:
        """Compute the updates of one bucket after the other, and apply them all in one call.

        For a tiny matrix, calling an operator costs more than its arithmetic. So the operators that
        take any number of tensors of any shapes run once for the whole batch.
        """
        step_counts: list[Tensor] = []  # one for each matrix
        matrix_counts: list[int] = []  # one for each bucket
        for bucket, bucket_states in batch:
            size, before = math.prod(bucket.kind.sides), len(step_counts)
            for grad, state in zip(bucket.grads, bucket_states, strict=True):
                step_counts += [state["step"]] * (grad.numel() // size)
            matrix_counts.append(len(step_counts) - before)
        params: list[Tensor] = []
        updates: list[Tensor] = []
        states: list[State] = []
        try:
            # Memories see the count that includes this gradient; state["step"] itself is counted up
            # only after the parameters have moved.
            steps: Sequence[Any] = [[]] * len(batch)
            if step_counts:
                steps = (torch.stack(step_counts) + 1).split(matrix_counts)
            for (bucket, bucket_states), step in zip(batch, steps, strict=True):
                if len(step):  # a rank of expert parallelism may hold no matrix
                    updates += self._updates(bucket, bucket_states, step, found_inf)
                    params += bucket.params
                states += bucket_states
        finally:  # when a memory raises, the state of the buckets before it has been written
            if states:
                # A batch has one group, and is wrapped as a whole or not at all: see batched().
                kind, group = batch[0][0].kind, batch[0][0].group
                lows, seeds = NO_ROUNDING
                if group["rounding"] != "nearest":
                    lows, seeds = lows_and_seeds(params, states, group)
                if params:
                    self._apply(params, updates, lows, seeds, group, found_inf, kind.wrapped)
                _increment_steps(list(map(STEP, states)), found_inf)

    def _updates(
        self, bucket: Bucket, states: list[State], step: Tensor, found_inf: Tensor | None
    ) -> list[Tensor]:
        """Write a bucket's new state, and return the updates of its parameters."""
        kind, params = bucket.kind, bucket.params
        grads = [grad.reshape(-1, *kind.sides) for grad in bucket.grads]
        counts = list(map(len, grads))
        grad = torch.cat(grads) if len(grads) > 1 else grads[0]
        grad = grad.to(kind.state_dtype)
        with stacked(
            states, self._state_layout(bucket), counts, bucket.group["differentiable"]
        ) as state:
            state["step"] = step
            update = _advance(bucket, state, grad, found_inf)
        if len(params) == 1:
            return [update.reshape(params[0].shape)]
        parts = zip(update.split(counts), params, strict=True)
        return [part.reshape(param.shape) for part, param in parts]

    def _step_across_ranks(self, batch: Batch, found_inf: Tensor | None) -> None:
        """Step matrices that have to travel between ranks; ``sharding.py`` says how."""
        buckets = [bucket for bucket, _ in batch]

        def advance(index: int, state: State, grad: Tensor) -> Tensor:
            before = dict(state)
            update = _advance(buckets[index], state, grad, found_inf)
            check_same_layout(before, state)
            return update

        sharding.step(
            [sharding.ShardedBucket.of(bucket, states) for bucket, states in batch],
            advance,
            lambda i, piece, update: self._apply(
                [piece], [update], [], [], buckets[i].group, found_inf
            ),
        )
        for _, states in batch:
            _increment_steps([state["step"] for state in states], found_inf)

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
        # The operator takes lr as a number, for which the host would wait for a device, and it
        # neither skips, nor is differentiable, nor knows a user's tensor class.
        if found_inf is None and on_host and not group["differentiable"] and not wrapped:
            apply_update_(params, updates, lows, seeds, float(lr), float(group["weight_decay"]))
            return
        decay = 1 - lr * group["weight_decay"]
        for param, update, rounding in zip(
            params, updates, roundings(params, lows, seeds), strict=True
        ):
            old = dense(param) if wrapped else to_fp32(param, state_dtype(param), rounding)
            if group["differentiable"]:  # autograd saves this factor, and param is written below
                old = old.clone()
            new = old * decay - update * lr
            if found_inf is not None:
                new = torch.where(skips(found_inf, param.device), old, new)
            store_rounded(param, new, rounding)

    # -- checkpoints -------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clear_caches()
        checkpoint.describe_when_saved(self)
        for group in self.param_groups:  # flags that an older version did not have
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for entry in self.state.values():  # older versions of torch stored the step as a number
            if isinstance(entry, dict) and isinstance(step := entry.get("step"), int | float):
                entry["step"] = torch.tensor(float(step), dtype=scalar_dtype(), device="cpu")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's method, but state keeps its precision and shares no storage with ``state_dict``.

        Objects such as memories are not loaded: the optimizer keeps its own. Entries that the user
        added to the state are moved to the parameter's device and otherwise loaded unchanged.

        Raises:
            ValueError: the groups, the memory or the state do not belong to this optimizer. It is
                unchanged then.
        """
        with isolated_from_caller(), checkpoint.adopting(self, state_dict):
            super().load_state_dict(state_dict)

    def _routed(self) -> Iterator[tuple[Group, Tensor, routing.Route]]:
        for group in self.param_groups:
            for param, _, route in routing.routed(group):
                yield group, param, route


def _advance(bucket: Bucket, state: State, grad: Tensor, found_inf: Tensor | None) -> Tensor:
    """Write gradients (B, m, n) into the memory, and map what it reads to their updates.

    New tensors are assigned to the entries of ``state``.
    """
    before = dict(state)
    if bucket.group["maximize"]:
        grad = -grad
    if found_inf is not None:
        # The host must not wait to learn whether to skip. So a skipped step is computed with a
        # gradient of zero, and the old state is put back below.
        skip = skips(found_inf, grad.device)
        grad = torch.where(skip, torch.zeros_like(grad), grad)
    betas = bucket.group["betas"]
    memory: Any = bucket.rule.memory
    if one_pass := getattr(memory, "write_and_read", None):
        momentum = one_pass(state, grad, betas[0])
    else:
        memory.write(state, grad, betas[0])
        momentum = memory.read(state, grad, betas[0])
    if momentum.shape != grad.shape or momentum.dtype != grad.dtype:
        raise ValueError(
            f"Invalid memory: {memory} returned a momentum of shape {tuple(momentum.shape)} and "
            f"{momentum.dtype} for gradients of shape {tuple(grad.shape)} and {grad.dtype}; both "
            "must agree"
        )
    update = bucket.rule.output_map(momentum, state, grad, betas)
    if unknown := state.keys() - before.keys():
        raise ValueError(f"state {sorted(unknown)} was not made by init, so it would be lost")
    if found_inf is not None:
        for key in before.keys() - {"step"}:
            state[key] = torch.where(skip, before[key], state[key])
    return update


class _RecordingGroup(dict[str, Any]):
    """A group that records which of its arguments are read, to know what a memory depends on."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.read: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.read[key] = super().__getitem__(key)
        return self.read[key]

    def get(self, key: str, default: Any = None) -> Any:
        self.read[key] = super().get(key)
        return super().get(key, default)


def _init(rule: UpdateRule, like: Tensor) -> State:
    """State for matrices ``like``, shape (B, m, n): tensors with leading size B.

    ``rule.layouts`` also gets what one matrix's state looks like.
    """
    state = dict(rule.memory.init(like))
    map_state = rule.output_map.init(like)
    if clashes := state.keys() & {*RESERVED_KEYS, *map_state}:
        raise ValueError(
            f"Invalid memory: its state must not use the names {clashes}, which belong to the "
            "optimizer"
        )
    state.update(map_state)
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != like.shape[:1]:
            raise ValueError(
                f"state {key!r} must be a tensor of leading size {len(like)}, one row per "
                f"matrix, but is {getattr(tensor, 'shape', tensor)!r}"
            )
    rule.layouts[like.shape[1], like.shape[2], like.dtype] = {
        key: torch.empty(1, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
        for key, tensor in state.items()
    }
    return state


def arguments_of(names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an optimizer by name, from the ``locals()`` of its constructor."""
    # `super()` in the constructor puts __class__ among its locals.
    return {n: value for n, value in names.items() if n not in ("self", "params", "__class__")}


def evaluate_closure(closure: Callable[[], Any]) -> Any:
    """The loss that a closure returns. It computes gradients, in whatever grad mode the step is."""
    with torch.enable_grad():
        return closure()


def isolated_from_caller(grad: bool = False) -> ExitStack:
    """A context in which no mode that the caller has entered changes what is computed.

    Autocast and inference mode are off, and no ``TorchFunctionMode`` of the caller, such as that of
    a default device, sees the calls.

    Args:
        grad: whether gradients are recorded inside if the caller is in inference mode.
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
    """Gradients divided by the loss scale, in float32: in float16 they could underflow again."""
    return [
        None if grad is None else grad.to(state_dtype(param)) / scale.to(grad.device)
        for param, grad in zip(params, grads, strict=True)
    ]


def _increment_steps(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Count the step, unless it was skipped."""
    if found_inf is None:
        torch._foreach_add_(steps, 1.0)
        return
    # Copied to the counts' device once, not once per count.
    skip = skips(found_inf, steps[0].device)
    for step in steps:
        step += ~skip


def skips(found_inf: Tensor, device: torch.device) -> Tensor:
    """Whether the step is skipped, as a tensor on ``device``."""
    return found_inf.to(device).squeeze() > 0
