"""What torch asks of an optimizer, once for every class of the package.

A class says in :meth:`MemoryOptimizer._init_matrices` and :meth:`MemoryOptimizer._read_update` what
its memory keeps and what step it reads from it; groups, flags, state and checkpoints are done here.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deepopt import memory
from deepopt._compat import scalar_dtype, use_grad_for_differentiable
from deepopt.optim import elementwise, routing
from deepopt.optim.elementwise import state_dtype
from deepopt.optim.stacking import State, distribute, stacked

Group: TypeAlias = dict[str, Any]


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
            RuntimeError: a sparse gradient; no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = [(group, self._plan(group)) for group in self.param_groups]
        for group, plan in plans:
            for key, params in plan.items():
                if key == "elementwise":
                    states = [self._elementwise_state(param, group) for param in params]
                    elementwise.step(params, states, group)
                else:
                    self._step_matrices(params, key[0], group)
        return loss

    def _plan(self, group: Group) -> dict[Any, list[Tensor]]:
        """The parameters to step, by what can be stepped in one call."""
        plan: dict[Any, list[Tensor]] = {}
        for param, _, path in routing.routed(group):
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            key: Any = "elementwise"
            if path != "elementwise" and param.numel():
                key = path, routing.sides(param, path), param.dtype, param.device
            plan.setdefault(key, []).append(param)
        return plan

    def _elementwise_state(self, param: Tensor, group: Group) -> State:
        if not self.state[param]:
            self.state[param].update(elementwise.init(param, group))
        return self.state[param]

    def _step_matrices(self, params: list[Tensor], path: routing.Path, group: Group) -> None:
        dtype = state_dtype(params[0])
        grads = [routing.matrices(param.grad, path) for param in params if param.grad is not None]
        counts = [len(grad) for grad in grads]
        grad = torch.cat(grads).to(dtype)
        if group["maximize"]:
            grad = -grad
        states = [self.state[param] for param in params]
        fresh = [(s, count) for s, count in zip(states, counts, strict=True) if not s]
        if fresh:
            like = grad[: sum(count for _, count in fresh)]
            for key, whole in self._init_matrices(like, group).items():
                distribute(whole, [s for s, _ in fresh], key, [count for _, count in fresh])
            for state, _ in fresh:
                state["step"] = torch.zeros((), dtype=scalar_dtype())
        steps = [state["step"] for state in states]
        keys = [key for key in states[0] if key != "step"]
        with stacked(states, keys, group["differentiable"]) as whole_state:
            whole_state["step"] = torch.stack(steps).repeat_interleave(torch.tensor(counts)) + 1
            update = self._read_update(whole_state, grad, group)
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
            params = [param for group in self.param_groups for param in group["params"]]
            for index, param in zip(ids, params, strict=True):
                for key, value in incoming["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        cast = self.state[param][key]
                        dtype = state_dtype(param) if value.is_floating_point() else value.dtype
                        dtype = cast.dtype if key == "step" else dtype
                        self.state[param][key] = value.detach().to(cast.device, dtype, copy=True)

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
        for mine, group in zip(self.param_groups, given["param_groups"], strict=False):
            theirs = group.get("memory")
            if theirs is not None and _describe(mine["memory"]) != _describe(theirs):
                raise ValueError(
                    f"the checkpoint's memory is {_describe(theirs)}, the optimizer's "
                    f"{_describe(mine['memory'])}: make the optimizer with the checkpoint's"
                )
            theirs = {**self.defaults, **group, "params": mine["params"]}
            if "param_names" in mine and "param_names" not in group:
                theirs["param_names"] = mine["param_names"]
            theirs["memory"] = mine["memory"]
            if len(group["params"]) != len(mine["params"]):
                continue  # torch's own check is next, and has the better words
            for index, (param, name, path) in zip(
                group["params"], routing.routed(theirs), strict=True
            ):
                state = given["state"].get(index)
                if state:
                    self._check_state(state, param, path, theirs, name or f"number {index}")

    def _check_state(
        self, state: State, param: Tensor, path: routing.Path, group: Group, name: str
    ) -> None:
        if path == "elementwise" or not param.numel():
            expected = {"step": (), "exp_avg": param.shape, "exp_avg_sq": param.shape}
        else:
            like = routing.matrices(torch.empty(param.shape, device="meta"), path)
            fresh = self._init_matrices(like, group)
            expected = {"step": (), **{key: value.shape for key, value in fresh.items()}}
        found = {key: getattr(value, "shape", ()) for key, value in state.items()}
        if {k: tuple(v) for k, v in found.items()} != {k: tuple(v) for k, v in expected.items()}:
            raise ValueError(
                f"the checkpoint's state of parameter {name} does not fit its {path} path: "
                f"expected {_shapes(expected)}, found {_shapes(found)}"
            )


def _describe(value: Any) -> str:
    """A memory as plain text: its name, its ``repr``, or its class if it has no ``repr``."""
    if isinstance(value, str):
        if value not in memory.BUILT_IN:
            return value
        value = memory.resolve(value)
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)


def _shapes(state: dict[str, Any]) -> str:
    return ", ".join(f"{key} {tuple(shape)}" for key, shape in state.items()) or "nothing"
