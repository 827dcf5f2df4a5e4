"""Adam and AdaGrad as optimal memories of the gradient stream (App. B).

Eq 100, Eq 101, Eq 102, Eq 103, Eq 104, Eq 105 are element-wise; Eq 106, Eq 107, Eq 108, Eq 109,
Eq 110, Eq 111 are the same with outer products.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepopt._arguments import check_fields


@dataclass(frozen=True)
class Elementwise:
    r"""The element-wise memory m that best maps every gradient to one statistic P of them all.

    With S the sum of the gradients and H that of their squares, Eq 101 has the minimizer

    .. math::
        m^* = \text{argmin}_m\ \sum_{i \le t} \|m \odot g_i - P\|^2
        + \|\sqrt\lambda \odot m\|^2 = \frac{P \odot S}{H + \lambda} \qquad\text{(Eq 102)}

    A write updates S and H. A read returns m*, which is the step. The ridge is :math:`\lambda =
    \varepsilon P`, because nothing else gives Adam's denominator:

    .. math::
        P = \sqrt H:\quad m^* = \frac{S}{\sqrt H + \varepsilon} \quad\text{(Eq 105)}, \qquad
        P = H:\quad m^* = \frac{S}{1 + \varepsilon} \quad\text{(Eq 104)}

    ====================  ===============================  =====================================
    ``second_retention``  momentum's retention             the read is the step of
    ====================  ===============================  =====================================
    None: sums            0: S is the last gradient        AdaGrad
    None: sums            beta: S = beta S + g             AdaGrad with momentum; P = H: heavy ball
    beta_2: averages      beta_1: bias-corrected averages  Adam; P = H: bias-corrected momentum
    ====================  ===============================  =====================================

    What the paper claims holds with these corrections:

    - It prints sums, :math:`S + \beta_1 g` and :math:`H + \beta_2 g^2`: nothing is forgotten, and
      the betas only scale the step, by :math:`\beta_1/\beta_2` (Eq 104 prints :math:`\beta_2` where
      it should print :math:`1/\beta_2`). It becomes Adam when both sums become bias-corrected
      averages. Each average belongs to a weighted form of Eq 101, but the weights of S and H
      differ, so that no single weighting gives both.
    - AdaGrad steps along the last gradient, not along the sum of all, which
      :math:`\beta_1 = 1` gives.
    - With the section's :math:`g = -\nabla L` the step has to be added, not subtracted.

    Args:
        value: P, "root" for the root of H or "energy" for H itself (default: "root").
        second_retention: retention of H, in [0, 1), for averages; None for sums (default: 0.999).
        eps: epsilon, at least 0 (default: 1e-8).

    State: 2 floats per parameter.

    Raises:
        ValueError: an argument outside its range.
    """

    value: Literal["root", "energy"] = "root"
    second_retention: float | None = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fields(self)
        if self.value not in ("root", "energy"):
            raise ValueError(f"Invalid value: {self.value!r}; choose 'root' or 'energy'")
        second = self.second_retention
        if second is not None and not 0.0 <= second < 1.0:
            raise ValueError(
                f"Invalid second_retention: {second}; it must be in [0, 1), or None for sums"
            )
        _check_eps(self.eps)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"first": torch.zeros_like(like), "second": torch.zeros_like(like)}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        if self.second_retention is None:
            state["first"] = retention * state["first"] + grad
            state["second"] = state["second"] + grad.square()
        else:
            state["first"] = state["first"].lerp(grad, 1 - retention)
            # From an infinite mean the next difference would be NaN.
            square = grad.square().clamp_max(torch.finfo(grad.dtype).max)
            state["second"] = state["second"].lerp(square, 1 - self.second_retention)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        first, second = state["first"], state["second"]
        if self.second_retention is not None:
            step = state["step"].to(grad.device, grad.dtype, non_blocking=True)[:, None, None]
            first = first / (1 - retention**step)
            second = second / (1 - self.second_retention**step)
        if self.value == "energy":
            return first / (1 + self.eps)
        # Where all gradients were zero their sum is zero too, and the quotient must not be NaN.
        return first / (second.sqrt() + self.eps).clamp_min(torch.finfo(grad.dtype).tiny)


@dataclass(frozen=True)
class OuterProduct:
    r"""The same memory with outer products of the flattened gradients: full-matrix AdaGrad.

    .. math::
        H = \sum_i g_i g_i^\top, \quad P = H^{1/2}, \qquad
        m^* = (H + \varepsilon P)^{-1} P\, S = (H^{1/2} + \varepsilon I)^{-1} S
        \qquad\text{(Eq 106, Eq 107, Eq 108, Eq 109, Eq 110, Eq 111)}

    The paper prints :math:`\|m g_i - P\|^2`, whose shapes do not agree; m* minimizes
    :math:`\frac12 m^\top (H + \varepsilon P)\, m - m^\top P S`, which is Eq 101 without its
    constant where H and P are diagonal. The retention is as in :class:`Elementwise` with sums: 0 is
    AdaGrad. ``deepopt.memory.Covariance`` is the form that large matrices can afford.

    Args:
        eps: epsilon, at least 0 (default: 1e-8).

    State: 1 + mn floats per parameter of an m x n matrix, for study at small sizes.

    Cost: an eigendecomposition of an mn x mn matrix per read.

    Raises:
        ValueError: a negative ``eps``.
    """

    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_fields(self)
        _check_eps(self.eps)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        size = like.shape[1] * like.shape[2]
        return {"first": torch.zeros_like(like), "second": like.new_zeros(len(like), size, size)}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        flat = grad.flatten(1)
        state["first"] = retention * state["first"] + grad
        state["second"] = state["second"] + flat[:, :, None] * flat[:, None, :]

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(state["second"])
        # Rounding gives zero eigenvalues either sign. No gradient has a part in their directions.
        info = torch.finfo(grad.dtype)
        noise = values[:, -1:].clamp_min(info.tiny) * values.shape[-1] * info.eps
        roots = values.clamp_min(0).sqrt() + self.eps
        inverse = torch.where(values > noise, 1 / roots.clamp_min(info.tiny), 0.0)
        first = state["first"].flatten(1)[:, :, None]
        recalled = vectors @ (inverse[:, :, None] * (vectors.mT @ first))
        return recalled.view_as(grad)


def _check_eps(eps: float) -> None:
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"Invalid eps: {eps}; it must be a number from 0 on")
