"""Matrix kernels in Triton, for NVIDIA and AMD GPUs; importing this package needs triton."""

from deepopt.ops.triton.delta import delta_write, erase
from deepopt.ops.triton.newton_schulz import newton_schulz
from deepopt.ops.triton.symmetric import half_product, symmetric_product

__all__ = ["delta_write", "erase", "half_product", "newton_schulz", "symmetric_product"]
