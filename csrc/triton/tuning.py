"""Which tiles a kernel uses, and whether it or cuBLAS computes a product: measured, then kept."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import triton
import triton.testing
from torch import Tensor

# Emulation runs program after program, about a millisecond each: tiles that leave edges and tails
# in matrices of a few dozen rows.
SMALLEST = 32
EMULATED = triton.Config(
    {"BLOCK_M": SMALLEST, "BLOCK_N": SMALLEST, "BLOCK_K": 16}, num_warps=4, num_stages=1
)

_chosen: dict[Hashable, Callable[..., Tensor]] = {}


def configs(tiles: Sequence[tuple[int, int, int]]) -> list[triton.Config]:
    """Configurations for tiles of (rows, columns, depth), the one for float32 operands last.

    A thread has at most 255 registers; a tile of 128 x 128 in four warps takes 128 for its sums
    alone. The loop reads one or two tiles ahead of the one in use, as far as shared memory goes:
    up to 128 KiB where there are 164 or more (A100, H100, B200), 32 of 64 KiB on an MI300.
    """
    made = []
    for rows, columns, depth in tiles:
        blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        warps = 4 if rows * columns <= 64 * 64 else 8
        stages = 2 if torch.version.hip else 4 if depth == 32 else 3
        made.append(triton.Config(blocks, num_warps=warps, num_stages=stages))
    return made


def fitting(
    candidates: list[triton.Config], arguments: dict[str, Any], **_: Any
) -> list[triton.Config]:
    """The configurations that are tried for these operands; without a GPU the one for emulation."""
    operand = arguments["b_ptr"]
    if not operand.is_cuda:
        return [EMULATED]
    return candidates[-1:] if operand.dtype == torch.float32 else candidates[:-1]


def fastest(
    key: Hashable, candidates: Sequence[Callable[..., Tensor]], *args: Any
) -> Callable[..., Tensor]:
    """The candidate that took least time on these arguments when ``key`` was first met.

    While a CUDA graph is captured nothing can be timed: what was not met before goes to the first.
    """
    if key not in _chosen:
        if not any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
            return candidates[0]
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        _chosen[key] = min(candidates, key=lambda candidate: _milliseconds(candidate, *args))
    return _chosen[key]


def _milliseconds(function: Callable[..., Tensor], *args: Any) -> float:
    function(*args)  # compiles, and tries the tiles
    time = triton.testing.do_bench(lambda: function(*args), warmup=5, rep=20, return_mode="median")
    return float(time)
