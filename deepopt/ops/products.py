"""Which matrices the CPU's matrix kernels take.

With a short side of 64 or more they multiply in bfloat16, on processors with AVX512-BF16 but
without AMX: with AMX, torch's own products are faster. Small matrices are multiplied in float32, on
every processor.
"""

import torch
from torch import Tensor

from deepopt.ops.operator import OPERATORS

SHORTEST = 64
"""Shortest side from which on operands are rounded to bfloat16; kShortest in C++."""
LONGEST = 512
"""Longest side of a small matrix. For longer ones torch's products are as fast."""


def worth_rounding(matrices: Tensor) -> bool:
    """Whether the kernels in bfloat16 take these matrices: float32, on the CPU, not small."""
    return _in_float32(matrices) and min(matrices.shape[-2:]) >= SHORTEST and multiplies_bfloat16()


def is_small(matrices: Tensor) -> bool:
    """Whether the kernels in float32 take these matrices: float32, on the CPU, small."""
    rows, columns = matrices.shape[-2:]
    small = (rows < SHORTEST or columns < SHORTEST) and rows <= LONGEST and columns <= LONGEST
    return small and _in_float32(matrices)


def multiplies_bfloat16() -> bool:
    """Whether the bfloat16 kernels run here. gram_average has no other kernel for the CPU."""
    return "cpu" in OPERATORS["gram_average"].implementations


def _in_float32(matrices: Tensor) -> bool:
    return matrices.dtype == torch.float32 and matrices.device.type == "cpu"
