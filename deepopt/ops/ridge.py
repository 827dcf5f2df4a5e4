"""The solution of a ridge regression, from the rows that it regresses on."""

import torch
from torch import Tensor


def ridge(matrix: Tensor, rows: Tensor, rate: float | Tensor) -> Tensor:
    """``matrix @ (I + rate * rows.T @ rows)^-1``, for every matrix of a batch.

    The system is solved on the shorter side of ``rows``, and in float64 where the device has it:
    Gram matrices square the condition number.

    Args:
        matrix: shape (B, m, n).
        rows: shape (B, r, n).
        rate: not negative.
    """
    wide = rows if rows.device.type == "mps" else rows.double()
    few = rows.shape[-2] < rows.shape[-1]
    gram = wide @ wide.mT if few else wide.mT @ wide
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky_ex(identity + rate * gram).L
    if few:
        recalled = torch.cholesky_solve((matrix @ rows.mT).mT.to(gram.dtype), factor).mT
        return matrix - rate * (recalled.to(matrix.dtype) @ rows)
    return torch.cholesky_solve(matrix.mT.to(gram.dtype), factor).mT.to(matrix.dtype)
