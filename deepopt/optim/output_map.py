"""Output maps: what makes an update of the momentum that a memory reads out (Eq 52)."""

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

ORTHOGONAL_OPTIONS = ("ns_steps", "ns_coefficients", "row_norm", "update_rms", "rms_cap")
"""Arguments of an optimizer that :meth:`Orthogonal.of` takes from its group."""


class OutputMap(Protocol):
    """From a momentum, shape (B, m, n), to the update that the learning rate multiplies.

    As with memories, the leading dimension stacks independent matrices, and hyper-parameters are
    attributes. A map keeps state of its own beside the memory's, under names that differ from it.
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
        steps: of Newton-Schulz, from 1 to 99.
        coefficients: (a, b, c) of every step, or None for the Polar Express ones.
        row_norm: divide rows by their running root mean square.
        update_rms: a fixed root mean square, or None for :func:`deepopt.ops.orthogonal_size`.
        rms_cap: the most that an update which lacks rank is enlarged by, at least 1.

    State: 2 per row with ``row_norm``, 1 per matrix without ``update_rms``.

    Raises:
        ValueError: an argument out of range, by the name that optimizers have for it.
    """

    steps: int = 5
    coefficients: Sequence[float] | None = None
    row_norm: bool = True
    update_rms: float | None = None
    rms_cap: float = 1.5
    _coefficients: Coefficients = field(init=False, repr=False, compare=False)
    _kept: tuple[str, ...] = field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Orthogonal":
        """From the arguments of an optimizer's group."""
        return cls(*(group[name] for name in ORTHOGONAL_OPTIONS))

    def __post_init__(self) -> None:
        if self.update_rms is not None and not self.update_rms > 0.0:
            raise ValueError(f"Invalid update_rms: {self.update_rms}; it must be positive, or None")
        if not self.rms_cap >= 1.0:
            raise ValueError(f"Invalid rms_cap: {self.rms_cap}; it must be at least 1")
        if not isinstance(self.steps, int) or not 1 <= self.steps < 100:
            raise ValueError(
                f"Invalid ns_steps: {self.steps}; it must be a whole number from 1 to 99"
            )
        abc = self.coefficients
        if abc is not None and [isinstance(x, int | float) for x in abc] != [True] * 3:
            raise ValueError(f"Invalid ns_coefficients: {abc}; give three numbers or None")
        every = polar_express(self.steps) if abc is None else [tuple(abc)] * self.steps
        kept = ("grad_norm",) if self.update_rms is None else ()
        object.__setattr__(self, "_coefficients", every)
        object.__setattr__(
            self, "_kept", (*kept, "row_moment", "row_weight") if self.row_norm else kept
        )

    def init(self, like: Tensor) -> State:
        sizes = {"grad_norm": like.shape[:1]}
        return {key: like.new_zeros(sizes.get(key, like.shape[:2])) for key in self._kept}

    def orthogonalize(self, momentum: Tensor) -> Tensor:
        """Newton-Schulz alone."""
        return newton_schulz(momentum, self._coefficients, products_dtype(momentum))

    def __call__(
        self,
        momentum: Tensor,
        state: State,
        grad: Tensor,
        betas: Betas,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The update; ``beside`` is another one, orthogonal, and its weight, shape (B,).

        Their weighted sum then takes the place of the momentum's own, at the norm of that.
        """
        kept = self._kept
        other, weight = beside or (None, None)
        # Under another default dtype than the matrices', counts are of that one.
        step = state["step"].float() if momentum.dtype == torch.float32 else state["step"]
        scale = ScaleArguments(
            momentum,
            grad,
            step,
            *betas,
            self.rms_cap,
            self.update_rms,
            grad_norm=state["grad_norm"] if self.update_rms is None else None,
            row_moment=state["row_moment"] if self.row_norm else None,
            row_weight=state["row_weight"] if self.row_norm else None,
            weight=weight,
        )
        update, *new = orthogonal_update(self._coefficients, products_dtype(momentum), other, scale)
        state.update(zip(kept, new, strict=True))
        return update


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
    """bfloat16 where it is faster: Newton-Schulz corrects its own rounding."""
    worthwhile = matrices.dtype == torch.float32 and min(matrices.shape[-2:]) >= SHORTEST
    narrow = worthwhile and multiplies_bfloat16_faster(matrices.device)
    return torch.bfloat16 if narrow else matrices.dtype
