"""Where the matrix kernels of the CPU multiply in bfloat16."""

import functools

import torch
from torch import Tensor

SHORTEST = 64
"""Short side from which on products are worth rounding their operands for."""


@functools.cache
def _has_kernels() -> bool:
    probe = getattr(torch.ops.deepopt, "has_bfloat16_products", None)
    return probe is not None and probe()


def multiplies_bfloat16(matrices: Tensor) -> bool:
    """Whether the CPU's kernels take these matrices: float32, not small, AVX512-BF16 at hand.

    Where there is no such kernel, or the processor has AMX, torch's own products serve.
    """
    return (
        matrices.dtype == torch.float32
        and min(matrices.shape[-2:]) >= SHORTEST
        and matrices.device.type == "cpu"
        and _has_kernels()
    )
