"""Products with the inverse (I + rate rowsᵀ rows)⁻¹ of ridge regression, from the rows alone."""

import torch
from torch import Tensor

from deepopt.ops.norms import frobenius


def ridge(matrix: Tensor, rows: Tensor, rate: float | Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` and ``rows``, each times (I + rate rowsᵀ rows)⁻¹, for every pair of a batch.

    With A = I + rate rows rowsᵀ, rows (…)⁻¹ = A⁻¹ rows, and Woodbury's identity makes the other
    product matrix - rate (matrix rowsᵀ) A⁻¹ rows, so that one system serves both. It is solved on
    the short side, for the rows divided by their norm. If the rows are large, the product is small,
    and this way it is not computed as the difference of two large numbers.

    Beyond rate ‖rows‖² = 1/(16 s eps), which is 10¹² for a short side s of 256, the identity in A
    would be lost in rounding, so its share is bounded from below. Directions with less than 10⁻⁶ of
    the rows' size are then damped too much, but both products still contract.

    Args:
        matrix: shape (B, m, n).
        rows: shape (B, r, n), r at least 1.
        rate: not negative.

    Cost: 2s²S for the Gram matrix, s³/3 and 2s²S for the system, with s and S the short and the
    long side of ``rows``, and 4rmn for the first product, or 2n²(r + m) where r > n; in float64,
    see :func:`widened`.
    """
    keys, old = widened(rows), widened(matrix)
    dtype = keys.dtype
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    wide, size = rows.shape[-2] <= rows.shape[-1], min(rows.shape[-2:])
    # The norm is only a unit of measurement: derivatives need not pass through it.
    norm = frobenius(rows.detach()).clamp_min(torch.finfo(rows.dtype).tiny)
    norm = norm.to(dtype)[:, None, None]
    keys = keys / norm
    strength = (rate * norm * norm).clamp_max(largest)
    unit = strength.detach().clamp_min(1.0)
    short = keys if wide else keys.mT
    added = (1 / unit).clamp_min(16 * size * eps) * torch.eye(size, dtype=dtype, device=keys.device)
    factor = torch.linalg.cholesky_ex(added + strength / unit * (short @ short.mT)).L
    # A CUDA graph cannot capture cholesky_solve.
    solved = torch.linalg.solve_triangular(factor, short, upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, solved, upper=True)
    solved = solved if wide else solved.mT
    recalled = (old @ keys.mT) @ solved if wide else old @ (keys.mT @ solved)
    new = old - strength / unit * recalled
    return new.to(matrix.dtype), (norm / unit * solved).to(rows.dtype)


def widened(tensor: Tensor) -> Tensor:
    """In float64, where the device has it: Gram matrices square the condition number."""
    return tensor if tensor.device.type == "mps" else tensor.double()
