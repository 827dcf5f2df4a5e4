"""Products of float32 matrices, at float32's accuracy."""

from torch import Tensor

from deepopt.ops.operator import operator


@operator("(Tensor a, Tensor b) -> Tensor")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A B for every pair of a batch.

    It is for products that half precision would spoil. A root that enlarges the small directions of
    a momentum also enlarges what rounding took from the large ones.

    Args:
        a: shape (B, m, k).
        b: shape (B, k, n).

    Cost: 2 m k n FLOPs each. Triton's kernel computes them as three products in half precision, as
    exact as float32 (``csrc/triton/split.py``).
    """
    return a @ b
