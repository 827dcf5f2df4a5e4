"""What torch asks of an optimizer, once for every class of the package.

A class says in :meth:`MemoryOptimizer._init_matrices` and :meth:`MemoryOptimizer._read_update` what
its memory keeps and what step it reads from it; groups, flags, state and checkpoints are done here.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deepopt import memory
from deepopt._compat import is_distributed, scalar_dtype, use_grad_for_differentiable
from deepopt.optim import elementwise, routing
from deepopt.optim.elementwise import state_dtype
from deepopt.optim.stacking import State, distribute, stacked

Group: TypeAlias = dict[str, Any]


class Kind(NamedTuple):
    """What matrices must share to be stepped in one call."""

    path: routing.Path
    sides: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class MemoryOptimizer(Optimizer):
    """An optimizer that steps matrices in batches of one shape and the rest by torch's AdamW.

    State of a matrix parameter: ``step``, and the tensors of :meth:`_init_matrices` with a leading
    dimension, the number of matrices in the parameter. State of any other: that of AdamW.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_group(defaults)  # before anything else: torch's order, and its messages
        super().__init__(params, defaults)

    # -- for the subclasses ------------------------------------------------------------------

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for the first value of ``group`` that is out of range."""
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if isinstance(lr, Tensor) and group["foreach"]:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
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
        if group["capturable"]:
            raise RuntimeError(f"{type(self).__name__} does not support capturable=True")
        if group["path"] not in routing.PATHS:
            raise ValueError(f"Invalid path: {group['path']!r}; choose from {routing.PATHS}")

    def _init_matrices(self, like: Tensor, group: Group) -> dict[str, Tensor]:
        """State for matrices ``like``, shape (B, m, n): tensors with leading size B."""
        raise NotImplementedError

    def _read_update(self, state: dict[str, Tensor], grad: Tensor, group: Group) -> Tensor:
        """Write ``grad`` (B, m, n) into ``state`` and return what ``lr`` multiplies."""
        raise NotImplementedError

    # -- groups ------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """torch's, which fills in the defaults, and then the same checks as in the constructor.

        Raises:
            ValueError: a value out of range, or a path that does not fit a parameter's shape;
                the optimizer is unchanged then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            needed = {"matrix": 2, "stack": 3}.get(group["path"], 0)
            for param, name, _ in routing.routed(group):
                if param.ndim < needed or (needed and param.is_complex()):
                    raise ValueError(
                        f"Invalid path: {group['path']!r} for parameter {name or '(unnamed)'} of "
                        f"shape {tuple(param.shape)} and {param.dtype}; it needs real matrices of "
                        f"at least {needed} dimensions, use path='auto' or 'elementwise'"
                    )
        except Exception:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), "Routing:", *routing.describe(self.param_groups)])

    # -- the step ----------------------------------------------------------------------------

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.

        Raises:
            RuntimeError: a sparse gradient, or a distributed matrix; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All that can be wrong with a parameter or a gradient shows before any parameter moves.
        plans = [(group, self._plan(group)) for group in self.param_groups]
        for group, plan in plans:
            for kind, params in plan.items():
                self._init_states(params, kind, group)
        for group, plan in plans:
            for kind, params in plan.items():
                if kind is None:
                    elementwise.step(params, [self.state[param] for param in params], group)
                else:
                    self._step_matrices(params, kind.path, group)
        return loss

    def _plan(self, group: Group) -> dict["Kind | None", list[Tensor]]:
        """The parameters to step by what is stepped in one call; None is the element-wise path."""
        plan: dict[Kind | None, list[Tensor]] = {}
        for param, _, path in routing.routed(group):
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            kind = None
            if path != "elementwise" and param.numel():
                if is_distributed(param):
                    raise RuntimeError(
                        f"{type(self).__name__} does not support DTensor parameters as matrices "
                        "(FSDP2, tensor parallel); give their group path='elementwise'"
                    )
                kind = Kind(path, routing.sides(param, path), param.dtype, param.device)
            plan.setdefault(kind, []).append(param)
        return plan

    def _init_states(self, params: list[Tensor], kind: "Kind | None", group: Group) -> None:
        fresh = [param for param in params if not self.state.get(param)]
        if kind is None:
            for param in fresh:
                self.state[param] = elementwise.init(param, group)
        elif fresh:
            counts = [len(routing.matrices(param, kind.path)) for param in fresh]
            like = torch.empty(
                sum(counts), *kind.sides, dtype=state_dtype(fresh[0]), device=kind.device
            )
            whole = self._init_matrices(like, group)
            for key, tensor in whole.items():
                if not isinstance(tensor, Tensor) or tensor.shape[:1] != like.shape[:1]:
                    raise ValueError(
                        f"state {key!r} must be a tensor of leading size {len(like)}, one row per "
                        f"matrix, but is {getattr(tensor, 'shape', tensor)!r}"
                    )
            states: list[State] = [
                {"step": torch.zeros((), dtype=scalar_dtype(), device="cpu")} for _ in fresh
            ]
            for key, tensor in whole.items():
                distribute(tensor, states, key, counts)
            self.state.update(zip(fresh, states, strict=True))

    def _step_matrices(self, params: list[Tensor], path: routing.Path, group: Group) -> None:
        dtype = state_dtype(params[0])
        grads = [routing.matrices(param.grad, path) for param in params if param.grad is not None]
        counts = [len(grad) for grad in grads]
        grad = torch.cat(grads).to(dtype)
        if group["maximize"]:
            grad = -grad
        states = [self.state[param] for param in params]
        steps = [state["step"] for state in states]
        keys = [key for key in states[0] if key != "step"]
        with stacked(states, keys, group["differentiable"]) as whole:
            repeats = torch.tensor(counts, device="cpu")
            whole["step"] = torch.stack(steps).repeat_interleave(repeats) + 1
            update = self._read_update(whole, grad, group)
            if unknown := whole.keys() - {*keys, "step"}:
                raise ValueError(f"state {sorted(unknown)} was not made by init, so it is not kept")
        torch._foreach_add_(steps, 1)
        lr = group["lr"].squeeze() if isinstance(group["lr"], Tensor) else group["lr"]
        decay = 1 - lr * group["weight_decay"]
        for param, part in zip(params, (update * lr).split(counts), strict=True):
            # Autograd keeps the factors of a product: not the tensor that is written to next.
            wide = param.to(dtype, copy=group["differentiable"])
            param.copy_(wide * decay - part.view(param.shape))

    # -- checkpoints -------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # flags that an older version did not have
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        for kept in self.state.values():  # older versions of torch had a number here
            if isinstance(kept, dict) and isinstance(kept.get("step"), int | float):
                kept["step"] = torch.tensor(float(kept["step"]), dtype=scalar_dtype(), device="cpu")

    def state_dict(self) -> dict[str, Any]:
        """torch's, with every memory object replaced by its ``repr``: plain data and tensors."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            if "memory" in group:
                group["memory"] = _describe(group["memory"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but state keeps its precision and shares no storage with ``state_dict``.

        Memory objects are not loaded: those the optimizer was made with stay.

        Raises:
            ValueError: the groups, the memory or the state are not those of this optimizer, which
                is unchanged then.
        """
        incoming: dict[str, Any] = {}

        # Last of the pre-hooks and first of the post-hooks: what the user's hooks change counts.
        def adopt(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check_incoming(given)
            incoming.update(given)
            groups = [dict(group) for group in given["param_groups"]]
            for mine, group in zip(self.param_groups, groups, strict=False):
                if "memory" in mine:
                    group["memory"] = mine["memory"]
            return {**given, "param_groups": groups}

        def restore(_: Optimizer) -> None:
            ids = [i for group in incoming["param_groups"] for i in group["params"]]
            for index, (group, param, path) in zip(ids, self._routed(), strict=True):
                given = incoming["state"].get(index, {})
                expected = self._expected_state(param, path, group) if given else {}
                for key, value in given.items():
                    if isinstance(value, Tensor):
                        dtype, device = expected[key].dtype, param.device
                        if key == "step":  # torch put it where a fused step wants it
                            dtype = self.state[param][key].dtype
                            fused = group["fused"] and path == "elementwise"
                            device = param.device if fused else torch.device("cpu")
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
        for mine, theirs in zip(self.param_groups, given["param_groups"], strict=False):
            saved, own = theirs.get("memory"), mine.get("memory")
            if saved is not None and _describe(own) != _describe(saved):
                raise ValueError(
                    f"the checkpoint's memory is {_describe(saved)}, the optimizer's "
                    f"{_describe(own)}: make the optimizer with the checkpoint's"
                )
            if len(theirs["params"]) != len(mine["params"]):
                continue  # torch's own check is next, and has the better words
            group = {**mine, **theirs, "params": mine["params"], "memory": own}
            for index, (param, name, path) in zip(
                theirs["params"], routing.routed(group), strict=True
            ):
                if state := given["state"].get(index):
                    expected = self._expected_state(param, path, group)
                    found = {k: tuple(getattr(v, "shape", ())) for k, v in state.items()}
                    if found != {k: tuple(v.shape) for k, v in expected.items()}:
                        raise ValueError(
                            f"the checkpoint's state of parameter {name or f'number {index}'} does "
                            f"not fit its {path} path: expected {_shapes(expected)}, "
                            f"found {_shapes(state)}"
                        )

    def _expected_state(self, param: Tensor, path: routing.Path, group: Group) -> dict[str, Tensor]:
        """What a fresh state of ``param`` looks like, on the meta device."""
        like = torch.empty(param.shape, dtype=state_dtype(param), device="meta")
        scalar = torch.empty((), device="meta")
        if path == "elementwise" or not param.numel():
            return {"step": scalar, "exp_avg": like, "exp_avg_sq": like}
        return {"step": scalar, **self._init_matrices(routing.matrices(like, path), group)}

    def _routed(self) -> Iterator[tuple[Group, Tensor, routing.Path]]:
        for group in self.param_groups:
            for param, _, path in routing.routed(group):
                yield group, param, path


def _describe(value: Any) -> str:
    """A memory as plain text: its name, its ``repr``, or its class if it has no ``repr``."""
    if isinstance(value, str):
        if value not in memory.BUILT_IN:
            return value
        value = memory.resolve(value)
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def _shapes(state: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(getattr(v, 'shape', ()))}" for key, v in state.items())
