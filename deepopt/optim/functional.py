"""Optimizers as pure functions, for your own training loops and for derivatives through steps.

Such derivatives are how one level can learn what another begins with (Eq 24, Eq 25, Eq 26, Eq 27,
Eq 28).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from deepopt.optim.base import MemoryOptimizer, isolated_from_caller

Tensors: TypeAlias = Mapping[str, Tensor]
States: TypeAlias = dict[str, dict[str, Tensor]]


class Functional(NamedTuple):
    """An optimizer without hidden state; see :func:`functional`."""

    init: Callable[[Tensors], States]
    update: Callable[
        [Mapping[str, Tensor | None], States, Tensors], tuple[dict[str, Tensor], States]
    ]


def functional(optimizer: type[MemoryOptimizer], **options: Any) -> Functional:
    """``optimizer`` as two pure functions, which write into none of their arguments::

        init, update = deepopt.functional(deepopt.DeepMomentum, lr=1e-3)
        params = dict(model.named_parameters())
        state = init(params)
        grads = torch.func.grad(loss)(params, batch)
        with torch.no_grad():  # without it the graph of all steps is kept
            params, state = update(grads, state, params)

    Autograd runs through ``update``, to gradients, state, parameters and tensor hyper-parameters.

    Args:
        optimizer: a class of this package.
        options: its arguments; ``path`` forces a path for all parameters. Routing goes by the
            names in ``params`` as it does for ``model.named_parameters()``.

    Returns:
        ``init(params)``, the state before the first step, and ``update(grads, state, params)``,
        the new parameters and the new state. All are dicts by name; a parameter whose gradient is
        missing or None stays as it is.

    Raises:
        TypeError: a class of another package, or a wrapper.
        ValueError: an option out of range, a gradient for an unknown name, or a parameter that
            ``init`` has not seen.
    """
    flags = {"differentiable": True, "foreach": None, "fused": None, **options}

    def make(params: Tensors) -> MemoryOptimizer:
        return optimizer(list(params.items()), **flags)

    if not (isinstance(optimizer, type) and issubclass(optimizer, MemoryOptimizer)):
        raise TypeError(f"Invalid optimizer: {optimizer!r}; choose a class of deepopt.optimizers()")
    make({"": torch.zeros(1, 1, 1)})  # bad options show here

    def init(params: Tensors) -> States:
        stepped = make({name: param.detach() for name, param in params.items()})
        group = stepped.param_groups[0]
        states: dict[Tensor, Any] = {}
        with isolated_from_caller(grad=True):
            stepped._states(stepped._buckets(group, group["params"]), states)
        return dict(zip(params, (states[param] for param in group["params"]), strict=True))

    def update(
        grads: Mapping[str, Tensor | None], state: States, params: Tensors
    ) -> tuple[dict[str, Tensor], States]:
        if unknown := grads.keys() - params.keys():
            raise ValueError(f"Invalid grads: {sorted(unknown)} are not among params")
        if missing := params.keys() - state.keys():
            raise ValueError(f"Invalid state: it lacks {sorted(missing)}; begin with init(params)")
        new = {name: param.clone() for name, param in params.items()}
        stepped = make(new)
        states: dict[Tensor, Any] = {
            param: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state[name].items()}
            for name, param in new.items()
        }
        group = stepped.param_groups[0]
        grad_list = [grads.get(name) for name in new]
        with isolated_from_caller(grad=True):
            stepped._step_buckets(stepped._buckets(group, grad_list), states)
        return new, {name: states[param] for name, param in new.items()}

    return Functional(init, update)
