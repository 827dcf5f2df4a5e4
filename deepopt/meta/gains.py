"""Gains after Newton-Schulz: an MLP enlarges some rows and columns, or directions, over others."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from deepopt.optim import DeepMomentum
from deepopt.optim.base import Group
from deepopt.optim.output_map import Betas, Orthogonal, OutputMap, State

FEATURES = 5
LARGEST_LOG = 2.0
"""Authority: the logarithm of a gain lies between this and its negative."""


@dataclass(frozen=True)
class Gains:
    r"""An orthogonal update with gains from an MLP; a read-out of zeros gives the update itself.

    Every row i of a matrix, or every eigenvector u_i of the momentum's M Mᵀ on its short side, has
    an energy in the average of gradients and in the average of their squares,

    .. math::
        a_i = \|u_i^\top M_t\|^2, \qquad
        e_i = u_i^\top E_t\, u_i, \qquad E_t = \beta_1 E_{t-1} + (1-\beta_1)\, G_t G_t^\top.

    For rows u_i is a unit vector, so only the diagonal of E_t is kept. Neither average is corrected
    for its beginning at zero; the MLP sees the time t, too:

    .. math::
        x_i = \Big(\lg \max\big(\tfrac{a_i}{\bar a}, 10^{-6}\big),\
        \min\big(1, \tfrac{a_i}{e_i}\big),\ \frac{\bar a}{\bar e},\
        \frac{(\sum_j a_j)^2}{n \sum_j a_j^2},\ \lg(t)/3\Big), \qquad
        g_i = \exp\Big(2 \tanh \sum_h v_h \max\big(0, \langle w_h, x_i\rangle + b_h\big)\Big)

    with bars for means over the n rows or directions. The update is multiplied by g_i along u_i,
    for rows also along the columns, with the same MLP, and scaled back to the norm it had.

    With directions every step computes eigenvectors, which is too slow for large models.

    Args:
        directions: gains of eigen-directions instead of rows and columns.
        phi: the MLP, a row (w, b, v) for every unit.
        orthogonal: makes the update (default: with its own defaults).

    State beside that of ``orthogonal``, for an m x n matrix with short and long side r and R:
    1/n + 1/m floats per parameter for rows and columns, r/R for directions; φ per matrix.
    """

    directions: bool
    phi: Sequence[Sequence[float]]
    orthogonal: OutputMap = field(default_factory=Orthogonal)

    def init(self, like: Tensor) -> State:
        phi = torch.tensor(self.phi, dtype=like.dtype, device=like.device)
        batch, rows, columns = like.shape
        short = min(rows, columns)
        seen = (
            {"squares": like.new_zeros(batch, short, short)}
            if self.directions
            else {
                "row_squares": like.new_zeros(batch, rows),
                "column_squares": like.new_zeros(batch, columns),
            }
        )
        phis = phi.expand(batch, *phi.shape).clone()
        return {**self.orthogonal.init(like), **seen, "phi": phis}

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        update = self.orthogonal(momentum, state, grad, betas)
        kept, step, phi = betas[0], state["step"], state["phi"]
        if self.directions:
            tall = momentum.shape[-2] > momentum.shape[-1]
            M, G = (momentum.mT, grad.mT) if tall else (momentum, grad)
            state["squares"] = state["squares"].lerp(G @ G.mT, 1 - kept)
            u = eigenvectors(M)
            a = (u.mT @ M).square().sum(-1)
            e = torch.einsum("bji,bjk,bki->bi", u, state["squares"], u)
            turned = u.mT @ (update.mT if tall else update)
            changed = u @ (gains(a, e, step, phi)[..., None] * turned)
            changed = changed.mT if tall else changed
        else:
            changed = update
            for key, dim in (("row_squares", -1), ("column_squares", -2)):
                state[key] = state[key].lerp(grad.square().sum(dim), 1 - kept)
                factors = gains(momentum.square().sum(dim), state[key], step, phi)
                changed = changed * factors.unsqueeze(dim)
        return changed * norm_ratio(update, changed)


def with_gains(gains: Gains) -> type[DeepMomentum]:
    """:class:`deepopt.DeepMomentum` whose updates have these gains."""

    class GainedMomentum(DeepMomentum):
        def _output_map(self, group: Group) -> OutputMap:
            return replace(gains, orthogonal=super()._output_map(group))

    return GainedMomentum


def gains(a: Tensor, e: Tensor, step: Tensor, phi: Tensor) -> Tensor:
    """The factors g_i of energies in the average and of average energies, both (B, n)."""
    tiny = torch.finfo(a.dtype).tiny
    largest = a.amax(-1, keepdim=True).clamp_min(tiny)  # squares of energies could overflow
    a, e = (a / largest).clamp_min(tiny), (e / largest).clamp_min(tiny)
    mean = a.mean(-1, keepdim=True)
    spread = mean.square() / a.square().mean(-1, keepdim=True).clamp_min(tiny)
    shared = (mean / e.mean(-1, keepdim=True), spread, step.to(a).log10()[:, None] / 3)
    features = torch.stack(
        [
            (a / mean).clamp_min(1e-6).log10(),
            (a / e).clamp_max(1.0),
            *(x.expand_as(a) for x in shared),
        ],
        -1,
    )
    w, b, v = phi.split([FEATURES, 1, 1], -1)
    hidden = torch.einsum("bnf,bhf->bnh", features, w) + b.mT
    out = torch.einsum("bnh,bh->bn", hidden.clamp_min(0), v[..., 0])
    return (LARGEST_LOG * out.tanh()).exp()


def eigenvectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of M Mᵀ as columns; any basis where a matrix is zero or not finite."""
    # In float64 and at a norm of 1: where squares underflow, the iteration does not converge.
    wide = matrices.double()
    norm = wide.square().sum((-2, -1), keepdim=True).sqrt()
    unit = (wide / norm).nan_to_num(0.0, 0.0, 0.0)
    return torch.linalg.eigh(unit @ unit.mT)[1].to(matrices.dtype)


def norm_ratio(before: Tensor, after: Tensor) -> Tensor:
    """The factor that gives each matrix of ``after`` the norm of that of ``before``."""
    tiny = torch.finfo(before.dtype).tiny
    sizes = [x.square().sum((-2, -1), keepdim=True).clamp_min(tiny).sqrt() for x in (before, after)]
    return sizes[0] / sizes[1]
