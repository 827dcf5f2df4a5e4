"""The linear memory: momentum as the paper finds it (Eq 10, Eq 11, Eq 12, Eq 13, Eq 33, Eq 34).

Eq 45 shows what it forgets.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    r"""Exponential moving average of the gradient.

    Write: one gradient step of rate :math:`1-\beta` on :math:`\frac12\|M-G_t\|^2`,

    .. math:: M_t = \beta M_{t-1} + (1-\beta)\, G_t.

    Read: :math:`\beta M_t + (1-\beta) G_t` (Nesterov's look-ahead) or :math:`M_t`.

    Args:
        nesterov: read with the look-ahead (default: True).

    State: 1 float per parameter.
    """

    nesterov: bool = True

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(like)}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        state["momentum"] = state["momentum"].lerp(grad, 1 - retention)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return grad.lerp(state["momentum"], retention) if self.nesterov else state["momentum"]
