"""A memory that is told which regime it is in: a bound on those that have to guess."""

from dataclasses import dataclass

from torch import Tensor

from deepopt.memory import Linear

LINEAR = Linear()


@dataclass(frozen=True)
class Oracle:
    """Linear memories, one for every regime, or for every step of a regime's visits.

    Regimes take turns after a fixed number of steps, so the number of the step tells which memory
    is the present one. It is written and read; the others rest.

    Args:
        period: steps of a visit.
        regimes: how many take turns.
        by_step: keep a memory per step of a visit instead of one per regime: the first gradient of
            a visit is averaged with the first ones of earlier visits.
    """

    period: int
    regimes: int
    by_step: bool = False

    def init(self, like: Tensor) -> dict[str, Tensor]:
        memories = self.regimes * (self.period if self.by_step else 1)
        return {"memories": like.new_zeros(like.shape[0], memories, *like.shape[1:])}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        present = self._present(state)
        LINEAR.write(present, grad, retention)
        state["memories"][:, self._index(state)] = present["momentum"]

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return LINEAR.read(self._present(state), grad, retention)

    def _present(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the linear memory that belongs to this step."""
        return {"momentum": state["memories"][:, self._index(state)]}

    def _index(self, state: dict[str, Tensor]) -> int:
        step = int(state["step"][0]) - 1  # the optimizer counts the present gradient
        if self.by_step:
            return step % (self.period * self.regimes)
        return step // self.period % self.regimes
