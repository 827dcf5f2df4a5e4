"""Continuum: any optimizer, and an update frequency for every group (Eq 70 and Eq 71)."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepopt._arguments import is_int
from deepopt._compat import disable_dynamo
from deepopt.optim.base import Group, evaluate_closure, isolated_from_caller
from deepopt.optim.engine.adamw_path import state_dtype

REDUCTIONS = ("mean", "sum")
PARTIAL = ("step", "discard")
PENDING = "pending_grad"


class Continuum(Optimizer):
    r"""Continuum memory system: parameters that learn at different frequencies (Eq 70 and Eq 71).

    A parameter group with a ``chunk`` of C learns at every C-th step only, from all the gradients
    of its chunk. In between it does not change, so it keeps what faster groups forget:

    .. math::
        \theta_{i+1} = \begin{cases}
        \theta_i + u\Big(\frac1C \sum_{t=i-C+1}^{i} \nabla L_t\Big) & i \equiv 0 \pmod C \\
        \theta_i & \text{otherwise}\end{cases}

    with u the update of the wrapped optimizer. ``reduce="sum"`` leaves out 1/C: with SGD at a
    constant rate this is Eq 71 as printed, except that the printed sum has one term too many.
    Weight decay, step counts and momenta also advance once per chunk, and the learning rate is that
    of the chunk's last step. Schedulers still count every step::

        optimizer = Continuum(
            torch.optim.AdamW([
                {"params": model.fast.parameters()},
                {"params": model.slow.parameters(), "chunk": 16},
            ])
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    If all chunks are 1, this is the wrapped optimizer, bit for bit.

    A chunk can also be counted in other units, such as tokens: with ``tokens=2048`` a group with
    ``chunk=8192`` learns every fourth step. Tokens of a step beyond the end of a chunk belong to
    the next one. So a group learns once per C tokens on average even if C is no multiple of a
    step's tokens, but never more than once per step. A group with a ``lifetime`` is reset to zero,
    after its update, each time that many tokens have passed: its parameters are then an addition to
    weights that learn more slowly (nested levels, Eq 72). A reset drops the gradients of a chunk
    that is under way, and keeps the wrapped optimizer's state.

    Args:
        optimizer: any torch optimizer whose ``step`` does not need a closure. It keeps the
            ``param_groups``, ``defaults`` and ``state``.
        chunk: C, for groups that do not have their own. It is counted in tokens, which are steps if
            ``tokens`` is 1 (default: 1).
        reduce: "mean" or "sum" over the chunk, for groups that do not have their own. With the mean
            a slow group takes rarer steps but not larger ones, even if the wrapped optimizer is not
            scale-invariant (default: "mean").
        tokens: the tokens of one step, for groups that do not have their own. If batches differ,
            set the groups' ``tokens`` before each step (default: 1).
        lifetime: tokens after which a group's parameters are reset to zero, for groups that do not
            have their own; None for never (default: None).

    The groups also have ``pending_steps`` and ``pending_tokens``, counts of the present chunk, and
    ``lived_tokens``, those since the last reset. In a chunk, a step without a gradient for a
    parameter counts as a gradient of zero. A parameter without any gradient in the chunk is not
    stepped. Gradients are left as the backward pass made them. ``torch.amp.GradScaler`` unscales
    before ``step``, and a step that it skips does not count. To change gradients between
    accumulation and update, for example to clip by the norm of what is applied, use :meth:`due`
    instead of ``step``.

    State per parameter: that of the wrapped optimizer, and 1 float while a chunk of more than one
    step is under way (float32 for narrower parameters), the sum of its gradients in ``pending``.
    Checkpoints hold both, so a run that is resumed in mid-chunk continues bit for bit. The sum must
    be finite, not only the mean: in float32, four gradients of 1e38 add up to infinity, as they do
    when the backward pass accumulates them.

    .. note::
        Use ``state_dict`` to save in mid-chunk. torch's ``get_optimizer_state_dict`` has two
        pitfalls. With ``flatten_optimizer_state_dict=True`` it drops the pending gradients, and
        loading refuses the result: call ``flush`` first. And if the optimizer has no state yet, it
        takes a step with gradients of zero and a rate of 0, which counts as a step of the chunk:
        call it between chunks or after the first update; for an optimizer that has not been
        stepped, call ``flush("discard")`` after it.

    Cost: one addition per parameter and step.

    Raises:
        TypeError: ``optimizer`` is not one, or its ``step`` needs a closure.
        ValueError: a ``chunk``, ``reduce``, ``tokens`` or ``lifetime`` out of range, named with its
            value.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, section 7.1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        chunk: int = 1,
        *,
        reduce: Literal["mean", "sum"] = "mean",
        tokens: int = 1,
        lifetime: int | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Invalid optimizer: {optimizer!r} is not a torch.optim.Optimizer")
        if any("pending_steps" in group for group in optimizer.param_groups):
            raise TypeError(
                "Invalid optimizer: it has a Continuum already; give its groups a chunk"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"Invalid optimizer: {type(optimizer).__name__} evaluates the model by a closure "
                "at every step, so there are no gradients to accumulate over a chunk"
            )
        defaults: Group = {
            "chunk": chunk,
            "reduce": reduce,
            "tokens": tokens,
            "lifetime": lifetime,
        }
        defaults |= {"pending_steps": 0, "pending_tokens": 0, "lived_tokens": 0}
        for group in ({}, *optimizer.param_groups):  # {}: the arguments themselves
            _check({**defaults, **group})
        self.optimizer = optimizer
        self.pending: dict[Tensor, Tensor] = {}
        # Sets up hooks and profiling. Optimizer.__init__ would also make groups.
        super().__setstate__({})
        self.defaults.update(defaults)
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)

    # What torch, schedulers and scalers look at is the wrapped optimizer's.

    @property
    def param_groups(self) -> list[Group]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """What the wrapped optimizer has beside torch's interface, such as ``train`` and ``eval``.

        Private names are not passed on: torch's scaler reads what an optimizer can do from them.
        """
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's, which may do more than torch's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: Group) -> None:
        """The wrapped optimizer's, after a check of what is read here."""
        _check({**self.defaults, **param_group})
        self.optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self.optimizer!r}"

    # -- the step ----------------------------------------------------------------------------

    @disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the groups whose chunk ends; the gradients of the others wait.

        Args:
            closure: reevaluates the model and returns the loss, which ``step`` then returns.
        """
        loss = None if closure is None else evaluate_closure(closure)
        with self.due() as groups:
            if groups:
                self.optimizer.step()
        return loss

    @contextmanager
    def due(self) -> Iterator[list[Group]]:
        """Use this instead of ``step``, once per step, to do something before the update::

            with optimizer.due():
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.optimizer.step()

        Inside, a parameter whose chunk ends has the chunk's gradient, and one whose chunk does
        not end has none, which every optimizer skips. Afterwards ``.grad`` is what it was. After an
        exception nothing has been counted, and the step can be tried again.

        Yields:
            The groups whose chunk ends.
        """
        for group in self.param_groups:
            _check(group)
        pending, counts, grads = dict(self.pending), [], {}
        due = []
        with isolated_from_caller(torch.is_grad_enabled()):
            for group in self.param_groups:
                count = group["pending_steps"] + 1
                tokens = group["pending_tokens"] + group["tokens"]
                ends = tokens >= group["chunk"]
                counts.append((group, 0 if ends else count, tokens % group["chunk"]))
                if ends:
                    due.append(group)
                if ends and count == 1:  # a chunk of one step: .grad is taken as it is
                    continue
                for param in group["params"]:
                    total = _plus(pending.pop(param, None), param, group)
                    grads[param] = _reduced(total, param, group, count) if ends else None
                    if not ends and total is not None:
                        pending[param] = total
        with _swapped(grads):
            yield due
        self.pending = pending
        for group, count, tokens in counts:
            group.update(pending_steps=count, pending_tokens=tokens)
            if group["lifetime"] is not None:
                self._age(group)

    def _age(self, group: Group) -> None:
        """Count a step's tokens, and reset the parameters when their lifetime is over.

        The pending gradients are dropped too, because they were taken at the old values.
        """
        lived = group["lived_tokens"] + group["tokens"]
        group["lived_tokens"] = lived % group["lifetime"]
        if lived < group["lifetime"]:
            return
        with torch.no_grad():
            for param in group["params"]:
                param.zero_()
                self.pending.pop(param, None)
        group["pending_steps"] = 0  # but not its tokens: chunks go on ending where they did

    def flush(self, partial: Literal["step", "discard"]) -> None:
        """End all chunks that are under way, at the end of training for example.

        Args:
            partial: "step" steps the groups whose chunk has begun, with the mean (or sum) over the
                steps so far; "discard" drops the pending gradients.

        Raises:
            ValueError: another ``partial``, or a ``chunk``, ``reduce``, ``tokens`` or ``lifetime``
                that was changed to an invalid value.
        """
        if partial not in PARTIAL:
            raise ValueError(f"Invalid partial: {partial!r}; choose from {PARTIAL}")
        for group in self.param_groups:
            _check(group)
        waiting = [group for group in self.param_groups if group["pending_steps"]]
        if partial == "step" and waiting:
            params = [param for group in self.param_groups for param in group["params"]]
            grads: dict[Tensor, Tensor | None] = dict.fromkeys(params)
            with isolated_from_caller(torch.is_grad_enabled()):
                for group in waiting:
                    for param in group["params"]:
                        total = self.pending.get(param)
                        grads[param] = _reduced(total, param, group, group["pending_steps"])
            with _swapped(grads):
                self.optimizer.step()
        self.pending = {}
        for group in waiting:
            group.update(pending_steps=0, pending_tokens=0)

    # -- checkpoints -------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "pending": self.pending}

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's; a parameter that waits has its ``pending_grad`` there too."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = self.optimizer.state_dict()
        state = dict(saved["state"])
        for index, param in self._indexed(saved).items():
            if param in self.pending:
                state[index] = {**state.get(index, {}), PENDING: self.pending[param]}
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, saved)
            saved = saved if replaced is None else replaced
        return saved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The wrapped optimizer's, and what waits; it may be a checkpoint of that optimizer alone.

        Raises:
            ValueError: no optimizer's state, what the wrapped one refuses, a pending gradient that
                does not fit its parameter, or a group in mid-chunk of which no parameter has a
                pending gradient although some require gradients: whoever saved it dropped them, or
                the group had none in the chunk so far, which a checkpoint does not tell apart.
                Nothing has changed then.
        """
        if (
            not isinstance(state_dict, Mapping)
            or not {"state", "param_groups"} <= state_dict.keys()
        ):
            raise ValueError(
                "Invalid state_dict: it needs the keys 'state' and 'param_groups', as "
                "optimizer.state_dict() has them; is this the model's?"
            )
        incoming = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, incoming)
            incoming = incoming if replaced is None else replaced
        params, state, pending = self._indexed(incoming), {}, {}
        for index, entry in incoming["state"].items():
            if isinstance(entry, dict) and PENDING in entry:
                entry = dict(entry)
                grad, param = entry.pop(PENDING), params.get(index)
                if param is not None and grad.shape != param.shape:
                    raise ValueError(
                        f"the checkpoint's pending gradient of parameter number {index} has shape "
                        f"{tuple(grad.shape)}, the parameter {tuple(param.shape)}"
                    )
                if param is not None:
                    pending[param] = grad.detach().to(param.device, state_dtype(param), copy=True)
                if not entry:  # its optimizer has not stepped it yet
                    continue
            state[index] = entry
        groups = [dict(group) for group in incoming["param_groups"]]
        for number, (mine, group) in enumerate(zip(self.param_groups, groups, strict=False)):
            for key in ("chunk", "reduce", "tokens", "lifetime"):
                group.setdefault(key, mine[key])
            group.setdefault("pending_steps", 0)
            group.setdefault("pending_tokens", group["pending_steps"] * group["tokens"])
            group.setdefault("lived_tokens", 0)
            _check(group)
            learns = any(param.requires_grad for param in mine["params"])
            if group["pending_steps"] and learns and pending.keys().isdisjoint(mine["params"]):
                raise ValueError(
                    f"the checkpoint's group number {number} has pending_steps="
                    f"{group['pending_steps']} but no {PENDING}, which torch's "
                    "flatten_optimizer_state_dict=True drops; save without it or after flush(), or "
                    "set pending_steps to 0 in the checkpoint's group to begin its chunk anew"
                )
        self.optimizer.load_state_dict({**incoming, "state": state, "param_groups": groups})
        self.pending = pending
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _indexed(self, saved: Mapping[str, Any]) -> dict[Any, Tensor]:
        """Parameters by their index in a state dict. As in torch, positions are matched."""
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        return dict(zip(indices, params, strict=False))  # torch itself refuses other lengths


def _check(group: Group) -> None:
    for name, unit in (
        ("chunk", "steps or tokens"), ("tokens", "tokens in a step"), ("lifetime", "tokens"),
    ):  # fmt: skip
        value = group[name]
        if name == "lifetime" and value is None:
            continue
        if not is_int(value) or value < 1:
            raise ValueError(
                f"Invalid {name}: {value!r}; it must be a whole number of {unit}, at least 1"
            )
    if group["reduce"] not in REDUCTIONS:
        raise ValueError(f"Invalid reduce: {group['reduce']!r}; choose from {REDUCTIONS}")


def _plus(pending: Tensor | None, param: Tensor, group: Group) -> Tensor | None:
    """The sum of ``pending`` and ``param.grad``, as a new tensor or ``pending`` itself.

    It shares no memory with ``param.grad``, into which the next backward pass may accumulate.
    ``pending`` is not written into, so that a step that raises can be tried again.
    """
    if param.grad is None:
        return pending
    grad = param.grad if group.get("differentiable") else param.grad.detach()
    if pending is None:
        return grad.to(state_dtype(param), copy=True)
    return pending + grad


def _reduced(total: Tensor | None, param: Tensor, group: Group, count: int) -> Tensor | None:
    if total is None:
        return None
    return (total / count if group["reduce"] == "mean" else total).to(param.dtype)


@contextmanager
def _swapped(grads: Mapping[Tensor, Tensor | None]) -> Iterator[None]:
    """A context in which parameters have other gradients; afterwards they have their own again."""
    originals = {param: param.grad for param in grads}
    try:
        for param, grad in grads.items():
            param.grad = grad
        yield
    finally:
        for param, grad in originals.items():
            param.grad = grad
