"""Preconditioners: the P of P g, which replaces g in a momentum (Eq 47).

The paper finds P by gradient steps (Eq 38, Eq 39, Eq 40, Eq 41); here it is given.
In the paper P is a rows x rows matrix, which acts from the left; the paper gives no choice of it.
The built-in ones are inverse roots of the running Gram matrix of the gradient's rows, L = E G Gᵀ,
in the manner of the paper's Appendix B. They turn a gradient and keep its Frobenius norm, so that a
learning rate that suits the plain gradient suits the preconditioned one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from deepopt.memory.covariance import Covariance
from deepopt.ops import frobenius, running_root

DAMPING = 1e-6
"""Smallest eigenvalue of L that counts, relative to the largest."""


class Preconditioner(Protocol):
    """A running estimate of P for matrices (B, m, n); its state has the form of a memory's."""

    def init(self, like: Tensor) -> dict[str, Tensor]: ...

    def write(self, state: dict[str, Tensor], grad: Tensor) -> None: ...

    def read(self, state: dict[str, Tensor], matrices: Tensor) -> Tensor:
        """P times ``matrices``."""
        ...


@dataclass(frozen=True)
class NoPreconditioner:
    """P = I. State: none."""

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {}

    def write(self, state: dict[str, Tensor], grad: Tensor) -> None:
        pass

    def read(self, state: dict[str, Tensor], matrices: Tensor) -> Tensor:
        return matrices


@dataclass(frozen=True)
class Diagonal:
    r"""The diagonal of L: rows divided by the root of their running mean square.

    .. math::
        \ell_t = \rho\,\ell_{t-1} + (1-\rho)\,\text{diag}(G_t G_t^\top), \qquad
        P X = \frac{\|X\|_F}{\|D X\|_F} D X, \quad
        D = \text{diag}\big(\ell_t / \max_i \ell_{t,i} + 10^{-6}\big)^{-1/2}

    There is no bias correction: it would be a factor common to all rows, which cancels. The rows of
    a vector are its entries.

    Args:
        retention: rho, in [0, 1) (default: 0.999).

    State: 1/n floats per parameter of an m x n matrix.
    """

    retention: float = 0.999

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"row_root": like.new_zeros(like.shape[:2])}

    def write(self, state: dict[str, Tensor], grad: Tensor) -> None:
        rows = frobenius(grad.reshape(-1, 1, grad.shape[-1])).view(grad.shape[:2])
        state["row_root"] = running_root(state["row_root"], rows, 1 - self.retention)

    def read(self, state: dict[str, Tensor], matrices: Tensor) -> Tensor:
        tiny = torch.finfo(matrices.dtype).tiny
        largest = state["row_root"].amax(-1, keepdim=True).clamp_min(tiny)
        gains = ((state["row_root"] / largest).square() + DAMPING).rsqrt()
        turned = (gains / gains.amax(-1, keepdim=True))[..., None] * matrices
        ratio = frobenius(matrices) / frobenius(turned).clamp_min(tiny)
        return turned * ratio[:, None, None]


@dataclass(frozen=True)
class LeftGram:
    r"""The whole of L, held by the covariance memory of the gradient's rows.

    .. math::
        L_t = \rho L_{t-1} + (1-\rho)\, G_t G_t^\top, \qquad
        P X = \frac{\|X\|_F}{\|L_t^{-1/2} X\|_F} L_t^{-1/2} X

    Eigenvalues are damped by 1e-6 of the largest, and the root is computed anew every ten writes. A
    matrix with more rows than columns gets the :class:`Diagonal` of L, because the whole of L would
    be larger than the matrix.

    Args:
        retention: rho, in [0, 1) (default: 0.999).

    State: 2m/n floats per parameter of an m x n matrix with m <= n and 1 per matrix, else 1/n.
    """

    capturable: ClassVar[bool] = False  # as in Covariance

    retention: float = 0.999

    def _estimator(self, like: Tensor) -> "Diagonal | Covariance":
        """What estimates P for matrices of this shape."""
        if like.shape[-2] > like.shape[-1]:
            return Diagonal(self.retention)
        return Covariance(power=0.5, retention=self.retention, damping=DAMPING)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        state = self._estimator(like).init(like)
        state.pop("momentum", None)
        return state

    def write(self, state: dict[str, Tensor], grad: Tensor) -> None:
        estimator = self._estimator(grad)
        if isinstance(estimator, Diagonal):
            estimator.write(state, grad)
            return
        # Covariance also keeps a momentum. At a retention of 0 it is the last matrix, so P times a
        # matrix is what it reads.
        written = state | {"momentum": grad}
        estimator.write(written, grad, 0.0)
        del written["momentum"]
        state.update(written)

    def read(self, state: dict[str, Tensor], matrices: Tensor) -> Tensor:
        estimator = self._estimator(matrices)
        if isinstance(estimator, Diagonal):
            return estimator.read(state, matrices)
        return estimator.read(state | {"momentum": matrices}, matrices, 0.0)


@dataclass(frozen=True)
class Applied:
    """A function of matrices (B, m, n) that returns P times each. State: none."""

    function: Callable[[Tensor], Tensor]

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {}

    def write(self, state: dict[str, Tensor], grad: Tensor) -> None:
        pass

    def read(self, state: dict[str, Tensor], matrices: Tensor) -> Tensor:
        product = self.function(matrices)
        if product.shape != matrices.shape:
            raise ValueError(
                f"Invalid preconditioner: {self.function} made {tuple(product.shape)} of "
                f"{tuple(matrices.shape)}; it must keep the shape"
            )
        return product


BUILT_IN: dict[str, Callable[[float], Preconditioner]] = {
    "identity": lambda retention: NoPreconditioner(),
    "diagonal": Diagonal,
    "left_gram": LeftGram,
}
"""Preconditioners by name, made from the retention of their statistics."""


def resolve(preconditioner: Any, retention: float, capturable: bool = False) -> Preconditioner:
    """The preconditioner behind a name or a function.

    Args:
        preconditioner: one of ``BUILT_IN``, or a function of matrices (B, m, n).
        retention: the retention of its statistics.
        capturable: refuse one that decides anything on the host (default: False).

    Raises:
        ValueError: an unknown name.
        TypeError: something else that cannot be called.
        RuntimeError: one that decides on the host, although ``capturable`` is set.
    """
    resolved: Preconditioner
    if isinstance(preconditioner, str):
        if preconditioner not in BUILT_IN:
            names = ", ".join(map(repr, BUILT_IN))
            raise ValueError(
                f"Invalid preconditioner: {preconditioner!r}; choose {names} or pass a function"
            )
        resolved = BUILT_IN[preconditioner](retention)
    elif callable(preconditioner):
        resolved = Applied(preconditioner)
    else:
        raise TypeError(
            f"Invalid preconditioner: {preconditioner!r} cannot be called; it must take matrices "
            "(B, m, n) and return P times each"
        )
    if capturable and not getattr(resolved, "capturable", True):
        raise RuntimeError(
            f"preconditioner={preconditioner!r} does not support capturable=True: it decides on "
            "the host when to refresh; choose another one"
        )
    return resolved
