"""Where the matrix kernels of the CPU multiply in bfloat16."""

import torch
from torch import Tensor

SHORTEST = 64
"""Short side from which on products are worth rounding their operands for."""

_there = False


def find_kernels() -> None:
    """Ask the extension, once it is loaded, whether its matrix kernels run on this processor.

    They want AVX512-BF16, and leave processors with AMX, which is faster, to torch's own products.
    """
    global _there
    probe = getattr(torch.ops.deepopt, "has_bfloat16_products", None)
    _there = probe is not None and probe()


def multiplies_bfloat16(matrices: Tensor) -> bool:
    """Whether the kernels are there and take these matrices: float32, on the CPU, not small."""
    return (
        _there
        and matrices.dtype == torch.float32
        and matrices.device.type == "cpu"
        and min(matrices.shape[-2:]) >= SHORTEST
    )
