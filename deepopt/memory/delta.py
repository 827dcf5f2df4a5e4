"""The delta-rule memory: forget what the present gradient's keys recall (Eq 48, Eq 49)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deepopt._arguments import check_fields
from deepopt.ops import delta_write


@dataclass(frozen=True)
class Delta:
    r"""Momentum with a delta rule on the input side, stable for every gradient.

    Eq 49 with the rate on the erase term that its derivation asks for, and with normalized keys:

    .. math::
        K_t &= G_t / \max(s_t,\ \bar\sigma(G_t)), \qquad
        s_t^2 = 0.9\, s_{t-1}^2 + 0.1\, \bar\sigma^2(G_t) \\
        M_t &= \beta M_{t-1} - \eta\, M_{t-1} K_t^\top K_t + (1-\beta)\, G_t

    The write is one step of inner learning on
    :math:`\frac{1-\beta}{2}\|M-G\|^2+\frac{\eta}{2}\|MK^\top\|^2`. On a stationary stream the mean
    of M is

    .. math:: (1-\beta)\,\bar G\,\big[(1-\beta) I + \eta\, \mathbb{E}\, K^\top K\big]^{-1},

    that is, a short horizon in the directions that gradients keep coming from, and a long one
    elsewhere.

    :math:`\bar\sigma(G) = \|G\,G^\top G\,G^\top\|_F^{1/4}` bounds the largest singular value from
    above by at most a factor :math:`r^{1/8}` (1.8 for rank 100), so that
    :math:`\|K_t\|_2 \le 1` always. A power iteration would give too low an estimate just after the
    gradient has turned, and none for a zero gradient. Where m >= n the erase term reuses the Gram
    matrix of the bound; where m < n it takes one more product. A gradient beyond
    :math:`\bar\sigma` = 2e37 counts as one of 2e37, because M could not be held in float32 beyond
    it.

    Read: Nesterov's look-ahead, what the memory would hold after the same gradient had come again,

    .. math:: g\,\big(\beta (M_t - E_t) + (1-\beta)\, G_t\big), \qquad
        E_t = \eta\, M_{t-1} K_t^\top K_t, \quad g = 1 + \varepsilon_{t-1}/(1-\beta),

    or, without look-ahead, :math:`g M_t`. The second write is assumed to erase :math:`\beta` times
    what the first one erased. This saves a product, and erases nothing of the new gradient.
    :math:`\varepsilon` is the running share of the momentum that a write erases. A write keeps
    :math:`\beta - \varepsilon` of M, so that M is smaller than an average of gradients; g restores
    that size.

    Args:
        rate: eta of the erase term, in [0, 1] (default: 0.3).
        nesterov: read with the look-ahead (default: True).

    State: 1 float per parameter and 2 per matrix.

    Raises:
        ValueError: a rate outside [0, 1].
    """

    rate: float = 0.3
    nesterov: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"Invalid rate: {self.rate}; it must be in [0, 1]")

    def init(self, like: Tensor) -> dict[str, Tensor]:
        scalars = {key: like.new_zeros(like.shape[0]) for key in ("norm", "erasure")}
        return {"momentum": torch.zeros_like(like), **scalars}

    def write_and_read(
        self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor
    ) -> Tensor:
        before = state["erasure"]
        state["momentum"], state["norm"], state["erasure"], ahead = delta_write(
            state["momentum"], grad, state["norm"], before, self.rate, retention
        )
        if self.nesterov:
            return ahead
        return (1 + before / (1 - retention))[:, None, None] * state["momentum"]

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The running share of the momentum that a write erases."""
        return {"erased": state["erasure"]}
