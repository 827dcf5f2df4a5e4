"""A memory that is told which regime it is in: a bound on those that have to guess."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Oracle:
    """Averages of gradients, each of one regime alone, or of one step in a regime's visits.

    Regimes take turns after a fixed number of steps, so the number of the step tells which one it
    is. The average that belongs to the present step is written, and read with Nesterov's
    look-ahead, as the linear memory is. The others rest.

    Args:
        period: steps of a visit.
        regimes: how many take turns.
        by_step: keep an average per step of a visit instead of one per regime: the first gradient
            of a visit is averaged with the first ones of earlier visits.
    """

    period: int
    regimes: int
    by_step: bool = False

    def init(self, like: Tensor) -> dict[str, Tensor]:
        averages = self.regimes * (self.period if self.by_step else 1)
        return {
            "averages": like.new_zeros(like.shape[0], averages, *like.shape[1:]),
            "steps": like.new_zeros(like.shape[0]),
        }

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        state["averages"][:, self._present(state)].lerp_(grad, 1 - retention)
        state["steps"] = state["steps"] + 1

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return grad.lerp(state["averages"][:, self._present(state, 1)], retention)

    def _present(self, state: dict[str, Tensor], written: int = 0) -> int:
        """The number of the average that belongs to this step."""
        step = int(state["steps"][0]) - written
        if self.by_step:
            return step % (self.period * self.regimes)
        return step // self.period % self.regimes
