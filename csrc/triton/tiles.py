"""Which tiles a kernel uses: those that were fastest on an H200 (docs/results/gpu.md).

They are fixed, not tuned at the first call: every candidate is one more compilation, and with three
candidates the first steps of a process took 8 to 19 seconds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 32
FUSED = {"enable_fp_fusion": True}
"""Every kernel may compute a product and a sum as one fma. Triton 3.9 warns where this is left
open, as its default is about to change."""


class Tile(NamedTuple):
    """Rows and columns of the result, depth of a pass of the loop, warps, and passes read ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int | bool]:
        """The keyword arguments of a kernel's launch."""
        blocks = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages, **FUSED}


# The interpreter runs one program after the other, in about a millisecond each. Its tiles are
# small, so that matrices of a few dozen rows have edges and tails.
EMULATED = Tile(SMALLEST, SMALLEST, 16, 4, 1)
EXACT = Tile(64, 64, 32, 4, 4)
"""For float32 operands, which no matrix unit multiplies."""
LARGE, SMALL = Tile(128, 128, 64, 4, 3), Tile(64, 64, 128, 4, 3)
"""Tiles of symmetric products in half precision."""
FEW = 256
"""Longest side for which small tiles leave fewer processors idle than large ones."""
ERASE = Tile(128, 64, 64, 4, 4)
SPLIT = Tile(128, 64, 32, 4, 3)


def symmetric_tile(operand: Tensor) -> Tile:
    """For :func:`~deepopt.ops.triton.symmetric.symmetric_product` of ``operand``, (B, m, k)."""
    if operand.dtype == torch.float32:
        return on_device(EXACT, operand)
    return on_device(SMALL if operand.shape[-2] <= FEW else LARGE, operand)


def erase_tile(a: Tensor, b: Tensor) -> Tile:
    """For :func:`~deepopt.ops.triton.delta.erase` of these operands."""
    if b.dtype == torch.float32:
        return on_device(EXACT, b)
    # A float32 operand takes twice the shared memory.
    return on_device(ERASE._replace(stages=3) if a.dtype == torch.float32 else ERASE, b)


def split_tile(a: Tensor) -> Tile:
    """For :func:`~deepopt.ops.triton.split.split_product`."""
    return on_device(SPLIT, a)


def on_device(tile: Tile, operand: Tensor) -> Tile:
    """The tile as the operand's device can take it."""
    if not operand.is_cuda:
        return EMULATED
    if torch.version.hip:
        return adapted(tile, "hip")
    return adapted(tile, "cuda", torch.cuda.get_device_capability(operand.device)[0])


def adapted(tile: Tile, backend: str, major: int = 9) -> Tile:
    """The tile for a GPU of another kind than the H100's.

    Elsewhere four warps have too few registers for more than 64 x 64 sums and what comes after
    them. AMD's 64 KiB of shared memory hold two passes of the loop.
    """
    if backend == "hip":
        tile = tile._replace(stages=2)
    if (backend, major) != ("cuda", 9) and tile.rows * tile.columns > 64 * 64:
        tile = tile._replace(warps=8)
    return tile
