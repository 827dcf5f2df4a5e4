"""DeltaMomentum: a momentum that forgets what the present gradient recalls."""

import math
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt.memory.delta_rule import RULES, DeltaRule, Rule
from deepopt.memory.preconditioner import resolve
from deepopt.optim.base import Group, MemoryOptimizer, arguments_of


class DeltaMomentum(MemoryOptimizer):
    r"""Momentum with the delta rule, the paper's Eq 48, Eq 49.

    The momentum is an associative memory with the gradient G for a key and -P for a value, trained
    online on :math:`\frac12\|m G^\top + P\|^2`. In units of a step, :math:`B = -m/\eta`, with
    an inner learning rate :math:`\eta`, which in the paper is :math:`\gamma`:

    .. math::
        \texttt{implicit:}\quad B_t &= (\alpha B_{t-1} + P_t G_t)(I + \eta\, G_t^\top G_t)^{-1} \\
        \texttt{derived:}\quad B_t &= B_{t-1}(\alpha I - \eta\, G_t^\top G_t) + P_t G_t \\
        \texttt{literal:}\quad B_t &= B_{t-1}(\alpha I - G_t^\top G_t) + P_t G_t \\
        W_t &= (1 - \gamma\lambda) W_{t-1} - \gamma B_t

    It is momentum where gradients are small, :math:`\eta\|G\|^2 \ll 1-\alpha`. Where they are large
    the memory of their own directions fades, and so does the step. For a vector under a constant
    gradient it converges to :math:`B = P G/(1-\alpha+\eta\|G\|^2)`, which is largest for
    :math:`\eta\|G\|^2 = 1-\alpha`.

    - ``rule="implicit"`` is the proximal step on the inner objective and stable for every gradient:
      for P = I no step is longer than :math:`\gamma/(2\sqrt\eta\,(1-\alpha))` in spectral norm,
      which is :math:`\sqrt\gamma/(2(1-\alpha))` for :math:`\eta=\gamma`.
    - ``rule="derived"`` is the plain gradient step on it, and unstable where
      :math:`\eta\|G\|_2^2 > 1+\alpha`.
    - ``rule="literal"`` is what the paper prints: without the rate of the erase term, and so
      unstable where :math:`\|G\|_2^2 > 1+\alpha`. It is there to see what the paper says.

    Every parameter is stepped by this rule; a vector is a matrix of one column, so that
    :math:`G^\top G` is the number :math:`\|G\|^2`, and a scalar one of one entry.

    Args:
        params: as for :class:`PreconditionedMomentum`.
        lr: learning rate, gamma; a float or a 1-element tensor. In the units of SGD with momentum:
            for transformers usually from 0.01 to 1, at norm-1 gradient clipping (default: 1e-2).
        betas: retention of the momentum, alpha, and of the preconditioner's running means
            (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator, on the element-wise path alone (default: 1e-8).
        weight_decay: decoupled weight decay, lambda (default: 0).
        rule: "implicit", "derived" or "literal" (default: "implicit").
        inner_lr: eta, at least 0, where 0 is plain momentum; None for ``lr``, schedule and all, as
            in the paper. "literal" has none (default: None).
        preconditioner: P, as for :class:`PreconditionedMomentum`. Your own function is called
            with gradients, under "implicit" with :math:`G(I+\eta G^\top G)^{-1}`: the same for
            the paper's P, which acts from the left (default: "identity").
        path: as for :class:`PreconditionedMomentum` (default: "matrix").
        [flags]

    State: 1 float per parameter, and for an m x n matrix 1/n more ("diagonal") or 2m/n more
    ("left_gram", m <= n).

    Cost per m x n matrix, r = min(m, n), R = max(m, n): 4 r²R FLOPs; "implicit" 8 r²R + r³/3, in
    float64 where the device has it. The preconditioner's come on top.

    Raises:
        ValueError: an argument out of range, named with its value.
        TypeError: a ``preconditioner`` that is neither a name nor a function.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, section 4.4. The bracket stands
    to the right of the momentum, because only there its shape fits, and the value is -P, because
    that is what makes the printed step one of descent.
    """

    _min_dims: ClassVar[dict[str, int]] = {"matrix": 0, "stack": 3}
    _objects = ("preconditioner",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rule: Rule = "implicit",
        inner_lr: float | None = None,
        preconditioner: str | Callable[[Tensor], Tensor] = "identity",
        path: str = "matrix",
        rounding: str = "nearest",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments_of(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        rule, inner_lr = group["rule"], group["inner_lr"]
        if rule not in RULES:
            raise ValueError(f"Invalid rule: {rule!r}; choose from {RULES}")
        if inner_lr is not None and not 0.0 <= inner_lr < math.inf:
            raise ValueError(
                f"Invalid inner_lr: {inner_lr}; it must be finite and not negative, or None for "
                "the learning rate"
            )
        if inner_lr is not None and rule == "literal":
            raise ValueError(
                f"Invalid inner_lr: {inner_lr}; rule='literal' has none, use rule='derived'"
            )
        self._memory(group)

    def _memory(self, group: Group) -> DeltaRule:
        rate = group["lr"] if group["inner_lr"] is None else group["inner_lr"]
        rate = rate.squeeze() if isinstance(rate, Tensor) else rate
        preconditioner = resolve(group["preconditioner"], group["betas"][1], group["capturable"])
        return DeltaRule(preconditioner, group["rule"], rate)
