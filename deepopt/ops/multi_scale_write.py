"""The write of M3's memory: both momenta in one pass (Alg. 1, Eq 75).

The paper prints sums; these are averages (E18 to E20 of docs/paper.md).
"""

import torch
from torch import Tensor

from deepopt.ops.operator import operator

WINDOW_DIVISOR = 4
"""The slow momentum averages over at most the last 1/WINDOW_DIVISOR of the run so far."""


@operator(
    "(Tensor momentum, Tensor slow, Tensor grad, Tensor step, float retention, int slow_chunk, "
    "float beta3) -> (Tensor, Tensor, Tensor)",
    supports=lambda momentum, slow, grad, step, retention, slow_chunk, beta3: (
        momentum.dtype == slow.dtype == grad.dtype == step.dtype == torch.float32
        and isinstance(retention, int | float)
    ),
)
def multi_scale_write(
    momentum: Tensor,
    slow: Tensor,
    grad: Tensor,
    step: Tensor,
    retention: float | Tensor,
    slow_chunk: int,
    beta3: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Take a gradient into a fast momentum, and into a slow one that is whole at a chunk's end.

    .. math::
        M^{(1)} &\leftarrow \beta M^{(1)} + (1-\beta)\, G, \qquad
        \hat M^{(1)} = \beta M^{(1)} + (1-\beta)\, G \\
        M^{(2)} &\leftarrow d_t\, M^{(2)} + \frac{1-\beta_{3,k}}{f}\, G, \qquad
        k = \Big\lfloor\frac{t-1}{f}\Big\rfloor, \quad
        \beta_{3,k} = \min\Big(\beta_3, \frac{k}{k+4}\Big)

    with :math:`d_t = \beta_{3,k}` at the first step of a chunk, t = kf + 1, and 1 at the others.

    Args:
        momentum: the fast one, shape (B, m, n).
        slow: the slow one, of the same shape.
        grad: G, of the same shape.
        step: t, the gradients so far with this one, at least 1, shape (B,).
        retention: β.
        slow_chunk: f.
        beta3: β₃, in [0, 1).

    Returns:
        The new momenta, fast and slow, and the fast one's look-ahead.

    Cost: three tensors are read once, three written.

    Raises:
        RuntimeError: (from kernels) tensors that do not fit each other.
    """
    ended = torch.floor((step - 1) / slow_chunk)  # k, the chunks that have ended
    slow_retention = (ended / (ended + WINDOW_DIVISOR)).clamp_max(beta3)
    decay = torch.where((step - 1) % slow_chunk == 0, slow_retention, 1.0)
    share = (1 - slow_retention) / slow_chunk
    momentum = momentum.lerp(grad, 1 - retention)
    slow = decay[:, None, None] * slow + share[:, None, None] * grad
    return momentum, slow, grad.lerp(momentum, retention)
