"""Averages of the gradient over several horizons, and an MLP that computes their weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepopt._arguments import check_fields
from deepopt.ops import horizons_write

HAND_MADE = ((-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.2, 1.0),)
"""A φ in closed form: take the short average once the long one predicts half as well."""
PHI0: list[list[float]] = json.loads(Path(__file__).with_name("phi0.json").read_text())["phi"]
"""What ``python -m deepopt.meta`` found for one further time scale, 0.7; the file says how."""


@dataclass(frozen=True)
class Horizons:
    r"""Several linear memories, mixed by an MLP. It is no better than the best one of them.

    This is the memory called "mlp". It is as good as ``"linear"`` on data that stay the same. On
    most streams it is better than ``"linear"`` with the same ``betas``; on all of them ``"linear"``
    with a shorter average is better still (``docs/results/mlp-memory.md``). The MLP sees how well
    each memory predicts the gradient.

    The averages have the retentions :math:`\beta_1` (that of the write) and :math:`\beta_k`
    for every further time scale, K in all. Before a gradient is written, each is compared with it:

    .. math::
        c^k_t &= 0.7\, c^k_{t-1} + 0.3\, \cos(G_t, M^k_{t-1}), \qquad
        s^2_t = \beta_1 s^2_{t-1} + (1-\beta_1) \|G_t\|_F^2 \\
        x_t &= \Big(\frac{\max(c^k_t, 0) + 0.01}{\max_j \max(c^j_t, 0) + 0.01},\
        \max_j c^j_t,\ \frac{\|M^k_{t-1}\|_F}{s_t},\ \lg(t)/3\Big) \\
        f^k_t &= \sum_h \varphi^k_h \max\big(0, \langle \varphi_h, x_t\rangle + b_h\big), \qquad
        w^k_t = \frac{\text{clip}(f^k_t, 0, 1)}{\max(1, \sum_j \text{clip}(f^j_t, 0, 1))} \\
        M^k_t &= \beta_k M^k_{t-1} + (1-\beta_k)\, G_t, \qquad
        \text{read} = N^1_t + \sum_{k>1} w^k_t (N^k_t - N^1_t)

    where :math:`N^k = (\beta_k M^k + (1-\beta_k) G) (1-\beta_1^t)/(1-\beta_k^t)`, the look-ahead of
    :class:`Linear` with the bias of the first average. Whatever the MLP says, the read lies between
    the averages; a read-out of zeros gives :class:`Linear` exactly.

    The state of every matrix holds φ, so that a resumed run goes on with the one it began with. The
    package's φ was found by ``python -m deepopt.meta``, with a retention of 0.9 beside 0.7.

    Args:
        time_scales: retentions of the averages besides the momentum's own, each in [0, 1)
            (default: (0.7,)).
        phi: the MLP, one row for every unit: the 2K + 2 weights of the features in the order above,
            the bias, and the K - 1 weights of the outputs; an empty sequence gives the linear
            memory, ``HAND_MADE`` a closed form for one further time scale, and None the package's
            MLP for a time scale of 0.7 (default: None).

    State: K floats per parameter, 2 by default, and per matrix 2K and the MLP's, 20 by default.

    Cost: about 9 K + 8 FLOPs per parameter.

    Raises:
        ValueError: an argument outside its range, or a ``phi`` that does not fit the time scales.
    """

    time_scales: Sequence[float] = (0.7,)
    phi: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.time_scales or not all(0.0 <= kept < 1.0 for kept in self.time_scales):
            raise ValueError(
                f"Invalid time_scales: {self.time_scales}; give retentions in [0, 1), at least one"
            )
        check_phi(self._units, width(1 + len(self.time_scales)), self.time_scales)

    @property
    def _units(self) -> Sequence[Sequence[float]]:
        return PHI0 if self.phi is None else self.phi

    def init(self, like: Tensor) -> dict[str, Tensor]:
        keys = average_keys(self.time_scales)
        scales = len(keys)
        phi = like.new_empty(len(self._units), width(scales))
        if self._units and not like.is_meta:
            phi.copy_(torch.tensor(self._units, dtype=torch.float64, device="cpu"))
        return {
            **{key: torch.zeros_like(like) for key in keys},
            "phi": phi.expand(len(like), *phi.shape).clone(),
            "foresight": like.new_zeros(len(like), scales),
            "grad_size": like.new_zeros(len(like)),
            "weights": like.new_zeros(len(like), scales - 1),
        }

    def write_and_read(
        self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor
    ) -> Tensor:
        keys = average_keys(self.time_scales)
        *averages, state["foresight"], state["grad_size"], state["weights"], read = horizons_write(
            [state[key] for key in keys],
            grad,
            state["foresight"],
            state["grad_size"],
            state["phi"],
            state["step"].to(grad, non_blocking=True),
            [retention, *self.time_scales],
        )
        state.update(zip(keys, averages, strict=True))
        return read

    def report(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight of every further average."""
        weights = state["weights"].unbind(-1)
        return {
            f"weight of {kept:g}": weight
            for kept, weight in zip(self.time_scales, weights, strict=True)
        }


def average_keys(time_scales: Sequence[float]) -> list[str]:
    """The names that the averages have in a state, the momentum first."""
    return ["momentum", *(f"average_{index}" for index, _ in enumerate(time_scales))]


def check_phi(phi: Sequence[Sequence[float]], needed: int, time_scales: Sequence[float]) -> None:
    """Raise ValueError if a unit has not as many numbers as the time scales need."""
    if any(len(unit) != needed for unit in phi):
        raise ValueError(
            f"Invalid phi: units of {[len(unit) for unit in phi]} numbers; "
            f"{len(time_scales)} further time scales need {needed} for each"
        )


def width(scales: int) -> int:
    """Numbers of a unit: its weights of 2K + 2 features, its bias, its weights of K - 1 outputs."""
    return 3 * scales + 2
