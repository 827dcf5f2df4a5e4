"""Matrix kernels in Triton, for NVIDIA and AMD GPUs: importing this adds the backend "triton"."""

import torch
from torch import Tensor

import deepopt.ops as operators
from deepopt.ops.triton.delta import delta_write, erase
from deepopt.ops.triton.newton_schulz import newton_schulz
from deepopt.ops.triton.symmetric import half_product, symmetric_product

__all__ = ["delta_write", "erase", "half_product", "newton_schulz", "symmetric_product"]


def _takes(*matrices: Tensor) -> bool:
    """Whether these are float32 matrices that fill tiles, on a GPU with matrix units."""
    first = matrices[0]
    return (
        first.is_cuda
        and all(tensor.dtype == torch.float32 for tensor in matrices)
        and first.numel() > 0
        and 64 <= min(first.shape[-2:])
        and max(first.shape[-2:]) < 2**24
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
    )


operators.newton_schulz.backend(
    "triton",
    supports=lambda matrices, coefficients, dtype: dtype != torch.float64 and _takes(matrices),
)(newton_schulz)
operators.delta_write.backend(
    "triton",
    supports=lambda momentum, grad, norm, erasure, rate, retention: (
        _takes(momentum, grad)
        and norm.dtype == erasure.dtype == torch.float32
        and isinstance(retention, float)
    ),
)(delta_write)
