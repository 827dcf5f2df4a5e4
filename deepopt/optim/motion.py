"""A level above the momentum: a memory of the weights' own motion, around any optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepopt._arguments import check_types, typed
from deepopt.optim.base import isolated_from_caller, skips
from deepopt.optim.continuum import Continuum
from deepopt.optim.engine.buckets import overlap_text, overlaps_itself

MOTION = "motion"
"""The memory in a parameter's state."""
OFFSET, AHEAD, PEAK = "motion_offset", "motion_ahead", "motion_peak"
"""Entries of a group. The first two are distances of its parameters from the weights, in multiples
of the memory: the present one, and the one for training. The third is the highest learning rate so
far."""
EVALUATES = "motion_evaluates"
"""Entry of a group: whether ``eval()`` was called last."""
JOINED = "_has_motion"
"""Attribute of an optimizer to which a ``Motion`` is attached."""


class Motion:
    r"""Gradients ahead of the weights, and an average behind them, from one memory of their motion.

    .. math::
        D_t &= \gamma D_{t-1} + (1-\gamma)\,(W_t - W_{t-1}) \\
        \text{training:}\quad \theta_t &= W_t + a\,\frac{\mathrm{lr}_t}{\max_{s \le t}
        \mathrm{lr}_s}\, D_t \qquad
        \text{evaluation:}\quad \theta_t = W_t - b\,\frac{\gamma}{1-\gamma}\, D_t

    The weights W are what the optimizer steps, :math:`\theta` is what the parameters hold between
    two steps. D is the next slower level of the paper's nesting: an average of steps, as the
    momentum is one of gradients. Ahead it is Nesterov's look-ahead on a slow scale. Behind, with
    b = 1, :math:`\theta` is exactly the exponential moving average of all weights with retention
    :math:`\gamma`, without additional state::

        optimizer = deepopt.DeepMomentum(deepopt.param_groups(model), lr=1e-3)
        motion = deepopt.Motion(optimizer)
        ...  # train as before, with optimizer.step()
        motion.eval()
        evaluate(model)
        motion.train()

    Save and load the model and ``optimizer.state_dict()`` together, in either mode; the optimizer
    that loads needs a ``Motion`` of its own. Where the state is cleared, or weights are put in from
    elsewhere, what the parameters hold counts as the weights. After a step that raised they hold
    the weights themselves, and training can go on.

    Args:
        optimizer: any ``torch.optim.Optimizer``; this hooks into its steps. It keeps the state.
            Inside of a :class:`deepopt.Continuum`, give the optimizer that is in it.
        retention: gamma, in [0, 1) (default: 0.99).
        ahead: a, in average steps, at least 0 (default: 10).
        average: b, in [0, 1]; 0 evaluates the weights themselves (default: 1).

    State: 1 float per parameter, in the optimizer's, and a copy of the weights during a step.

    Raises:
        ValueError: an argument out of range, or a parameter narrower than float32, in which the
            weights could not be told from what the parameter holds.
        TypeError: something other than an optimizer, or a ``Continuum``; an argument that is not a
            number.
        RuntimeError: an optimizer with ``capturable=True`` or ``differentiable=True``, or one that
            has a ``Motion`` already; a step after :meth:`eval`; a memory in the state that does not
            fit its parameter, or a parameter with several entries in one place. In these two cases
            no parameter has moved.

    Source: the look-ahead is EMA-Nesterov of modded-nanogpt's optimizer track.
    """

    def __init__(
        self, optimizer: Optimizer, retention: float = 0.99, ahead: float = 10.0, average: float = 1
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Invalid optimizer: {optimizer!r} is not a torch.optim.Optimizer")
        if isinstance(optimizer, Continuum):
            raise TypeError(
                "Invalid optimizer: a Continuum; give Motion the optimizer inside of it"
            )
        if hasattr(optimizer, JOINED):
            raise RuntimeError("this optimizer has a Motion already: use that one")
        numbers = {"retention": retention, "ahead": ahead, "average": average}
        check_types(typed(Motion.__init__), numbers)
        if not 0.0 <= retention < 1.0:
            raise ValueError(f"Invalid retention: {retention}; it must be in [0, 1)")
        if not 0.0 <= ahead < float("inf"):
            raise ValueError(f"Invalid ahead: {ahead}; it must be a number of steps, at least 0")
        if not 0.0 <= average <= 1.0:
            raise ValueError(f"Invalid average: {average}; it must be in [0, 1]")
        self.optimizer, self.retention = optimizer, retention
        self.ahead, self.average = ahead, average
        self._weights: dict[Tensor, Tensor] = {}
        self._check()
        setattr(optimizer, JOINED, True)  # like the hooks, not part of copies and pickles
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def __repr__(self) -> str:
        numbers = (self.retention, self.ahead, self.average)
        return "Motion(retention={:g}, ahead={:g}, average={:g})".format(*numbers)

    def train(self) -> None:
        """Put the parameters ahead of the weights, where gradients are taken."""
        self._check_memories()
        with isolated_from_caller():
            for group in self.optimizer.param_groups:
                self._place(group, group.get(AHEAD, 0.0))
                group[EVALUATES] = False

    def eval(self) -> None:
        """Put the parameters at the average of the weights."""
        self._check_memories()
        with isolated_from_caller():
            for group in self.optimizer.param_groups:
                self._place(group, -self.average * self.retention / (1 - self.retention))
                group[EVALUATES] = True

    def _check(self) -> None:
        for group in self.optimizer.param_groups:
            for flag in ("capturable", "differentiable"):
                if group.get(flag):
                    raise RuntimeError(f"Motion does not support {flag}=True; leave it out")
            if group.get(EVALUATES):
                raise RuntimeError("a step after Motion.eval(): call Motion.train() before it")
            for param in group["params"]:
                if param.dtype not in (torch.float32, torch.float64):
                    raise ValueError(
                        f"Invalid params: one is {param.dtype}; Motion needs float32 or float64 "
                        "parameters: keep them so and compute in a narrower type by autocast"
                    )

        self._check_memories()

    def _check_memories(self) -> None:
        """Raise RuntimeError before any parameter moves.

        It names a memory that does not fit its parameter, or a parameter that cannot be written to.
        """
        for group in self.optimizer.param_groups:
            for number, param in enumerate(group["params"]):
                state = self.optimizer.state.get(param, {})
                if not isinstance(state, dict):
                    raise RuntimeError(
                        f"optimizer.state of parameter {_name(group, number)} is {state!r} and not "
                        "a dict: delete it to begin anew"
                    )
                memory = state.get(MOTION, param)
                if not isinstance(memory, Tensor) or _layout(memory) != _layout(param):
                    actual = _layout(memory) if isinstance(memory, Tensor) else repr(memory)
                    raise RuntimeError(
                        f"state {MOTION!r} of parameter {_name(group, number)} must be a tensor of "
                        f"{_layout(param)}, but is {actual}: put it back, or delete it to begin at "
                        "zeros with what the parameter holds as the weights"
                    )
                if MOTION in state and overlaps_itself(param):
                    raise RuntimeError(
                        f"parameter {_name(group, number)} cannot be moved: {overlap_text(param)}"
                    )

    def _steps_ahead(self, group: dict[str, Any]) -> float:
        lr = float(group["lr"])
        group[PEAK] = max(lr, group.get(PEAK, 0.0))
        return self.ahead * lr / group[PEAK] if lr else 0.0

    @torch.no_grad()
    def _place(self, group: dict[str, Any], offset: float) -> None:
        """Move a group's parameters to the weights plus ``offset`` times the memory."""
        states = self.optimizer.state
        moved = [param for param in group["params"] if MOTION in states.get(param, ())]
        memories = [states[param][MOTION] for param in moved]
        if moved and offset != (now := group.get(OFFSET, 0.0)):
            torch._foreach_add_(moved, memories, alpha=offset - now)
        group[OFFSET] = offset

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Step pre-hook: put the parameters at the weights, which are what the optimizer steps.

        A closure is wrapped, so that it evaluates the model ahead of the weights.
        """
        self._check()
        closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
        params = [param for group in optimizer.param_groups for param in group["params"]]
        with isolated_from_caller():
            for group in optimizer.param_groups:
                self._place(group, 0.0)
            self._weights = {param: param.detach().clone() for param in params}
        if closure is None:
            return args, kwargs

        def evaluated() -> Any:
            before = [param.detach().clone() for param in params]
            self.train()
            try:
                return closure()
            finally:
                with isolated_from_caller(), torch.no_grad():
                    for group in optimizer.param_groups:
                        self._place(group, 0.0)
                    # Moving ahead and back rounds; the copies restore the weights to the bit.
                    torch._foreach_copy_(params, before)

        others = {key: value for key, value in kwargs.items() if key != "closure"}
        return (optimizer, evaluated, *args[2:]), others

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step post-hook: write the step into the memory, and move ahead of the new weights."""
        if not self._weights:  # done already: a subclass's step calls the step of its base class
            return
        with isolated_from_caller(), torch.no_grad():
            self._remember(optimizer)
        self._weights = {}

    def _remember(self, optimizer: Optimizer) -> None:
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for param in group["params"]:
                memory = optimizer.state.get(param, {}).get(MOTION)
                if memory is None:
                    if param.grad is None:
                        continue
                    memory = torch.zeros_like(param)
                step, state = param - self._weights[param], optimizer.state[param]
                new = memory.lerp(step, 1 - self.retention)
                if found_inf is not None:
                    new = torch.where(skips(found_inf, param.device), memory, new)
                state[MOTION] = new
            group[AHEAD] = self._steps_ahead(group)
            self._place(group, group[AHEAD])


def _layout(tensor: Tensor) -> str:
    packed = "" if tensor.layout == torch.strided else f" as {tensor.layout}"
    return f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{packed}"


def _name(group: dict[str, Any], number: int) -> str:
    names = group.get("param_names")
    return names[number] if names else f"number {number}"
