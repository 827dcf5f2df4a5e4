"""Heavy-ball momentum of a preconditioned gradient (Eq 33, Eq 34 and Eq 46, Eq 47)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepopt.memory.preconditioner import NoPreconditioner, Preconditioner

IDENTITY = NoPreconditioner()


@dataclass(frozen=True)
class Preconditioned:
    r"""Sum of preconditioned gradients that fades by the retention.

    Write: a decay, and one step of gradient ascent on :math:`\langle B, P_t G_t\rangle`, of rate 1.
    This is the paper's momentum in units of the step, :math:`B = -m/\eta`,

    .. math:: B_t = \alpha B_{t-1} + P_t G_t.

    Read: :math:`B_t`, which for a steady gradient is :math:`1/(1-\alpha)` times as large.

    Args:
        preconditioner: P (default: the identity).

    State: 1 float per parameter and the preconditioner's.
    """

    preconditioner: Preconditioner = IDENTITY

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(like), **self.preconditioner.init(like)}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        self.preconditioner.write(state, grad)
        state["momentum"] = retention * state["momentum"] + self.preconditioner.read(state, grad)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return state["momentum"]
