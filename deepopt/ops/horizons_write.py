"""The write of the memory of several horizons, with its MLP and its read, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepopt.ops.combine import combine
from deepopt.ops.norms import frobenius, running_root
from deepopt.ops.operator import operator

COSINE_RETENTION = 0.7
"""Retention of the running cosines: short, so that a change shows within three steps."""
COSINE_FLOOR = 0.01
"""Added to the cosines, so that all averages count the same if none predicts the gradient."""
MOST_SCALES = 8
"""Averages that the kernels take: kMostScales in csrc/rules/horizons.h."""


@operator(
    "(Tensor[] averages, Tensor grad, Tensor foresight, Tensor grad_size, Tensor phi, Tensor step, "
    "float[] retentions) -> Tensor[]",
    supports=lambda averages, grad, foresight, grad_size, phi, step, retentions: (
        len(averages) <= MOST_SCALES
        and all(
            tensor.dtype == torch.float32
            for tensor in (*averages, grad, foresight, grad_size, phi, step)
        )
        and all(isinstance(kept, int | float) for kept in retentions)
    ),
)
def horizons_write(
    averages: Sequence[Tensor],
    grad: Tensor,
    foresight: Tensor,
    grad_size: Tensor,
    phi: Tensor,
    step: Tensor,
    retentions: Sequence[float | Tensor],
) -> list[Tensor]:
    r"""Write a gradient into K averages, and mix them with weights that an MLP computes.

    The equations are those of :class:`deepopt.memory.Horizons`.

    Args:
        averages: :math:`M^k`, K of shape (B, m, n).
        grad: G, of the same shape.
        foresight: the running cosines :math:`c^k`, shape (B, K).
        grad_size: s, shape (B,).
        phi: the MLP of every matrix, shape (B, H, 3K + 2).
        step: t, the gradients so far with this one, at least 1, shape (B,).
        retentions: :math:`\beta_k`, K of them.

    Returns:
        K + 4 tensors: the new averages, foresight and size, the weights :math:`w^k` of all averages
        but the first, shape (B, K - 1), and the read, shape (B, m, n).

    Cost: the averages and the gradient are read twice, the averages and the read written once.

    Raises:
        RuntimeError: (from kernels) tensors that do not fit each other.
    """
    tiny, first_retention = torch.finfo(grad.dtype).tiny, retentions[0]
    size = frobenius(grad)
    sizes = torch.stack([frobenius(average) for average in averages], 1)
    # Products with huge averages would overflow before they are divided by the sizes.
    lift = torch.where(sizes.amax(1) > 2.0**64, 2.0**32, 1.0).to(grad.dtype)
    unit = (grad / size.clamp_min(tiny)[:, None, None]).flatten(1) / lift[:, None]
    products = torch.stack([torch.linalg.vecdot(unit, x.flatten(1)) for x in averages], 1)
    cosines = products / sizes.clamp_min(tiny) * lift[:, None]
    cosines = cosines.clamp(-1.0, 1.0)  # norms that overflow count as the largest float
    foresight = foresight.lerp(cosines, 1 - COSINE_RETENTION)
    grad_size = running_root(grad_size, size, 1 - first_retention)
    features = _features(foresight, sizes / grad_size.clamp_min(tiny)[:, None], step)
    weights = mixing_weights(phi, features)
    averages = [x.lerp(grad, 1 - kept) for x, kept in zip(averages, retentions, strict=True)]

    ahead = grad.lerp(averages[0], first_retention)
    shares = [1 - weights.sum(1), torch.zeros_like(step)]
    for kept, weight in zip(retentions[1:], weights.unbind(1), strict=True):
        share = weight * (1 - first_retention**step) / (1 - kept**step)
        shares.append(share * kept)
        shares[1] = shares[1] + share * (1 - kept)
    read = combine([ahead, grad, *averages[1:]], torch.stack(shares))
    return [*averages, foresight, grad_size, weights, read]


def _features(foresight: Tensor, sizes: Tensor, step: Tensor) -> Tensor:
    """What the MLP sees, shape (B, 2K + 2)."""
    best = foresight.amax(1, keepdim=True)
    trust = (foresight.clamp_min(0) + COSINE_FLOOR) / (best.clamp_min(0) + COSINE_FLOOR)
    return torch.cat([trust, best, sizes, step.log10()[:, None] / 3], 1)


def mixing_weights(phi: Tensor, features: Tensor) -> Tensor:
    """The weights (B, K - 1) that an MLP ``phi`` (B, H, 3K + 2) gives for features (B, 2K + 2).

    No weight is negative, and their sum is at most 1.
    """
    inputs = features.shape[1]
    drive = (phi[..., :inputs] @ features[..., None])[..., 0] + phi[..., inputs]
    value = (phi[..., inputs + 1 :].mT @ drive.relu()[..., None])[..., 0].clamp(0.0, 1.0)
    return value / value.sum(1, keepdim=True).clamp_min(1.0)
