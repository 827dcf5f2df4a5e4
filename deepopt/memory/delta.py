"""The delta-rule memory: forget what the present gradient's keys recall (Eqs 48-49)."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Delta:
    r"""Momentum with a delta rule on the input side, stable for every gradient.

    Eq 49 with the rate on the erase term that its derivation asks for, and with normalised keys:

    .. math::
        K_t &= G_t / s_t, \qquad s_t^2 = \max(a_t,\ \bar\sigma^2(G_t)),
        \quad a_t = 0.9\, a_{t-1} + 0.1\, \bar\sigma^2(G_t) \\
        M_t &= \beta M_{t-1} - \eta\, M_{t-1} K_t^\top K_t + (1-\beta)\, G_t

    one step of inner learning on :math:`\frac{1-\beta}{2}\|M-G\|^2+\frac{\eta}{2}\|MK^\top\|^2`.
    On a stationary stream its mean is

    .. math:: (1-\beta)\,\bar G\,\big[(1-\beta) I + \eta\, E\, K^\top K\big]^{-1},

    a short horizon in the directions that gradients keep coming from, a long one elsewhere.

    :math:`\bar\sigma(G) = \|G\,G^\top G\,G^\top\|_F^{1/4}` bounds the largest singular value from
    above by at most a factor :math:`r^{1/8}` (1.8 for rank 100), so that
    :math:`\|K_t\|_2 \le 1` always, and no power iteration can be caught unaware by a turn of the
    gradient or by a zero one. The Gram matrix it comes from is half of the erase term's product.

    Args:
        rate: eta of the erase term, in [0, 1] (default: 0.3).

    State: 1 float per parameter and 1 per matrix.

    Raises:
        ValueError: a rate outside [0, 1].
    """

    rate: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"Invalid rate: {self.rate}; it must be in [0, 1]")

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(like), "energy": like.new_zeros(like.shape[0])}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        momentum, energy = state["momentum"], state["energy"]
        tiny = torch.finfo(grad.dtype).tiny
        # The fourth power of a singular value leaves float32's range long before the value does.
        scale = grad.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
        keys = grad / scale
        wide = grad.shape[-2] <= grad.shape[-1]
        gram = keys @ keys.mT if wide else keys.mT @ keys
        square = torch.linalg.matrix_norm(gram @ gram).sqrt() * scale[:, 0, 0].square()
        state["energy"] = energy = energy.lerp(square, 0.1)
        # Relative to the keys' own scale, with 0/0 := 0: a zero gradient erases nothing.
        ratio = scale[:, 0, 0].square() / torch.maximum(energy, square).clamp_min(tiny)
        erased = (momentum @ keys.mT) @ keys if wide else momentum @ gram
        erased = erased * (self.rate * ratio)[:, None, None]
        state["momentum"] = retention * momentum - erased + (1 - retention) * grad

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return state["momentum"]
