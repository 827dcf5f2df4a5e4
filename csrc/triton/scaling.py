"""Norms of matrices, and matrices relative to a number each in half precision: one pass each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.norms import frobenius
from deepopt.ops.triton.tiles import FUSED

CHUNK = 4096
"""Elements of a matrix that a block of threads takes: 16 for each of 256 threads."""
OPTIONS = {"num_warps": 8, **FUSED}


@triton.jit
def tile_norm(tile):
    """The root of the sum of squares, also where squares leave float32's range.

    It is at most 3.4e38, just below the largest float32, and NaN where an entry is not finite.
    """
    largest = tl.max(tl.abs(tile))
    scaled = tile / tl.where(largest > 0.0, largest, 1.0)
    root = tl.sqrt(tl.sum(scaled * scaled))
    return tl.minimum(largest, 3.4e38 / tl.where(root > 0.0, root, 1.0)) * root


@triton.jit
def norm_kernel(x_ptr, norms_ptr, length, CHUNK: tl.constexpr):
    """The norm of one chunk of a matrix."""
    chunks = tl.cdiv(length, CHUNK)
    which, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    places = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + which * length + places, places < length, 0.0)
    tl.store(norms_ptr + tl.program_id(0), tile_norm(x.to(tl.float32)))


@triton.jit
def divide_kernel(x_ptr, divisors_ptr, out_ptr, length, CHUNK: tl.constexpr):
    """One chunk of a matrix, divided by the number that belongs to it."""
    chunks = tl.cdiv(length, CHUNK)
    which, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    places = chunk.to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + which * length + places, places < length, 0.0).to(tl.float32)
    x /= tl.load(divisors_ptr + which)
    out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + which * length + places, out, places < length)


def norms(matrices: Tensor) -> Tensor:
    """:func:`deepopt.ops.frobenius` in one pass: 4 bytes per element of shape (B, m, n).

    Norms of chunks are summed in their order, without atomics: the same bits every time.
    """
    matrices = matrices.contiguous()
    batch, length = len(matrices), matrices[0].numel() if len(matrices) else 0
    chunks = max(triton.cdiv(length, CHUNK), 1)
    parts = torch.zeros(batch, 1, chunks, device=matrices.device, dtype=torch.float32)
    if matrices.numel():
        norm_kernel[(batch * chunks,)](matrices, parts, length, CHUNK, **OPTIONS)
    return frobenius(parts)


def divided(matrices: Tensor, divisors: Tensor, dtype: torch.dtype) -> Tensor:
    """Every matrix of shape (B, m, n) divided by its number, in ``dtype``: 4 bytes in, 2 out."""
    matrices = matrices.contiguous()
    out = torch.empty_like(matrices, dtype=dtype)
    if length := out[0].numel() if len(out) else 0:
        grid = (len(out) * triton.cdiv(length, CHUNK),)
        divide_kernel[grid](matrices, divisors, out, length, CHUNK, **OPTIONS)
    return out
