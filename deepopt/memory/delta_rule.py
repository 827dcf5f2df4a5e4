"""The paper's delta momentum: as printed, as derived, and solved implicitly (Eq 48, Eq 49).

:class:`deepopt.memory.Delta` resolves the same equations differently, for a read-out that is
orthogonalized: its keys are normalized, and its momentum is an average.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from deepopt.memory.preconditioned import Preconditioned
from deepopt.ops import ridge

Rule = Literal["implicit", "derived", "literal"]
RULES: tuple[Rule, ...] = ("implicit", "derived", "literal")


@dataclass(frozen=True)
class DeltaRule(Preconditioned):
    r"""Momentum that maps the gradient as a key to :math:`-P`, and erases what the key recalled.

    The inner objective is :math:`\frac12\|m G_t^\top + P_t\|^2`. With :math:`B = -m/\eta`, the
    momentum in units of the step, and the inner learning rate :math:`\eta`:

    .. math::
        \texttt{implicit:}\quad B_t &= (\alpha B_{t-1} + P_t G_t)(I + \eta\, G_t^\top G_t)^{-1} \\
        \texttt{derived:}\quad B_t &= B_{t-1}(\alpha I - \eta\, G_t^\top G_t) + P_t G_t \\
        \texttt{literal:}\quad B_t &= B_{t-1}(\alpha I - G_t^\top G_t) + P_t G_t

    ``derived`` is a gradient step and the decay. It grows without bound while
    :math:`\eta\|G\|_2^2 > 1+\alpha`. ``literal`` has the erase term as the paper prints it, without
    its rate, and grows while :math:`\|G\|_2^2 > 1+\alpha`. ``implicit`` is the proximal step from
    :math:`\alpha B_{t-1}`: it contracts for every gradient, and for P = I

    .. math:: \|B_t\|_2 \le \alpha \|B_{t-1}\|_2 + \frac{1}{2\sqrt\eta}
        \le \frac{1}{2\sqrt\eta\,(1-\alpha)}.

    P acts from the left, so it may be applied before or after the factor on the right. It is
    applied after it, to :math:`G_t (I + \eta\,G_t^\top G_t)^{-1}`. This keeps the bound in floating
    point, and for every P that keeps norms, up to a factor :math:`\sqrt{\text{rank}}`.

    A vector of n is a matrix of one column: :math:`G^\top G` is then the number
    :math:`\|G\|^2`, "gradient-dependent weight decay" in the paper's words. If the momentum of a
    steady gradient converges, it converges to :math:`P G / (1-\alpha+\eta\|G\|^2)` under all rules;
    ``literal`` has 1 instead of :math:`\eta`.

    Args:
        preconditioner: P (default: the identity).
        rule: one of the three above (default: "implicit").
        rate: eta, at least 0; not used by ``literal`` (default: 1e-2).

    State: 1 float per parameter and the preconditioner's.

    Cost per m x n matrix, with r and R its short and its long side: 4 r²R FLOPs; ``implicit``
    8 r²R + r³/3, of which 2 r²R solve triangular systems, in float64 where the device has it.
    """

    rule: Rule = "implicit"
    rate: float | Tensor = 1e-2

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        self.preconditioner.write(state, grad)
        momentum = state["momentum"]
        if self.rule == "implicit":  # both terms of the sum are multiplied by (I + eta GᵀG)^-1
            # One solve, on the rows of the gradient, serves both.
            momentum, grad = ridge(momentum, grad, self.rate)
            momentum = retention * momentum
        else:
            rate = self.rate if self.rule == "derived" else 1.0
            momentum = retention * momentum - rate * _recalled(momentum, grad)
        state["momentum"] = momentum + self.preconditioner.read(state, grad)


def _recalled(momentum: Tensor, grad: Tensor) -> Tensor:
    """``momentum gradᵀ grad``, by way of the short side."""
    if grad.shape[-2] <= grad.shape[-1]:
        return (momentum @ grad.mT) @ grad
    return momentum @ (grad.mT @ grad)
