"""PreconditionedMomentum: the heavy ball of a preconditioned gradient."""

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt.memory.preconditioned import Preconditioned
from deepopt.memory.preconditioner import resolve
from deepopt.optim.base import Group, MemoryOptimizer, arguments_of


class PreconditionedMomentum(MemoryOptimizer):
    r"""Momentum with a preconditioner, the paper's Eq 46, Eq 47; without one, SGD with momentum.

    For every parameter W with gradient G, and a matrix P of rows x rows:

    .. math::
        B_t &= \alpha B_{t-1} + P_t G_t \\
        W_t &= (1 - \gamma\lambda) W_{t-1} - \gamma B_t

    The paper prints :math:`m \leftarrow \alpha m - \eta P G,\ W \leftarrow W + m`: the same for a
    constant learning rate, with :math:`m = -\gamma B`. Here a new rate applies to the whole
    momentum at once, as it does in ``torch.optim.SGD(momentum=alpha)``, which this is for P = I and
    :math:`\lambda = 0`.

    Every parameter is stepped by this rule. A matrix has its first dimension for rows and all
    others for columns (a convolution: out x in·k·k); a vector is a matrix of one column, a scalar
    one of one entry.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()``, or parameter groups, which
            can have their own value of any argument below. With ``deepopt.param_groups(model)``
            only hidden matrices are stepped by this rule and the rest by AdamW.
        lr: learning rate, gamma; a float or a 1-element tensor. In the units of SGD with momentum:
            for transformers usually from 0.01 to 1, at norm-1 gradient clipping. The built-in
            preconditioners keep the size of the gradient, so that it need not change with them
            (default: 1e-2).
        betas: retention of the momentum, alpha, and of the preconditioner's running means, rho
            (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator, on the element-wise path alone (default: 1e-8).
        weight_decay: decoupled weight decay, lambda; torch's SGD adds its to the gradient instead
            (default: 0).
        preconditioner: P. With :math:`L_t = \rho L_{t-1} + (1-\rho)\,G_tG_t^\top`

            - "identity": :math:`P G = G`;
            - "left_gram": :math:`P G = c\,L_t^{-1/2} G` with :math:`c` such that the Frobenius norm
              of G is kept, eigenvalues damped by 1e-6 of the largest, and the root computed every
              ten steps, which excludes ``capturable``; for a matrix of more rows than columns as
              "diagonal";
            - "diagonal": the same with the diagonal of L alone, the running mean squares of the
              rows (which are the entries of a vector). Because of :math:`c` neither needs a bias
              correction;
            - or a function that returns P G for gradients (B, m, n), B matrices of one shape: row b
              of the result must depend on row b alone. It has no state that checkpoints keep.

            (default: "identity").
        path: "matrix" for this rule; "stack" for it on the last two dimensions of a stack of
            matrices (heads, experts); "elementwise" for AdamW; "auto" for this rule or
            AdamW by shape and name (default: "matrix").
        [flags]

    State: 1 float per parameter, and for an m x n matrix 1/n more ("diagonal") or 2m/n more
    ("left_gram", m <= n).

    Cost per m x n matrix: a few FLOPs per parameter; "left_gram" 3 m²n more, and an
    eigendecomposition in float64 (about 10 m³) every ten steps.

    Raises:
        ValueError: an argument out of range, named with its value.
        TypeError: a ``preconditioner`` that is neither a name nor a function.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, section 4.4, which leaves P open
    ("e.g. random features", Hessian information); the inverse roots are those of its Appendix B.
    """

    _min_dims: ClassVar[dict[str, int]] = {"matrix": 0, "stack": 3}
    _objects = ("preconditioner",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preconditioner: str | Callable[[Tensor], Tensor] = "identity",
        path: str = "matrix",
        rounding: str = "nearest",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments_of(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        self._memory(group)

    def _memory(self, group: Group) -> Preconditioned:
        return Preconditioned(
            resolve(group["preconditioner"], group["betas"][1], group["capturable"])
        )
