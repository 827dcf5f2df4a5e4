"""Any ``nn.Module`` as a memory: gradients train its weights, the state (Eq 50, Eq 51, Eq 52)."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from deepopt._arguments import check_fields
from deepopt.ops import normalized, root_mean_square

Factory = Callable[[int, int], nn.Module]
Objective = Callable[[Tensor, Tensor], Tensor]

GRANULARITIES = ("coordinate", "row")
OBJECTIVES = ("l2", "dot", "literal")

TRAINED_AT_ONCE = 2**22
"""Upper bound on the entries that are trained together, which limits the scratch memory."""


class TanhMLP(nn.Module):
    r"""The built-in module: :math:`\sqrt{o/h}\; V \tanh(U x / \sqrt i)` of widths i, h and o.

    U is drawn from the normal distribution and V is zero, so that a fresh memory recalls nothing.
    The factors make an inner learning rate below 1 stable for any widths: with keys and errors of
    root mean square 1 the mean square error has a curvature of at most 1 in V. There is no bias, so
    that a zero gradient recalls nothing.
    """

    def __init__(self, in_features: int, out_features: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(hidden, in_features))
        self.last = nn.Parameter(torch.zeros(out_features, hidden))

    def forward(self, keys: Tensor) -> Tensor:
        inputs, hidden = self.first.shape[1], self.last.shape[1]
        active = torch.tanh(keys @ self.first.mT / inputs**0.5)
        return active @ self.last.mT * (self.last.shape[0] / hidden) ** 0.5


@functools.cache
def tanh_mlp(hidden: int) -> Factory:
    """The factory of :class:`TanhMLP`, one object for every width."""
    return functools.partial(TanhMLP, hidden=hidden)


@dataclass(frozen=True)
class Module:
    r"""A memory that is a module m, trained on each gradient by gradient descent (Eq 50).

    For the weights θ of m, fresh at θ₀, and a gradient :math:`u = G_t / s_t`,

    .. math::
        \theta_t &= \theta_0 + \beta\,(\theta_{t-1} - \theta_0)
            - \eta\, \nabla_\theta L\big(m_{\theta_{t-1}};\, u\big) \\
        \text{read} &= -\,s_t\, m_{\theta_t}(u)

    The memory is updated first and read at the same gradient, as printed. It has two forms:

    - ``"row"``: m maps every row of u to a row, :math:`s_t` is the root mean square of
      :math:`G_t`. A row recalls what rows like it were taught, in this step and in those before.
    - ``"coordinate"``: m maps features of every entry to a number: the gradient and its averages
      :math:`M^k` at the retentions :math:`\beta` and ``time_scales``, each divided by its own root
      mean square. The module corrects the linear momentum: :math:`m(u)` is what it says minus
      :math:`\bar M_t / s_t`, where :math:`\bar M_t` is :math:`M^1_t` without its bias towards zero
      and :math:`s_t` the larger of the root mean squares of :math:`G_t` and :math:`\bar M_t`.

    Args:
        factory: ``factory(in_features, out_features)`` makes a module that maps (..., in_features)
            to (..., out_features). It is called with torch's CPU generator seeded with 0, so that
            all matrices of a shape have the same θ₀. Parameters that do not require gradients stay
            as they are.
        granularity: "row" or "coordinate" (default: "row").
        objective: inner objective: "l2", the mean of :math:`\frac12 (m(u) + P u)^2`; "dot", the
            mean of :math:`m(u) \odot u`; a callable ``(outputs, grad)`` of two (m, n) tensors,
            m(u) and u of one matrix, to a scalar; or "literal", the whole rule as printed: the
            objective is the sum of m(u), the key is the gradient itself (:math:`s_t = 1`), θ
            decays to zero, and nothing is added to the module's output (default: "l2").
        inner_lr: η, of the inner learning; :math:`(1-\beta)/\eta` is the ridge that holds θ at θ₀
            (default: 1).
        inner_steps: gradient steps of inner learning per gradient; only the first applies the
            retention (default: 1).
        feature_map: None, coefficients (c₁, c₃, c₅, ...) of an odd polynomial of the entries of u,
            or a callable of (B, m, n); the keys are what it returns (default: None).
        preconditioner: P of the "l2" objective, a callable of (B, m, n); None is the identity
            (default: None).
        time_scales: retentions of further averages, features in the coordinate form
            (default: (0.99,)).

    State per matrix: twice the weights of the module, θ and θ₀ (once, if "literal"); in the
    coordinate form 1 + len(time_scales) floats per parameter besides.

    Raises:
        ValueError: an argument out of range; later a module with buffers, without parameters to
            train, or with outputs of another shape, or an objective that returns no scalar.
        TypeError: a factory that cannot be called, or that returns no module.
    """

    factory: Factory
    granularity: Literal["row", "coordinate"] = "row"
    objective: str | Objective = "l2"
    inner_lr: float = 1.0
    inner_steps: int = 1
    feature_map: Sequence[float] | Callable[[Tensor], Tensor] | None = None
    preconditioner: Callable[[Tensor], Tensor] | None = None
    time_scales: Sequence[float] = (0.99,)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.factory, nn.Module) or not callable(self.factory):
            raise TypeError(
                f"Invalid memory: {self.factory!r} is no factory; give a callable "
                "(in_features, out_features) -> nn.Module, such as nn.Linear"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"Invalid granularity: {self.granularity!r}; choose from {GRANULARITIES}"
            )
        if not callable(self.objective) and self.objective not in OBJECTIVES:
            raise ValueError(
                f"Invalid objective: {self.objective!r}; choose from {OBJECTIVES} or a callable"
            )
        if not 0.0 <= self.inner_lr < math.inf:
            raise ValueError(
                f"Invalid inner_lr: {self.inner_lr}; it must be finite and not negative"
            )
        if not isinstance(self.inner_steps, int) or self.inner_steps < 1:
            raise ValueError(
                f"Invalid inner_steps: {self.inner_steps}; it must be a whole number of at least 1"
            )
        powers = self.feature_map
        if not (powers is None or callable(powers)) and not (
            isinstance(powers, tuple | list)
            and powers
            and all(isinstance(c, int | float) for c in powers)
        ):
            raise ValueError(
                f"Invalid feature_map: {powers!r}; give None, the coefficients (c1, c3, ...) of an "
                "odd polynomial, or a callable"
            )
        if self.preconditioner is not None and not callable(self.preconditioner):
            raise ValueError(
                f"Invalid preconditioner: {self.preconditioner!r}; give None or a callable"
            )
        if not all(0.0 <= retention < 1.0 for retention in self.time_scales):
            raise ValueError(
                f"Invalid time_scales: {self.time_scales}; retentions must be in [0, 1)"
            )

    def init(self, like: Tensor) -> dict[str, Tensor]:
        module = _make(self.factory, *self._widths(like), like.device)
        state = {}
        for name, weight in module.named_parameters():
            for kind in ("weight",) if self._literal else ("weight", "origin"):
                alike = weight.detach().to(like.device, like.dtype).expand(len(like), *weight.shape)
                state[f"{kind}.{name}"] = alike.clone()
        for index, _ in enumerate(self._retentions(0.0)):
            state[f"average.{index}"] = torch.zeros_like(like)
        return state

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        for index, kept in enumerate(self._retentions(retention)):
            state[f"average.{index}"] = state[f"average.{index}"].lerp(grad, 1 - kept)
        module = _skeleton(self.factory, *self._widths(grad), get_ident())
        keys, base, scale = self._keys(state, grad, retention)
        u = grad / scale.clamp_min(torch.finfo(grad.dtype).tiny)
        target = u if self.preconditioner is None else self.preconditioner(u)

        def loss(trained: dict[str, Tensor], fixed: dict[str, Tensor], *matrix: Tensor) -> Tensor:
            keys, base, u, target = matrix
            recalled = functional_call(module, {**fixed, **trained}, (keys,))
            return self._loss(recalled.view(u.shape) + base, u, target)

        at_once = max(1, TRAINED_AT_ONCE // grad[0].numel())
        slope = vmap(torch.func.grad(loss), chunk_size=at_once)
        weights = {k: state[f"weight.{k}"] for k, _ in module.named_parameters()}
        trained = {k: weights[k] for k, w in module.named_parameters() if w.requires_grad}
        fixed = {k: weight for k, weight in weights.items() if k not in trained}
        for step in range(self.inner_steps):
            slopes = slope(trained, fixed, keys, base, u, target)
            for k, weight in trained.items():
                if step == 0:  # the retention counts once for every gradient
                    origin = 0.0 if self._literal else state[f"origin.{k}"]
                    weight = origin + retention * (weight - origin)
                trained[k] = weight - self.inner_lr * slopes[k]
        state.update({f"weight.{k}": weight for k, weight in trained.items()})

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        module = _skeleton(self.factory, *self._widths(grad), get_ident())
        keys, base, scale = self._keys(state, grad, retention)
        weights = {k: state[f"weight.{k}"] for k, _ in module.named_parameters()}
        at_once = max(1, TRAINED_AT_ONCE // grad[0].numel())
        recall = vmap(lambda w, k: functional_call(module, w, (k,)), chunk_size=at_once)
        return -scale * (recall(weights, keys).view(grad.shape) + base)

    @property
    def _literal(self) -> bool:
        return self.objective == "literal"

    def _widths(self, like: Tensor) -> tuple[int, int]:
        """Features and outputs of the module."""
        if self.granularity == "row":
            return like.shape[-1], like.shape[-1]
        return 1 + len(tuple(self._retentions(0.0))), 1

    def _retentions(self, retention: float | Tensor) -> Sequence[float | Tensor]:
        """The retentions of the averages that the state keeps."""
        averages = self.granularity == "coordinate" and not self._literal
        return (retention, *self.time_scales) if averages else ()

    def _keys(
        self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The module's inputs, what is added to its outputs, and s_t, the unit of both."""
        base = torch.zeros_like(grad)
        if self._literal:
            features, scale = [grad], grad.new_ones(len(grad), 1, 1)
        else:
            features, scale = [normalized(grad)], root_mean_square(grad)[:, None, None]
        if averages := [state[f"average.{i}"] for i, _ in enumerate(self._retentions(0.0))]:
            unbias = 1 - retention ** state["step"].to(grad.device, grad.dtype, non_blocking=True)
            linear = averages[0] / unbias[:, None, None]
            features += map(normalized, averages)
            scale = torch.maximum(scale, root_mean_square(linear)[:, None, None])
            base = -linear / scale.clamp_min(torch.finfo(grad.dtype).tiny)
        features[0] = self._map(features[0])
        if self.granularity == "row":
            return features[0], base, scale
        return torch.stack(features, -1).flatten(1, 2), base, scale

    def _map(self, u: Tensor) -> Tensor:
        if self.feature_map is None:
            return u
        if callable(self.feature_map):
            return self.feature_map(u)
        terms = [c * u ** (2 * k + 1) for k, c in enumerate(self.feature_map)]
        return torch.stack(terms).sum(0)

    def _loss(self, outputs: Tensor, u: Tensor, target: Tensor) -> Tensor:
        if self.objective == "l2":
            return (outputs + target).square().mean() / 2
        if self.objective == "dot":
            return (outputs * u).mean()
        if self.objective == "literal":
            return outputs.sum()
        assert callable(self.objective)
        loss = self.objective(outputs, u)
        if not isinstance(loss, Tensor) or loss.shape != ():
            raise ValueError(
                f"Invalid objective: {self.objective!r} must return a scalar tensor for every "
                f"matrix, but returned {tuple(getattr(loss, 'shape', ())) or loss!r}"
            )
        return loss


_MAKE_LOCK = Lock()
"""Held while a module is made: the generator and the default dtype belong to the process."""


def _make(factory: Factory, inputs: int, outputs: int, device: torch.device) -> nn.Module:
    """Make the module, the same at every call, and check it."""
    meta, dtype = device.type == "meta", torch.get_default_dtype()
    with (
        _MAKE_LOCK,
        torch.random.fork_rng(devices=[]),
        torch.device("meta" if meta else "cpu"),
        ExitStack() as at_end,
    ):
        if dtype != torch.float32:  # the generator draws different numbers for other dtypes
            torch.set_default_dtype(torch.float32)
            at_end.callback(torch.set_default_dtype, dtype)
        torch.default_generator.manual_seed(0)
        module = factory(inputs, outputs)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"Invalid memory: {factory!r} must return an nn.Module, but returned {module!r}"
            )
        module.eval()
        if buffers := [name for name, _ in module.named_buffers()]:
            raise ValueError(
                f"Invalid memory: {type(module).__name__} has buffers ({', '.join(buffers)}), "
                "which batched training can neither keep apart nor change; use a module "
                "without, or parameters with requires_grad=False for constants"
            )
        weights = list(module.parameters())
        if not any(weight.requires_grad for weight in weights):
            raise ValueError(f"Invalid memory: {type(module).__name__} has no parameters to train")
        with torch.no_grad():
            result = module(torch.zeros(2, inputs, dtype=weights[0].dtype))
    if not isinstance(result, Tensor) or result.shape != (2, outputs):
        raise ValueError(
            f"Invalid memory: {type(module).__name__} must map (2, {inputs}) to (2, {outputs}), "
            f"but returned {tuple(result.shape) if isinstance(result, Tensor) else result!r}"
        )
    return module


@functools.lru_cache(maxsize=256)
def _skeleton(factory: Factory, inputs: int, outputs: int, thread: int) -> nn.Module:
    """The module on the meta device, to be called with the weights of the state.

    Each thread has its own, because ``functional_call`` swaps the weights in during the call.
    """
    return _make(factory, inputs, outputs, torch.device("meta"))
