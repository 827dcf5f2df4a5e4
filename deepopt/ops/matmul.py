"""Products of float32 matrices, at float32's accuracy."""

from torch import Tensor

from deepopt.ops.operator import operator


@operator("(Tensor a, Tensor b) -> Tensor")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """A B for every pair of a batch.

    For what half precision would spoil: a root that enlarges small directions of a momentum
    enlarges what was rounded off the large ones as well.

    Args:
        a: shape (B, m, k).
        b: shape (B, k, n).

    Cost: 2 m k n FLOPs each. Triton's kernel computes them as three products in half precision, as
    exact as float32 (``csrc/triton/split.py``).
    """
    return a @ b
