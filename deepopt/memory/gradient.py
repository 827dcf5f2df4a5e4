"""No memory: plain gradient descent (Eq 7, Eq 8, Eq 9)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gradient:
    """What it reads is the gradient that was just written. State: none."""

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        pass

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return grad
