"""Float32 products on matrix units: each operand is split into two parts in half precision."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.triton.scaling import norms
from deepopt.ops.triton.tiles import split_tile


@triton.heuristics(
    {
        "EVEN": lambda args: args["m"] % args["BLOCK_M"] == 0 and args["n"] % args["BLOCK_N"] == 0,
        "EVEN_K": lambda args: args["depth"] % args["BLOCK_K"] == 0,
    }
)
@triton.jit
def split_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    batch,
    m,
    n,
    depth,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    units_ptr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of A B, as high high + (high low + low high) / 2048, in units of each matrix."""
    high, wide = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    which = (tl.program_id(0) // (high * wide)).to(tl.int64)
    tile = tl.program_id(0) % (high * wide)
    i, j = tl.swizzle2d(tile // wide, tile % wide, high, wide, 8)
    inside_m, inside_n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + which * a_batch + (i * BLOCK_M).to(tl.int64) * a_row
    a_ptrs += inside_m[:, None] * a_row + k[None, :] * a_column
    b_ptrs = b_ptr + which * b_batch + (j * BLOCK_N).to(tl.int64) * b_column
    b_ptrs += inside_n[None, :] * b_column + k[:, None] * b_row
    rows, columns = i * BLOCK_M + inside_m, j * BLOCK_N + inside_n
    large = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_UNITS:
        units_ptr += 4 * which
        a_inverse, b_inverse = tl.load(units_ptr), tl.load(units_ptr + 1)
    for start in range(0, depth, BLOCK_K):
        if EVEN and EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            left = depth - start
            a = tl.load(a_ptrs, (rows[:, None] < m) & (k[None, :] < left), 0.0)
            b = tl.load(b_ptrs, (columns[None, :] < n) & (k[:, None] < left), 0.0)
        if HAS_UNITS:
            a, b = a * a_inverse, b * b_inverse
        a_high, b_high = a.to(tl.float16), b.to(tl.float16)
        # What the high parts lack, enlarged so that it does not become subnormal.
        a_low = ((a - a_high.to(tl.float32)) * 2048.0).to(tl.float16)
        b_low = ((b - b_high.to(tl.float32)) * 2048.0).to(tl.float16)
        large = tl.dot(a_high, b_high, large)
        small = tl.dot(a_high, b_low, small)
        small = tl.dot(a_low, b_high, small)
        a_ptrs += BLOCK_K * a_column
        b_ptrs += BLOCK_K * b_row
    result = large + small / 2048.0
    if HAS_UNITS:
        result = result * tl.load(units_ptr + 2) * tl.load(units_ptr + 3)
    places = which * m * n + (i * BLOCK_M).to(tl.int64) * n + j * BLOCK_N
    places += inside_m[:, None] * n + inside_n[None, :]
    if EVEN:
        tl.store(out_ptr + places, result)
    else:
        tl.store(out_ptr + places, result, (rows[:, None] < m) & (columns[None, :] < n))


def split_product(a: Tensor, b: Tensor, bounded: bool = False) -> Tensor:
    """A B of float32 matrices, as exact as products in float32 are.

    With high = fp16(x) and low = fp16(2048 (x - high)), x is high + low / 2048 but for 2⁻²² of it,
    or 2⁻³⁶ where it is smaller than 2⁻¹⁴. Three products of such parts, with sums in float32, ran
    on an H200 at 115 TFLOP/s, where float32 without matrix units reached 46 and float64 62.

    Args:
        a: shape (B, m, k), float32, of any strides below 2²⁴ in a matrix.
        b: shape (B, k, n), likewise.
        bounded: norms are known to be between 2⁻⁷ and 2¹⁵, so that entries need not be measured in
            units of each matrix (default: False).

    Returns:
        Shape (B, m, n), contiguous.

    Cost: 6 m n k B FLOPs in half precision; to measure, 4 (m k + k n) B bytes.
    """
    batch, m, depth = a.shape
    n = b.shape[-1]
    out = a.new_empty(batch, m, n)
    if not out.numel():
        return out
    tile = split_tile(a)
    units = a if bounded else _units(a, b)
    split_kernel[(batch * triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),)](
        a, b, out, batch, m, n, depth, *a.stride(), *b.stride(), units,
        HAS_UNITS=not bounded, **tile.options(),
    )  # fmt: skip
    return out


def _units(a: Tensor, b: Tensor) -> Tensor:
    """Powers of two that bring the operands near norm 1, and the product back; shape (B, 4).

    Two are for the operands, one for each. The other two multiply the product one after the other.
    They share its exponent evenly: those of the operands themselves may be far apart, and the first
    would push the product out of the range from which the second brings it back.
    """
    left, right = _exponent(a), _exponent(b)
    first = (left + right) // 2
    return _power_of_two(torch.stack([-left, -right, first, left + right - first], 1))


def _exponent(matrices: Tensor) -> Tensor:
    """The exponent e of every matrix for which 2^e is just above its norm, from -125 to 125."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.frexp(norms(matrices).clamp_min(tiny)).exponent.clamp(-125, 125)


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^e in float32 for e from -126 to 127, from its bits: exact on every device."""
    return (exponents + 127 << 23).to(torch.int32).view(torch.float32)
