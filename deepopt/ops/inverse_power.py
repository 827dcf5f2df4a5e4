"""Negative fractional powers of Gram matrices (Eqs 106-111 with a free power)."""

import torch
from torch import Tensor


def inverse_power(gram: Tensor, power: float, damping: float) -> Tensor:
    """(C / λ_max + damping I)^-power for every positive semi-definite C of a batch.

    Relative damping makes the result independent of the scale of C and bounds its norm by
    damping^-power, whatever the rank of C; a zero or a non-finite matrix gives the identity.
    Eigenvalues are computed in float64 where the device has it: Gram matrices square the condition
    number.

    Args:
        gram: shape (B, r, r), symmetric up to rounding.
        power: positive.
        damping: smallest eigenvalue that counts, relative to the largest.
    """
    finite = gram.isfinite().all(-1).all(-1)[:, None, None]
    wide = torch.where(finite, gram, torch.zeros_like(gram))
    wide = wide if gram.device.type == "mps" else wide.double()
    scale = torch.linalg.matrix_norm(wide, keepdim=True)
    values, vectors = torch.linalg.eigh(wide / scale.clamp_min(torch.finfo(gram.dtype).tiny))
    values = values.clamp_min(0)
    largest = values[:, -1:]
    values = torch.where(largest > 0, values / largest + damping, torch.ones_like(values))
    return ((vectors * values.pow(-power)[:, None, :]) @ vectors.mT).to(gram.dtype)
