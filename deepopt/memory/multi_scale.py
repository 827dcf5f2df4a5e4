"""Momenta at two time scales: the memories of M3 (Alg. 1, Eq 75)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepopt._arguments import check_fields
from deepopt.memory.linear import Linear
from deepopt.ops import combine, frobenius, multi_scale_write

LINEAR = Linear()


@dataclass(frozen=True)
class MultiScale:
    r"""A fast momentum, written at every step, and a slow one, written once per chunk.

    With f = ``slow_chunk``, k the chunks that have ended and :math:`t = kf + 1, \dots, (k+1)f`:

    .. math::
        M^{(1)}_t &= \beta_1 M^{(1)}_{t-1} + (1-\beta_1)\, G_t \\
        M^{(2)}_{k+1} &= \beta_{3,k} M^{(2)}_k + (1-\beta_{3,k})\, \frac1f \sum_{t} G_t, \qquad
        \beta_{3,k} = \min\Big(\beta_3, \frac{k}{k+4}\Big) \\
        \alpha_k &= \alpha \min\Big(1, \frac{kf}{\texttt{ramp}}\Big)

    so that the slow momentum averages about the last quarter of the run until that is longer than
    1/(1 - beta3) chunks, and its weight grows with the run (AdEMAMix, arXiv 2409.03137, ramps both
    too).

    The gate multiplies :math:`\alpha_k` by
    :math:`\max(0, a^{(2)}_t) / \max(a^{(1)}_t, a^{(2)}_t)`, where :math:`a^{(i)}` is the running
    mean, of retention beta1, of the cosine between the gradient and :math:`M^{(i)}` before it is
    written. Where the slow momentum predicts gradients less well than the fast one does, as after a
    change of task, its weight falls in proportion.

    Read: :math:`\hat M^{(1)} + \alpha_k M^{(2)} \|\hat M^{(1)}\|_F / \|M^{(2)}\|_F` with the
    look-ahead :math:`\hat M^{(1)}` of :class:`Linear`, scaled back to its norm.

    The chunk's sum has no tensor of its own. Its terms go into :math:`M^{(2)}` as they come, the
    first one together with the decay, and the sum is complete when the chunk ends.

    Args:
        slow_chunk: f, writes per chunk, at least 1 (default: 10).
        beta3: largest retention of the slow momentum per chunk, in [0, 1) (default: 0.99).
        alpha: weight of the slow momentum beside the fast one's 1 (default: 0.5).
        ramp: writes until the weight reaches alpha; in the first chunk it is always 0
            (default: 500).
        gate: multiply the weight by the ratio above (default: False).

    State: 2 floats per parameter, and 2 per matrix with the gate.

    Raises:
        ValueError: an argument outside its range.
    """

    slow_chunk: int = 10
    beta3: float = 0.99
    alpha: float = 0.5
    ramp: int = 500
    gate: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.slow_chunk, int) or self.slow_chunk < 1:
            raise ValueError(
                f"Invalid slow_chunk: {self.slow_chunk}; it must be a whole number of steps, "
                "at least 1"
            )
        if not 0.0 <= self.beta3 < 1.0:
            raise ValueError(f"Invalid beta3: {self.beta3}; it must be in [0, 1)")
        if not 0.0 <= self.alpha < float("inf"):
            raise ValueError(f"Invalid alpha: {self.alpha}; it must be finite and at least 0")
        if not self.ramp >= 0:
            raise ValueError(f"Invalid ramp: {self.ramp}; it must be a number of steps, at least 0")

    def init(self, like: Tensor) -> dict[str, Tensor]:
        state = {**LINEAR.init(like), "slow": torch.zeros_like(like)}
        if self.gate:
            state["agreement"] = like.new_zeros(len(like), 2)
        return state

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        self._write(state, grad, retention)

    def _write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        """Write, and return the fast momentum's look-ahead, shape (B, m, n)."""
        if self.gate:
            cosines = [_cosine(grad, state[key]) for key in ("momentum", "slow")]
            state["agreement"] = state["agreement"].lerp(torch.stack(cosines, -1), 1 - retention)
        step = state["step"].to(grad, non_blocking=True)
        state["momentum"], state["slow"], ahead = multi_scale_write(
            state["momentum"], state["slow"], grad, step, retention, self.slow_chunk, self.beta3
        )
        return ahead

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        fast, slow = LINEAR.read(state, grad, retention), state["slow"]
        info, size = torch.finfo(grad.dtype), frobenius(fast)
        ratio = (size / frobenius(slow).clamp_min(info.tiny)).clamp_max(info.max)
        weight = (self.weight(state, grad) * ratio).clamp_max(info.max)
        mixed = combine([fast, slow], torch.stack([torch.ones_like(weight), weight]))
        return mixed * (size / frobenius(mixed).clamp_min(info.tiny))[:, None, None]

    def weight(self, state: dict[str, Tensor], grad: Tensor) -> Tensor:
        """The slow momentum's weight beside the fast one's 1, shape (B,)."""
        # Steps in the chunks that were complete before the last write.
        before = state["step"].to(grad, non_blocking=True) - 1
        steps = before - before % self.slow_chunk
        weight = (steps * (self.alpha / max(self.ramp, 1))).clamp_max(self.alpha)
        if not self.gate:
            return weight
        fast, slow = state["agreement"].unbind(-1)
        best = torch.maximum(fast, slow).clamp_min(torch.finfo(grad.dtype).tiny)
        return weight * slow.clamp_min(0.0) / best

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The slow momentum's weight."""
        like = state["slow"]
        return {"slow weight": self.weight({**state, "step": state["step"].reshape(1)}, like)}


class FastOfMultiScale(MultiScale):
    """The same memory, but it reads the fast momentum alone, in the pass that writes both.

    It is for M3 with ``mix="post"``, whose output map mixes in the slow momentum.
    """

    def write_and_read(
        self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor
    ) -> Tensor:
        return self._write(state, grad, retention)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return LINEAR.read(state, grad, retention)


@dataclass(frozen=True)
class MultiScaleSums:
    r"""The memory of Alg. 1 as printed: sums, which forget nothing.

    .. math::
        M^{(1)} \leftarrow M^{(1)} + \beta_1 G, \qquad V \leftarrow V + \beta_2 G^2, \qquad
        M^{(2)} \leftarrow M^{(2)} + \beta_3 \sum_{\text{chunk}} G

    with :math:`\beta_1` the ``retention`` of :meth:`write`; the sum over the chunk goes in term by
    term, so that :math:`M^{(2)}` is Alg. 1's whenever a chunk has just ended. The printed sum has
    f + 1 terms, of which one belongs to two chunks; here it has the chunk's f.

    Args:
        beta2: factor of the squares.
        beta3: factor of the slow sum.

    State: 3 floats per parameter.
    """

    beta2: float
    beta3: float

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {key: torch.zeros_like(like) for key in ("momentum", "slow", "squares")}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        state["momentum"] = state["momentum"] + retention * grad
        state["squares"] = state["squares"] + self.beta2 * grad.square()
        state["slow"] = state["slow"] + self.beta3 * grad

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return state["momentum"]


def _cosine(left: Tensor, right: Tensor) -> Tensor:
    tiny = torch.finfo(left.dtype).tiny
    left, right = (x / frobenius(x).clamp_min(tiny)[:, None, None] for x in (left, right))
    return (left * right).sum((-2, -1))
