"""From a momentum to an update: Newton-Schulz, and the size of the result (Eq 42, Eq 52).

``orthogonal_update`` is both in one operator, ``scale_update`` is the second half alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepopt.ops.newton_schulz import Coefficients, newton_schulz
from deepopt.ops.norms import frobenius, running_root
from deepopt.ops.operator import operator, schema_of

LEAST_SIZE, MOST_ENLARGED = 0.4, 3.0
"""An update whose root mean square would be below 0.4 is enlarged to it, but at most threefold."""


class ScaleArguments(NamedTuple):
    """What :func:`scale_update` and :func:`deepopt.ops.orthogonal_update` need beside the updates.

    The struct of the same name in csrc/common lists the same fields in the same order.

    Args:
        momentum: the average of gradients whose size counts, in their units, shape (B, m, n).
        grad: the gradient, shape (B, m, n).
        step: gradients in the averages so far, shape (B,), on the matrices' device or the host.
        beta1, beta2: retentions of the averages of gradients and of squares.
        rms_cap: the largest factor by which an update of low rank is enlarged, at least 1.
        rms: root mean square of an orthogonal update, in units of :func:`orthogonal_size` where
            ``grad_norm`` is given.
        grad_norm: running root of the mean squared norm of the gradient, shape (B,). Without it
            ``scale_update`` reads neither momentum nor gradient nor step.
        row_moment, row_weight: what :func:`row_gains` keeps, shape (B, m); None leaves the rows as
            they are.
        weight: factor of a second update, shape (B,); None if there is only one.
    """

    momentum: Tensor
    grad: Tensor
    step: Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    rms_cap: float
    rms: float = 1.0
    grad_norm: Tensor | None = None
    row_moment: Tensor | None = None
    row_weight: Tensor | None = None
    weight: Tensor | None = None


def _supports(updates: Sequence[Tensor], scale: ScaleArguments) -> bool:
    numbers = not isinstance(scale.beta1, Tensor) and not isinstance(scale.beta2, Tensor)
    tensors = [x for x in (*updates, *scale) if isinstance(x, Tensor)]
    return numbers and all(x.dtype == torch.float32 for x in tensors)


@operator(
    f"(Tensor[] updates, {schema_of(ScaleArguments)}) -> Tensor[]", _supports, packed=ScaleArguments
)
def scale_update(updates: Sequence[Tensor], scale: ScaleArguments) -> list[Tensor]:
    """Normalize the rows of an orthogonalized update and give it its :func:`orthogonal_size`.

    All of it is linear: the update is read once for the squares of its rows, and once to be
    multiplied by a factor for each of them.

    Args:
        updates: one or two, shape (B, m, n). Of two, the weighted sum is used, scaled to the norm
            of the first.
        scale: everything else.

    Returns:
        The update, contiguous, and the new ``grad_norm``, ``row_moment`` and ``row_weight``, of
        those that are given.

    Cost: updates are read twice, gradient and momentum once, the result is written once.

    Raises:
        ValueError: (RuntimeError in kernels) arguments that belong together are not given together.
    """
    weight, grad_norm = scale.weight, scale.grad_norm
    row_moment, row_weight = scale.row_moment, scale.row_weight
    if len(updates) != (1 if weight is None else 2):
        raise ValueError(
            f"Invalid updates: {len(updates)} with weight={weight}; give one, or two and the "
            "weight of the second"
        )
    if (row_moment is None) != (row_weight is None):
        raise ValueError("Invalid row_weight; give row_moment and row_weight, or neither")
    rows, columns = updates[0].shape[-2:]
    tiny = torch.finfo(updates[0].dtype).tiny
    state = []
    weights = updates[0].new_ones(1, len(updates[0]))  # (updates, B), and later (updates, B, m)
    square = updates[0].square().sum(-1)
    norm = square.sum(-1).clamp_min(tiny).sqrt()
    if weight is not None:
        weights, share = torch.stack([weights[0], weight]), weight[:, None]
        mixed, other = (updates[0] * updates[1]).sum(-1), updates[1].square().sum(-1)
        square = square + 2 * share * mixed + share.square() * other
        square = square.clamp_min(0.0)  # rounding of the products can make their sum negative
        shrink = norm / square.sum(-1).clamp_min(tiny).sqrt()
        square, weights = square * shrink.square()[:, None], weights * shrink
    factor = scale.rms * max(rows, columns) ** 0.5
    factor = factor * rms_gain(norm, min(rows, columns), scale.rms_cap)
    if grad_norm is not None:
        betas = scale.beta1, scale.beta2
        size, grad_norm = adam_size(scale.momentum, scale.grad, grad_norm, scale.step, betas)
        factor = factor * orthogonal_size(size)
        state.append(grad_norm)
    weights = weights * factor
    if row_moment is not None and row_weight is not None:
        gains, *row_state = row_gains(square / columns, row_moment, row_weight, scale.beta2)
        weights = weights[:, :, None] * gains
        state.extend(row_state)
    weights = weights[..., None] if row_moment is not None else weights[..., None, None]
    result = weights[0] * updates[0]
    if weight is not None:
        result = result + weights[1] * updates[1]
    return [result.contiguous(), *state]


def orthogonal_size(ratio: Tensor) -> Tensor:
    """The root mean square of an orthogonal update, from that of AdamW's.

    Where a high rate makes gradients swing, AdamW's average all but cancels, and an orthogonal
    update that shrinks as much learns more slowly. So a small one is enlarged to the least size,
    but at most threefold: it still fades where gradients stop.
    """
    return torch.maximum(ratio, (MOST_ENLARGED * ratio).clamp_max(LEAST_SIZE))


def adam_size(
    momentum: Tensor,
    grad: Tensor,
    grad_norm: Tensor,
    step: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
) -> tuple[Tensor, Tensor]:
    """The root mean square of AdamW's update for every matrix, and the new ``grad_norm``."""
    grad_norm = running_root(grad_norm, frobenius(grad), 1 - betas[1])
    return adam_ratio(momentum, grad_norm, step, betas), grad_norm


def adam_ratio(
    momentum: Tensor,
    grad_norm: Tensor,
    step: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
) -> Tensor:
    """The root mean square that AdamW's update would have, of each matrix as a whole.

    AdamW divides the averaged gradient by the root of the averaged squared gradient: about 1 where
    gradients agree, sqrt((1 - beta1) / (1 + beta1)) where they are noise, and towards 0 once they
    stop. An orthogonalized update has lost that size; this restores it.

    Args:
        momentum: averages of the gradient, in its units, shape (B, m, n).
        grad_norm: running roots of the mean squared Frobenius norm of the gradient, shape (B,).
        step: gradients in the averages so far, shape (B,), for their bias corrections.
        betas: retentions of the two averages.

    Returns:
        Shape (B,), between 0 and 1.
    """
    # Computed where the step counts lie, and copied without making the host wait.
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    first = first.to(grad_norm.device, grad_norm.dtype, non_blocking=True)
    second = second.to(grad_norm.device, grad_norm.dtype, non_blocking=True)
    tiny = torch.finfo(grad_norm.dtype).tiny
    # The bias corrections come last: a corrected norm may exceed the largest float.
    ratio = frobenius(momentum) / grad_norm.clamp_min(tiny) * (second.sqrt() / first)
    return ratio.clamp_max(1.0)


def row_gains(
    square: Tensor, moment: Tensor, weight: Tensor, retention: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors that divide each row by the root of its running mean square and keep matrices' norms.

    A row is an output neuron: rows that the orthogonalization leaves long or short step after
    step come to move equally far (NorMuon, arXiv 2510.05491). Zero rows do not count, and each
    row has its own bias correction. So a neuron that wakes after many steps without a gradient
    moves as far as the others, and not several times as far.

    Args:
        square: mean squares of the rows, shape (B, m).
        moment: running sums of these, shape (B, m).
        weight: running sums of their weights, shape (B, m); moment / weight is the running mean.
        retention: share of the old moment that is kept, in [0, 1).

    Returns:
        The factors, the new moment and the new weight, all of shape (B, m).
    """
    seen = square > 0
    moment = torch.where(seen, moment.lerp(square, 1 - retention), moment)
    weight = torch.where(seen, weight.lerp(torch.ones_like(weight), 1 - retention), weight)
    tiny = torch.finfo(square.dtype).tiny
    mean = (moment / weight.clamp_min(tiny)).clamp_min(tiny)
    before = square.sum(-1, keepdim=True).clamp_min(tiny)
    after = (square / mean).sum(-1, keepdim=True).clamp_min(tiny)
    return mean.rsqrt() * (before / after).sqrt(), moment, weight


def rms_gain(norm: Tensor, rank: int, cap: float) -> Tensor:
    """Factor that brings a Frobenius norm to that of a semi-orthogonal matrix, in [1, cap].

    Without the cap a rank-one matrix would be blown up until its single direction carries the
    norm of all: for 512 x 512 that is a spectral step 23 times too large.

    Args:
        norm: of any shape.
        rank: the largest that the matrices can have, their shorter side.
        cap: at least 1.
    """
    return (rank**0.5 / norm).clamp(1.0, cap)


def _both_support(
    coefficients: Coefficients, dtype: torch.dtype, second: Tensor | None, scale: ScaleArguments
) -> bool:
    updates = [scale.momentum] if second is None else [scale.momentum, second]
    has_kernel = newton_schulz.supports(scale.momentum, coefficients, dtype)
    return has_kernel and scale_update.supports(updates, scale)


@operator(
    f"(float[][] coefficients, ScalarType dtype, Tensor? second, {schema_of(ScaleArguments)})"
    " -> Tensor[]",
    _both_support,
    packed=ScaleArguments,
)
def orthogonal_update(
    coefficients: Coefficients, dtype: torch.dtype, second: Tensor | None, scale: ScaleArguments
) -> list[Tensor]:
    """:func:`deepopt.ops.newton_schulz` of a momentum, then :func:`deepopt.ops.scale_update`.

    In Eq 52, W <- W + σ(m(u)), σ is Newton-Schulz and m(u) is ``scale.momentum``; the size of the
    result is ours. One operator for both needs no memory between them: kernels scale in place.

    Args:
        coefficients, dtype: as for ``newton_schulz``.
        second: another update, shape (B, m, n), whose weight is ``scale.weight``, or None.
        scale: as for ``scale_update``; ``scale.momentum`` is what Newton-Schulz takes.

    Returns:
        The update, contiguous, and the new ``grad_norm``, ``row_moment`` and ``row_weight``, of
        those that are given.
    """
    update = newton_schulz(scale.momentum, coefficients, dtype)
    return scale_update([update] if second is None else [update, second], scale)
