"""Products that are known to be symmetric, at half the arithmetic of an ordinary product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.triton.tiles import symmetric_tile


@triton.heuristics(
    {
        "EVEN": lambda args: args["size"] % args["BLOCK_M"] == 0,
        "EVEN_K": lambda args: args["depth"] % args["BLOCK_K"] == 0,
    }
)
@triton.jit
def symmetric_kernel(
    a_ptr,
    b_ptr,
    addend_ptr,
    out_ptr,
    alpha,
    beta,
    shift,
    batch,
    size,
    depth,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    HAS_ADDEND: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile on or below the diagonal of alpha A Bᵀ + beta D + shift I, and its mirror image."""
    tl.static_assert(BLOCK_M == BLOCK_N)
    blocks = tl.cdiv(size, BLOCK_M)
    tiles = blocks * (blocks + 1) // 2
    which = (tl.program_id(0) // tiles).to(tl.int64)
    # Tiles are counted along the rows of the triangle; the root, in float32, can be off by one.
    tile = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= tile).to(tl.int32)
    i -= (i * (i + 1) // 2 > tile).to(tl.int32)
    j = tile - i * (i + 1) // 2

    # The start of a tile is counted in 64 bits. What lies inside it in 32, for strides below 2²⁴:
    # 64 there would take a fifth more instructions, and registers that two blocks fit into.
    inside = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + which * a_batch + (i * BLOCK_M).to(tl.int64) * a_row
    a_ptrs += inside[:, None] * a_row + k[None, :] * a_column
    b_ptrs = b_ptr + which * b_batch + (j * BLOCK_M).to(tl.int64) * b_row
    b_ptrs += inside[None, :] * b_row + k[:, None] * b_column
    rows, columns = i * BLOCK_M + inside, j * BLOCK_M + inside
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN and EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        elif EVEN_K:
            a = tl.load(a_ptrs, rows[:, None] < size, 0.0)
            b = tl.load(b_ptrs, columns[None, :] < size, 0.0)
        else:
            left = depth - start
            a = tl.load(a_ptrs, (rows[:, None] < size) & (k[None, :] < left), 0.0)
            b = tl.load(b_ptrs, (columns[None, :] < size) & (k[:, None] < left), 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * a_column
        b_ptrs += BLOCK_K * b_column

    corner = which * size * size + (i * BLOCK_M).to(tl.int64) * size + j * BLOCK_M
    place = inside[:, None] * size + inside[None, :]
    in_bounds = (rows[:, None] < size) & (columns[None, :] < size)
    total *= alpha
    if HAS_ADDEND:
        if EVEN:
            total += beta * tl.load(addend_ptr + corner + place).to(tl.float32)
        else:
            total += beta * tl.load(addend_ptr + corner + place, in_bounds, 0.0).to(tl.float32)
    total = tl.where(rows[:, None] == columns[None, :], total + shift, total)
    result = total.to(out_ptr.dtype.element_ty)
    if i == j:  # both halves are computed, and may be rounded differently
        result = tl.where(rows[:, None] >= columns[None, :], result, tl.trans(result))
    else:
        mirrored = tl.trans(result)
        across = which * size * size + (j * BLOCK_M).to(tl.int64) * size + i * BLOCK_M
        if EVEN:
            tl.store(out_ptr + across + place, mirrored)
        else:
            below = (columns[:, None] < size) & (rows[None, :] < size)
            tl.store(out_ptr + across + place, mirrored, below)
    if EVEN:
        tl.store(out_ptr + corner + place, result)
    else:
        tl.store(out_ptr + corner + place, result, in_bounds)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    addend: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha A Bᵀ + beta D + shift I, where A Bᵀ is known to be symmetric.

    It is for B = A, and for symmetric A and B that commute, such as polynomials of one matrix; of
    anything else the result is the lower triangle, mirrored. The result is exactly symmetric, and
    has the same bits every time.

    Args:
        a: shape (B, m, k), float16, bfloat16 or float32; of any strides below 2²⁴ in a matrix.
        b: like ``a``.
        addend: D, symmetric, shape (B, m, m) (default: none).
        alpha, beta, shift: factors, in float32 (default: 1, 1 and 0).
        dtype: of the result (default: that of ``a``).

    Returns:
        Shape (B, m, m), contiguous. Sums are in float32 and rounded once.

    Cost: m (m + tile) k B FLOPs, where an ordinary product takes 2 m² k B; every operand is read
    at least once, and the result written once.
    """
    batch, size, depth = a.shape
    out = a.new_empty(batch, size, size, dtype=dtype or a.dtype)
    addend = None if addend is None else addend.contiguous()
    if out.numel():
        tile = symmetric_tile(a)
        blocks = triton.cdiv(size, tile.rows)
        symmetric_kernel[(batch * blocks * (blocks + 1) // 2,)](
            a, b, out if addend is None else addend, out,
            alpha, beta, shift, batch, size, depth, *a.stride(), *b.stride(),
            HAS_ADDEND=addend is not None, **tile.options(),
        )  # fmt: skip
    return out
