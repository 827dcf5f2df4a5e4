"""The delta-rule write: a product whose result goes straight into the momentum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.combine import combine
from deepopt.ops.delta_write import HEADROOM
from deepopt.ops.norms import frobenius, running_root
from deepopt.ops.triton.scaling import divided, tile_norm
from deepopt.ops.triton.symmetric import symmetric_product
from deepopt.ops.triton.tiles import erase_tile


@triton.heuristics(
    {
        "EVEN": lambda args: args["m"] % args["BLOCK_M"] == 0 and args["n"] % args["BLOCK_N"] == 0,
        "EVEN_K": lambda args: args["depth"] % args["BLOCK_K"] == 0,
    }
)
@triton.jit
def erase_kernel(
    a_ptr,
    b_ptr,
    momentum_ptr,
    grad_ptr,
    coefficient_ptr,
    retention_ptr,
    fresh_ptr,
    out_ptr,
    norms_ptr,
    batch,
    m,
    n,
    depth,
    slots,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of retention M - c A B + f G, and the norms of c A B and M in it."""
    high, wide = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    which = (tl.program_id(0) // (high * wide)).to(tl.int64)
    tile = tl.program_id(0) % (high * wide)
    # Eight rows of tiles at a time, so that what A and B have for neighbors is still in the cache.
    i, j = tl.swizzle2d(tile // wide, tile % wide, high, wide, 8)

    inside_m, inside_n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + which * a_batch + (i * BLOCK_M).to(tl.int64) * a_row
    a_ptrs += inside_m[:, None] * a_row + k[None, :] * a_column
    b_ptrs = b_ptr + which * b_batch + (j * BLOCK_N).to(tl.int64) * b_column
    b_ptrs += inside_n[None, :] * b_column + k[:, None] * b_row
    rows, columns = i * BLOCK_M + inside_m, j * BLOCK_N + inside_n
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN and EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        elif EVEN_K:
            a = tl.load(a_ptrs, rows[:, None] < m, 0.0)
            b = tl.load(b_ptrs, columns[None, :] < n, 0.0)
        else:
            left = depth - start
            a = tl.load(a_ptrs, (rows[:, None] < m) & (k[None, :] < left), 0.0)
            b = tl.load(b_ptrs, (columns[None, :] < n) & (k[:, None] < left), 0.0)
        total = tl.dot(a.to(b.dtype), b, total, input_precision="ieee")
        a_ptrs += BLOCK_K * a_column
        b_ptrs += BLOCK_K * b_row

    place = which * m * n + (i * BLOCK_M).to(tl.int64) * n + j * BLOCK_N
    places = place + (inside_m[:, None] * n + inside_n[None, :])
    in_bounds = (rows[:, None] < m) & (columns[None, :] < n)
    norms = norms_ptr + which * 2 * slots + i * wide + j
    retention, fresh = tl.load(retention_ptr), tl.load(fresh_ptr + which)
    erased = total * tl.load(coefficient_ptr + which)
    tl.store(norms, tile_norm(erased))
    # The barriers keep loads where they are: early ones would hold three tiles in registers.
    tl.debug_barrier()
    if EVEN:
        momentum = tl.load(momentum_ptr + places)
    else:
        momentum = tl.load(momentum_ptr + places, in_bounds, 0.0)
    tl.store(norms + slots, tile_norm(momentum))
    result = retention * momentum - erased
    tl.debug_barrier()
    if EVEN:
        tl.store(out_ptr + places, result + fresh * tl.load(grad_ptr + places))
    else:
        grad = tl.load(grad_ptr + places, in_bounds, 0.0)
        tl.store(out_ptr + places, result + fresh * grad, in_bounds)


def erase(
    momentum: Tensor,
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    coefficient: Tensor,
    retention: float | Tensor,
    cut: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """retention M - c A B + (1 - retention) cut G, and the Frobenius norms of c A B and of M.

    Each tile of the product stays in registers until M and G have joined it. Norms are summed tile
    by tile, then over the tiles in their order: without atomics, the same bits every time.

    Args:
        momentum: M, shape (B, m, n), float32.
        grad: G, like ``momentum``.
        a: shape (B, m, k), of any strides below 2²⁴ in a matrix; converted to the type of ``b`` as
            it is read.
        b: shape (B, k, n), likewise; float16, bfloat16 or float32.
        coefficient: c of each matrix, shape (B,), float32.
        retention: one number.
        cut: the share of G that counts, shape (B,), float32.

    Returns:
        The new momentum, and the two norms, shape (B,).

    Cost: 2 m n k B FLOPs; at least 12 m n B bytes, and A and B once.
    """
    batch, m, n = momentum.shape
    momentum, grad = momentum.contiguous(), grad.contiguous()
    out = torch.empty_like(momentum)
    if not out.numel():
        return out, momentum.new_zeros(batch), momentum.new_zeros(batch)
    tile = erase_tile(a, b)
    slots = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    norms = momentum.new_empty(batch, 2, slots)
    if isinstance(retention, Tensor):
        retention = retention.to(momentum)
    else:
        retention = momentum.new_full((1,), retention)

    erase_kernel[(batch * slots,)](
        a, b, momentum, grad, coefficient, retention, (1 - retention) * cut, out, norms,
        batch, m, n, a.shape[-1], slots, *a.stride(), *b.stride(), **tile.options(),
    )  # fmt: skip
    erased, before = frobenius(norms.reshape(2 * batch, 1, slots)).reshape(batch, 2).unbind(1)
    return out, erased, before


def delta_write(
    momentum: Tensor,
    grad: Tensor,
    norm: Tensor,
    erasure: Tensor,
    rate: float,
    retention: float | Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One write of :class:`deepopt.memory.Delta`, with its products in ``dtype``.

    Keys are the gradient relative to its largest entry. Their Gram matrix, on the short side, is a
    symmetric product; it gives the norm, and where the matrix is tall it is half of the erase term,
    which is M (KᵀK) there and (M Kᵀ) K where it is wide. FLOPs per matrix: 5 m²n + m³ when it is
    wide, 3 mn² + n³ when it is tall; bytes: 52 mn and 44 mn.

    Rounded keys may exceed the norm by their rounding, 1 in 256. Erasing is stable up to twice it.

    Args:
        momentum: M, shape (B, m, n), float32.
        grad: G, like ``momentum``.
        norm: running norm of the gradient, shape (B,).
        erasure: running share of the momentum that a write erases, shape (B,).
        rate: eta of the erase term.
        retention: one number, in [0, 1].
        dtype: float16 (which sums of squares over 65504 overflow), bfloat16 or float32.

    Returns:
        The new momentum, norm and erasure, and the look-ahead.
    """
    info = torch.finfo(grad.dtype)
    scale = grad.abs().amax((-2, -1)).clamp_min(info.tiny)
    keys = divided(grad, scale, dtype)
    wide = grad.shape[-2] < grad.shape[-1]
    short = keys if wide else keys.mT
    gram = symmetric_product(short, short)
    power = symmetric_product(gram, gram, dtype=torch.float32)
    root = torch.linalg.matrix_norm(power).pow(0.25)
    counted = torch.minimum(scale, info.max / HEADROOM / root)
    cut, norm_now = counted / scale, root * counted
    norm = running_root(norm, norm_now, 0.1)
    # Keys are up to the root in size. In units of the power of two above it, no product leaves the
    # range, and none is rounded otherwise.
    unit = torch.exp2(2.0 * torch.frexp(root.clamp_min(1.0)).exponent)
    ratio = (counted / torch.maximum(norm, norm_now).clamp_min(info.tiny)).square()
    if wide:
        a, b = torch.bmm(divided(momentum, unit, dtype), keys.mT), keys
    else:
        a, b = momentum, gram / unit[:, None, None].to(dtype)
    out, erased, before = erase(momentum, grad, a, b, rate * ratio * unit, retention, cut)
    share = (erased / before.clamp_min(info.tiny)).clamp_max(rate)
    # What was erased is retention M + (1 - retention) cut G less the new momentum.
    gain = 1 + erasure / (1 - retention)
    shares = (2 * retention * gain, -(retention**2) * gain, (1 - retention) ** 2 * gain * cut)
    ahead = combine([out, momentum, grad], torch.stack(shares))
    return out, norm, erasure.lerp(share, 0.1), ahead
