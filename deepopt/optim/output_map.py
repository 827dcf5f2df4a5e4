"""Output maps: from the momentum that a memory reads out to the update (Eq 52)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from deepopt._compat import multiplies_bfloat16_faster
from deepopt.ops import (
    ScaleArguments,
    adam_size,
    newton_schulz,
    normalized,
    orthogonal_update,
    polar_express,
)
from deepopt.ops.newton_schulz import Coefficients
from deepopt.ops.products import SHORTEST

State: TypeAlias = dict[str, Tensor]
Betas: TypeAlias = tuple[float, float]


class OutputMap(Protocol):
    """From a momentum, shape (B, m, n), to the update that the learning rate multiplies.

    As with memories, the leading dimension stacks independent matrices, and hyper-parameters are
    attributes. A map may keep state; its names must differ from the memory's.
    """

    def init(self, like: Tensor) -> State:
        """State for momenta ``like``: tensors with leading size B."""
        ...

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        """The update.

        Args:
            momentum: what the memory read.
            state: the memory's and this map's, and ``step``; new values are assigned.
            grad: the gradient.
            betas: the group's: retention of the momentum, and of second moments.
        """
        ...


class Identity:
    """The update is the momentum itself. State: none."""

    def init(self, like: Tensor) -> State:
        return {}

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        return momentum


@dataclass(frozen=True)
class Orthogonal:
    """The momentum made orthogonal, with its rows normalized, about as large as AdamW's update.

    :class:`deepopt.DeepMomentum` gives the equations.

    Args:
        steps: steps of Newton-Schulz, from 1 to 99.
        coefficients: (a, b, c) of every step, or None for the Polar Express ones.
        row_norm: divide rows by their running root mean square.
        update_rms: a fixed root mean square, or None for ``gain`` times
            :func:`deepopt.ops.orthogonal_size`.
        rms_cap: largest factor by which an update that lacks rank is enlarged, at least 1.
        momentum_share: share of the momentum itself in the update, in [0, 1).
        gain: factor of the size, where that is not fixed.

    State: 2 per row with ``row_norm``, 1 per matrix without ``update_rms``.

    Raises:
        ValueError: an argument out of range. The message uses its name in an optimizer's group,
            such as ``ns_steps``.
    """

    steps: int = 5
    coefficients: Sequence[float] | None = None
    row_norm: bool = True
    update_rms: float | None = None
    rms_cap: float = 1.5
    momentum_share: float = 0.0
    gain: float = 1.0
    _coefficients: Coefficients = field(init=False, repr=False, compare=False)
    _state_keys: tuple[str, ...] = field(init=False, repr=False, compare=False)

    @classmethod
    def of(
        cls, group: dict[str, Any], momentum_share: float = 0.0, gain: float = 1.0
    ) -> "Orthogonal":
        """From the arguments of an optimizer's group."""
        return cls(
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            row_norm=group["row_norm"],
            update_rms=group["update_rms"],
            rms_cap=group["rms_cap"],
            momentum_share=momentum_share,
            gain=gain,
        )

    def __post_init__(self) -> None:
        if self.update_rms is not None and not 0.0 < self.update_rms < math.inf:
            raise ValueError(
                f"Invalid update_rms: {self.update_rms}; it must be positive and finite, or None"
            )
        if not self.rms_cap >= 1.0:
            raise ValueError(f"Invalid rms_cap: {self.rms_cap}; it must be at least 1")
        if not 0.0 <= self.momentum_share < 1.0:
            raise ValueError(f"Invalid momentum_share: {self.momentum_share}; it must be in [0, 1)")
        if not isinstance(self.steps, int) or not 1 <= self.steps < 100:
            raise ValueError(
                f"Invalid ns_steps: {self.steps}; it must be a whole number from 1 to 99"
            )
        abc = self.coefficients
        if abc is not None and [isinstance(x, int | float) for x in abc] != [True] * 3:
            raise ValueError(f"Invalid ns_coefficients: {abc}; give three numbers or None")
        coefficients = polar_express(self.steps) if abc is None else [tuple(abc)] * self.steps
        keys: tuple[str, ...] = ("grad_norm",) if self.update_rms is None else ()
        if self.row_norm:
            keys = (*keys, "row_moment", "row_weight")
        object.__setattr__(self, "_coefficients", coefficients)  # the dataclass is frozen
        object.__setattr__(self, "_state_keys", keys)

    def init(self, like: Tensor) -> State:
        sizes = {"grad_norm": like.shape[:1]}
        return {key: like.new_zeros(sizes.get(key, like.shape[:2])) for key in self._state_keys}

    def orthogonalize(self, momentum: Tensor) -> Tensor:
        """Newton-Schulz alone."""
        return newton_schulz(momentum, self._coefficients, products_dtype(momentum))

    def __call__(
        self,
        momentum: Tensor,
        state: State,
        grad: Tensor,
        betas: Betas,
        second: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The update.

        ``second`` is another update and its weight, shape (B,), and replaces the share of the
        momentum. The update is that of the weighted sum, at the norm of the first.
        """
        if self.momentum_share and second is None:
            second = self._itself(momentum)
        second_update, weight = second or (None, None)
        # Step counts have torch's default dtype, which need not be that of the matrices.
        step = state["step"].float() if momentum.dtype == torch.float32 else state["step"]
        scale = ScaleArguments(
            momentum,
            grad,
            step,
            *betas,
            self.rms_cap,
            self.gain if self.update_rms is None else self.update_rms,
            grad_norm=state["grad_norm"] if self.update_rms is None else None,
            row_moment=state["row_moment"] if self.row_norm else None,
            row_weight=state["row_weight"] if self.row_norm else None,
            weight=weight,
        )
        update, *new = orthogonal_update(
            self._coefficients, products_dtype(momentum), second_update, scale
        )
        state.update(zip(self._state_keys, new, strict=True))
        return update

    def _itself(self, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """The momentum at the norm of an orthogonal matrix of full rank, and its weight beside it.

        A momentum that lacks rank weighs more than its share.
        """
        weight = self.momentum_share / (1 - self.momentum_share)
        rms = max(momentum.shape[-2:]) ** -0.5
        return normalized(momentum) * rms, momentum.new_ones(momentum.shape[:1]) * weight


@dataclass(frozen=True)
class Rms:
    """The momentum over its root mean square, as large as AdamW's update would be.

    State: 1 per matrix.
    """

    def init(self, like: Tensor) -> State:
        return {"grad_norm": like.new_zeros(len(like))}

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        size, state["grad_norm"] = adam_size(
            momentum, grad, state["grad_norm"], state["step"], betas
        )
        return normalized(momentum) * size[:, None, None]


def products_dtype(matrices: Tensor) -> torch.dtype:
    """bfloat16 where it is faster, since Newton-Schulz corrects rounding as it goes."""
    worthwhile = matrices.dtype == torch.float32 and min(matrices.shape[-2:]) >= SHORTEST
    narrow = worthwhile and multiplies_bfloat16_faster(matrices.device)
    return torch.bfloat16 if narrow else matrices.dtype
