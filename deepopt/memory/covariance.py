"""A linear memory read through the memory of the gradient's covariance (Eq 106, Eq 111)."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deepopt._arguments import check_fields
from deepopt.memory.linear import Linear
from deepopt.ops import frobenius, gram_average, inverse_power, matmul

LINEAR = Linear()


@dataclass(frozen=True)
class Covariance:
    r"""Momentum, read through powers of the gradient's Gram matrices.

    Appendix B of the paper shows that full-matrix AdaGrad is the optimal memory that maps gradients
    to the root of their covariance, and that it reads H^{-1/2} M. Here the power is free, and the
    covariances of the gradient's rows and columns replace that of the flattened gradient:

    .. math::
        M_t &= \beta M_{t-1} + (1-\beta) G_t \\
        L_t &= \rho L_{t-1} + (1-\rho)\, G_t G_t^\top, \qquad
        R_t  = \rho R_{t-1} + (1-\rho)\, G_t^\top G_t \\
        \text{read} &= L_t^{-p}\, \hat M_t \quad (m \le n,\ \texttt{sides="short"}),
        \qquad L_t^{-p}\, \hat M_t\, R_t^{-p} \quad (\texttt{sides="both"})

    Here :math:`\hat M_t` is the look-ahead of :class:`Linear`, and the result is scaled to its
    norm. The powers are computed at the first write and every ``refresh`` writes after it, from
    eigenvalues damped relative to the largest.

    Args:
        power: p > 0; None means 1/2 on one side, or 1/4 on each of two, so that the powers add up
            to the paper's 1/2 (default: None).
        sides: "short" uses the Gram matrix of the short side alone, "both" uses two
            (default: "short").
        retention: rho, the retention of the Gram matrices, in [0, 1) (default: 0.95).
        refresh: writes from one computation of the powers to the next, at least 1 (default: 10).
        damping: smallest eigenvalue that counts, relative to the largest (default: 1e-6).
        gain: how many times as large as AdamW's the updates of ``DeepMomentum`` are, where their
            size is measured (default: 1.5).

    State: with r and R the short and the long side, 1 + 2r/R floats per parameter for the short
    side (3 for square matrices, 1.5 for 4:1), 1 + 2r/R + 2R/r for both; 1 per matrix.

    Cost: per write a symmetric product of r²R FLOPs, ``deepopt.ops.gram_average``; per read a
    product of 2r²R in the dtype of the state. In bfloat16 the rounding of the momentum's large
    directions would be as large as its small ones, which the power enlarges. A refresh calls
    ``deepopt.ops.inverse_power``: on one CPU core 0.05 s for a matrix of r = 512, 0.12 s at 768 and
    3 s at 2048.

    Raises:
        ValueError: an argument outside its range.
    """

    capturable: ClassVar[bool] = False  # the host decides which matrices to refresh

    power: float | None = None
    sides: Literal["short", "both"] = "short"
    retention: float = 0.95
    refresh: int = 10
    damping: float = 1e-6
    gain: float = 1.5

    def __post_init__(self) -> None:
        check_fields(self)
        if self.power is None:
            object.__setattr__(self, "power", 0.25 if self.sides == "both" else 0.5)
        if not 0.0 < self.power < math.inf:  # type: ignore[operator]
            raise ValueError(f"Invalid power: {self.power}; it must be positive and finite")
        if self.sides not in ("short", "both"):
            raise ValueError(f"Invalid sides: {self.sides!r}; choose 'short' or 'both'")
        if not 0.0 <= self.retention < 1.0:
            raise ValueError(f"Invalid retention: {self.retention}; it must be in [0, 1)")
        if not isinstance(self.refresh, int) or self.refresh < 1:
            raise ValueError(
                f"Invalid refresh: {self.refresh}; it must be a whole number of writes, at least 1"
            )
        if not 0.0 < self.damping < 1.0:
            raise ValueError(f"Invalid damping: {self.damping}; it must be in (0, 1)")
        if not 0.0 < self.gain < math.inf:
            raise ValueError(f"Invalid gain: {self.gain}; it must be positive and finite")

    def _sides(self, grad: Tensor) -> tuple[Literal["left", "right"], ...]:
        rows, columns = grad.shape[-2:]
        if self.sides == "both":
            return "left", "right"
        return ("left",) if rows <= columns else ("right",)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        state = LINEAR.init(like)
        state["scale"] = like.new_zeros(like.shape[0])
        for side in self._sides(like):
            size = like.shape[-2] if side == "left" else like.shape[-1]
            state[f"gram_{side}"] = like.new_zeros(like.shape[0], size, size)
            state[f"root_{side}"] = like.new_zeros(like.shape[0], size, size)
        return state

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        LINEAR.write(state, grad, retention)
        # The square of an entry can overflow where the entry does not. So Gram matrices are kept
        # relative to the running largest entry, which fades as they do.
        tiny = torch.finfo(grad.dtype).tiny
        largest = torch.maximum(grad.amax((-2, -1)), -grad.amin((-2, -1)))  # abs() would copy
        scale = torch.maximum(state["scale"] * self.retention**0.5, largest)
        retained = self.retention * (state["scale"] / scale.clamp_min(tiny)).square()
        state["scale"] = scale
        assert self.power is not None
        steps = state["step"].tolist()
        due = [row for row, step in enumerate(steps) if (step - 1) % self.refresh == 0]
        for side in self._sides(grad):
            gram = state[f"gram_{side}"]
            gram = gram_average(gram, grad, scale, retained, 1 - self.retention, side == "left")
            state[f"gram_{side}"] = gram
            if due:
                # Matrix by matrix: indexing with a list would make the host wait for the device.
                fresh = torch.stack([gram[row] for row in due])
                roots = list(state[f"root_{side}"])
                for row, root in zip(
                    due, inverse_power(fresh, self.power, self.damping), strict=True
                ):
                    roots[row] = root
                state[f"root_{side}"] = torch.stack(roots)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        momentum = LINEAR.read(state, grad, retention)
        before = frobenius(momentum)
        # The root enlarges, so a huge momentum is scaled down first. Its norm is restored below
        # anyway.
        unit = torch.where(before > 2.0**64, 2.0**-32, 1.0).to(grad.dtype)[:, None, None]
        for side in self._sides(grad):
            root = unit * state[f"root_{side}"]
            left = side == "left"
            momentum = matmul(root, momentum) if left else matmul(momentum, root)
        after = frobenius(momentum).clamp_min(torch.finfo(grad.dtype).tiny)
        return momentum * (before / after)[:, None, None]
