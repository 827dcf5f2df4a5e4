"""What an orthogonalised update goes through: rows normalised, as large as AdamW's, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.combine import combine, row_products
from deepopt.ops.operator import operator
from deepopt.ops.step_size import adam_ratio, frobenius, rms_gain, row_gains, running_root


def _supports(
    updates: Sequence[Tensor],
    weight: Tensor | None,
    momentum: Tensor,
    gain: Tensor | None,
    grad: Tensor,
    step: Tensor,
    grad_norm: Tensor | None,
    row_moment: Tensor | None,
    row_weight: Tensor | None,
    beta1: float,
    beta2: float,
    *_: float | None,
) -> bool:
    given = (*updates, weight, momentum, gain, grad, step, grad_norm, row_moment, row_weight)
    numbers = isinstance(beta1, int | float) and isinstance(beta2, int | float)
    return numbers and all(x is None or x.dtype == torch.float32 for x in given)


@operator(
    "(Tensor[] updates, Tensor? weight, Tensor momentum, Tensor? gain, Tensor grad, Tensor step, "
    "Tensor? grad_norm, Tensor? row_moment, Tensor? row_weight, "
    "float beta1, float beta2, float rms_cap, float? update_rms) -> Tensor[]",
    _supports,
)
def resize(
    updates: Sequence[Tensor],
    weight: Tensor | None,
    momentum: Tensor,
    gain: Tensor | None,
    grad: Tensor,
    step: Tensor,
    grad_norm: Tensor | None,
    row_moment: Tensor | None,
    row_weight: Tensor | None,
    beta1: float | Tensor,
    beta2: float | Tensor,
    rms_cap: float,
    update_rms: float | None,
) -> list[Tensor]:
    """An orthogonalised update with its rows normalised, as large as AdamW's would be.

    All of it is linear: the update is read once for the squares of its rows, and once to be
    multiplied by a factor for each of them.

    Args:
        updates: one or two, shape (B, m, n). The sum with the second one takes the place of the
            first, at the first one's norm.
        weight: of the second update in that sum, shape (B,).
        momentum: the average of gradients whose size counts, in their units, shape (B, m, n).
        gain: how many times as large that average is, shape (B,); None: once.
        grad: the gradient, shape (B, m, n).
        step: gradients in the averages so far, shape (B,), on the matrices' device or the host.
        grad_norm: running root of the mean squared norm of the gradient, shape (B,); None where
            ``update_rms`` is given, and then momentum, gradient and steps are not read.
        row_moment, row_weight: what :func:`deepopt.ops.row_gains` keeps, shape (B, m); None leaves
            the rows as they are.
        beta1, beta2: retentions of the averages of gradients and of squares.
        rms_cap: the most that an update of low rank is enlarged by, at least 1.
        update_rms: root mean square of an orthogonal update; None: that of AdamW's.

    Returns:
        The update, contiguous, and the new ``grad_norm``, ``row_moment`` and ``row_weight``, of
        those that are given.

    Cost: updates are read twice, gradient and momentum once, the result is written once.

    Raises:
        ValueError: (RuntimeError in kernels) arguments that belong together are not given together.
    """
    if len(updates) != (1 if weight is None else 2):
        raise ValueError(
            f"Invalid updates: {len(updates)} with weight={weight}; give one, or two and the "
            "weight of the second"
        )
    if (grad_norm is None) == (update_rms is None):
        raise ValueError(f"Invalid update_rms: {update_rms}; give either grad_norm or update_rms")
    if (row_moment is None) != (row_weight is None):
        raise ValueError("Invalid row_weight; give row_moment and row_weight, or neither")
    rows, columns = updates[0].shape[-2:]
    tiny = torch.finfo(updates[0].dtype).tiny
    state = []
    weights = updates[0].new_ones(1, len(updates[0]))
    products = row_products(updates)
    square = products[0]
    norm = square.sum(-1).clamp_min(tiny).sqrt()
    if weight is not None:
        weights, beside = torch.stack([weights[0], weight]), weight[:, None]
        square = square + 2 * beside * products[1] + beside.square() * products[2]
        square = square.clamp_min(0.0)  # a sum of products, which are rounded
        shrink = norm / square.sum(-1).clamp_min(tiny).sqrt()
        square, weights = square * shrink.square()[:, None], weights * shrink
    factor = max(rows, columns) ** 0.5 * rms_gain(norm, min(rows, columns), rms_cap)
    if grad_norm is not None:
        size, grad_norm = adam_size(momentum, grad, grad_norm, step, (beta1, beta2), gain)
        factor = factor * size
        state.append(grad_norm)
    elif update_rms is not None:
        factor = factor * update_rms
    weights = weights * factor
    if row_moment is not None and row_weight is not None:
        gains, *row_state = row_gains(square / columns, row_moment, row_weight, beta2)
        weights = weights[:, :, None] * gains
        state.extend(row_state)
    return [combine(updates, weights), *state]


def adam_size(
    momentum: Tensor,
    grad: Tensor,
    grad_norm: Tensor,
    step: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """AdamW's root mean square for every matrix and the new ``grad_norm``, as in :func:`resize`."""
    grad_norm = running_root(grad_norm, frobenius(grad), 1 - betas[1])
    return adam_ratio(momentum, grad_norm, step, betas, gain), grad_norm
