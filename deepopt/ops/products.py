"""What the matrix kernels of the CPU take, which multiply in bfloat16.

They are there on processors with AVX512-BF16, and leave those with AMX, which is faster, to torch's
own products.
"""

import torch
from torch import Tensor

SHORTEST = 64
"""Short side from which on products are worth rounding their operands for."""


def worth_rounding(matrices: Tensor) -> bool:
    """Whether the kernels take these matrices: float32, on the CPU, not small."""
    return (
        matrices.dtype == torch.float32
        and matrices.device.type == "cpu"
        and min(matrices.shape[-2:]) >= SHORTEST
    )
