"""Matrix kernels in Triton, for NVIDIA and AMD GPUs: importing this adds the backend "triton"."""

import torch
from torch import Tensor

import deepopt.ops as operators
from deepopt.ops.inverse_power import newton_serves
from deepopt.ops.triton.covariance import gram_average, inverse_power
from deepopt.ops.triton.delta import delta_write, erase
from deepopt.ops.triton.newton_schulz import newton_schulz
from deepopt.ops.triton.split import split_product
from deepopt.ops.triton.symmetric import symmetric_product

__all__ = [
    "delta_write",
    "erase",
    "gram_average",
    "inverse_power",
    "newton_schulz",
    "split_product",
    "symmetric_product",
]


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
operators.gram_average.backend(
    "triton",
    supports=lambda gram, grad, scale, kept, share, of_rows: (
        _takes(grad) and gram.dtype == scale.dtype == kept.dtype == torch.float32
    ),
)(gram_average)
operators.inverse_power.backend(
    "triton",
    supports=lambda gram, power, damping: (
        _takes(gram)
        and newton_serves(gram, power, damping)
        and damping**-power <= 2**14  # what half precision holds
    ),
)(inverse_power)
operators.matmul.backend(
    "triton",
    supports=lambda a, b: a.ndim == b.ndim == 3 and len(a) == len(b) and _takes(a) and _takes(b),
)(split_product)
