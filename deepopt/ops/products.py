"""What the matrix kernels of the CPU take.

From a short side of 64 on they multiply in bfloat16, on processors with AVX512-BF16; those with
AMX, which is faster, are left to torch's own products. Small matrices are multiplied in float32, on
every processor.
"""

from torch import Tensor, float32

from deepopt.ops.operator import OPERATORS

SHORTEST = 64
"""Short side from which on products are worth rounding their operands for."""
MOST_ENTRIES = 2**19
"""Of a matrix that counts as small: in larger ones torch's products in float32 are faster."""


def worth_rounding(matrices: Tensor) -> bool:
    """Whether the kernels in bfloat16 take these matrices: float32, on the CPU, not small."""
    return (
        matrices.dtype == float32
        and matrices.device.type == "cpu"
        and min(matrices.shape[-2:]) >= SHORTEST
        and multiplies_bfloat16()
    )


def is_small(matrices: Tensor) -> bool:
    """Whether the kernels in float32 take these matrices: float32, on the CPU, small."""
    rows, columns = matrices.shape[-2:]
    return (
        matrices.dtype == float32
        and matrices.device.type == "cpu"
        and min(rows, columns) < SHORTEST
        and rows * columns <= MOST_ENTRIES
    )


def multiplies_bfloat16() -> bool:
    """Whether this processor has the kernels in bfloat16, which are all that gram_average has."""
    return "cpu" in OPERATORS["gram_average"].implementations
