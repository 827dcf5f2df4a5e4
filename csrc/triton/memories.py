"""Hope's memories: a program for each head of each sequence, which goes from chunk to chunk.

The equations are those of docs/hope_chunks.md. What csrc/cpu/memories_forward.h does too mostly has
its name there. A tile holds channels or features in its rows and tokens in its columns, padded to
powers of two.
What is beyond the sizes is zero: a padded token has a key of zero and rates of zero, so that it
writes and forgets nothing. memories_gradient.py has the backward pass.

Between chunks the weights lie in global memory, each state in a slot of its own. So a program reads
what it wrote before, but never writes where it may still be read. The four generating memories are
a loop, and all matrices that erase are solved alike.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.triton.tiles import FUSED


@triton.jit
def product(a, b):
    """A B as three products in tf32 by the matrix units, together as near as one in float32."""
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=a.dtype)


@triton.jit
def load(ptr, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile that holds `rows` times `columns` numbers, padded with zeros."""
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + i * stride + j, (i < rows) & (j < columns), 0.0)


@triton.jit
def store(ptr, tile, rows, columns, stride):
    """Writes the `rows` times `columns` numbers of a tile, without its padding."""
    i, j = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tl.store(ptr + i * stride + j, tile, (i < rows) & (j < columns))


@triton.jit
def expm1(x):
    """exp(x) - 1 of what is at most 0."""
    near = tl.maximum(x, -0.5)
    term = near
    total = near
    for i in tl.static_range(2, 16):
        term = term * near / i
        total += term
    return tl.where(x < -0.5, tl.exp(x) - 1.0, total)


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + exp(-|x|)), whose logarithm is 2 atanh(e / (2 + e))."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    total = s * 0.0
    for i in tl.static_range(17):
        total = total * s * s + 1.0 / (33 - 2 * i)
    return tl.minimum(x, 0.0) - 2.0 * s * total


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def at_most_1(x):
    """As torch's clamp: not a number stays what it is."""
    return tl.where(x > 1.0, 1.0, x)


@triton.jit
def features(h, floor):
    """f = n gelu(h), with the slopes of the gelu, and n."""
    share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    u = h * share
    n = 1.0 / tl.sqrt(tl.sum(u * u, 0) + floor)
    return u * n[None, :], share + h * (tl.exp(-0.5 * h * h) * 0.3989422804014327), n


@triton.jit
def unit(x):
    """Columns divided by their norms, and the reciprocals of the norms."""
    n = 1.0 / tl.sqrt(tl.sum(x * x, 0) + 1e-6)
    return x * n[None, :], n


# Which tokens a segment has, and which states its anchors are.


@triton.jit
def index_of(at, position, projection_chunk, memory_chunk, period):
    """The number of the segment that begins at `at`: how many chunks have begun since."""
    first = at // projection_chunk - position // projection_chunk
    second = at // memory_chunk - position // memory_chunk
    return first + second - (at // period - position // period)


@triton.jit
def anchor_of(
    start, chunk, anchors_ptr, states_ptr, size, slots, position, projection_chunk, memory_chunk,
    period,
):  # fmt: skip
    """Where the state at the start of this chunk lies, which is the anchor (Eq 90).

    If the chunk began before `position`, it is the anchor that the caller gave.
    """
    begin = start // chunk * chunk
    n = index_of(tl.maximum(begin, position), position, projection_chunk, memory_chunk, period)
    place = states_ptr + (n % slots).to(tl.int64) * size
    if begin < position:
        place = anchors_ptr
    return place


@triton.jit
def load_w2(ptr, g, rows, d, h, ROWS: tl.constexpr, D: tl.constexpr):
    """W2 of memory g in a state, which holds all W2 and then all W1."""
    return load(ptr + g * h * d, rows, d, d, ROWS, D)


@triton.jit
def load_w1(ptr, g, rows, d, h, m, ROWS: tl.constexpr, D: tl.constexpr):
    """W1 of memory g in a state."""
    return load(ptr + d * (4 * h + m) + g * h * d, d, rows, rows, D, ROWS)


# What happens in a chunk.


@triton.jit
def recall(x, ptr, g, d, h, m, floor, H: tl.constexpr, D: tl.constexpr):
    """M(x) of a generating memory."""
    f, _, _ = features(product(load_w2(ptr, g, h, d, h, H, D), x), floor)
    return x + product(load_w1(ptr, g, h, d, h, m, H, D), f)


@triton.jit
def generate(x_key, x_value, ptr, d, h, m, floor, H: tl.constexpr, D: tl.constexpr):
    """Eq 83: keys and values with what they were divided by, channels of eta and of alpha."""
    key, key_n = unit(recall(x_key, ptr, 0, d, h, m, floor, H, D))
    value, value_n = unit(recall(x_value, ptr, 1, d, h, m, floor, H, D))
    eta = recall(x_key, ptr, 2, d, h, m, floor, H, D)
    return key, key_n, value, value_n, eta, recall(x_key, ptr, 3, d, h, m, floor, H, D)


@triton.jit
def channels(d, like):
    """Weights that pool the channels of eta, and of each share of those of alpha."""
    i = tl.arange(0, like.shape[0])[:, None]
    third = d // 3
    kept = d - 2 * third
    one = 1.0 / tl.sqrt(d.to(like.dtype))
    of_kept = tl.where(i < kept, 1.0 / tl.sqrt(kept.to(like.dtype)), 0.0)
    of_third = 1.0 / tl.sqrt(third.to(like.dtype))
    of_erase = tl.where((i >= kept) & (i < kept + third), of_third, 0.0)
    of_delta = tl.where((i >= kept + third) & (i < d), of_third, 0.0)
    return tl.where(i < d, one, 0.0), of_kept, of_erase, of_delta


@triton.jit
def set_rates(eta, alpha, gates_ptr, sharpness, d):
    """The sigmoids of eta, retention and erasures, and the logarithm of the retention."""
    of_eta, of_kept, of_erase, of_delta = channels(d, alpha)
    retention = tl.sum(of_kept * alpha, 0) + tl.load(gates_ptr + 1)
    sig_eta = sigmoid(tl.sum(of_eta * eta, 0) + tl.load(gates_ptr))
    sig_erase = sigmoid(sharpness * tl.sum(of_erase * alpha, 0) + tl.load(gates_ptr + 2))
    sig_delta = sigmoid(sharpness * tl.sum(of_delta * alpha, 0) + tl.load(gates_ptr + 3))
    return sig_eta, sigmoid(retention), sig_erase, sig_delta, log_sigmoid(retention)


@triton.jit
def times(log_alpha, is_token, C: tl.constexpr):
    """b_{t-1}, 1 - b_{t-1}, b_C / b_t, the ratios of decayed similarities, and log b_C."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    log_alpha = tl.where(is_token, log_alpha, 0.0)
    # `after` of one token and `before` of the next have the same terms, padded with zeros, so that
    # both are rounded to the same number.
    after = tl.sum(tl.where(i <= j, log_alpha[:, None], 0.0), 0)
    before = tl.sum(tl.where(i < j, log_alpha[:, None], 0.0), 0)
    sources = tl.sum(tl.where(i >= j, log_alpha[None, :], 0.0), 1)
    log_end = tl.sum(log_alpha, 0)
    kept = tl.where(is_token, tl.exp(before), 0.0)
    pulled = tl.where(is_token, -expm1(before), 0.0)
    end = tl.where(is_token, tl.exp(tl.minimum(log_end - after, 0.0)), 0.0)
    past = tl.minimum(before[None, :] - sources[:, None], 0.0)
    return kept, pulled, end, tl.where(i < j, tl.exp(past), 0.0), log_end


@triton.jit
def surprise(w2, w1, key, value, eta, floor):
    """The gradient at the anchor, factored: `scaled` is the error, `slope` its gradient in W2 k."""
    h = product(w2, key)
    f, s, n = features(h, floor)
    value_f, value_s, value_n = features(product(w2, value), floor)
    hat, hat_n = unit(value + product(w1, value_f))
    error = key + product(w1, f) - hat
    p = product(tl.trans(w1), error * eta[None, :])
    fp = tl.sum(f * p, 0)
    slope = s * n[None, :] * (p - f * fp[None, :])
    return h, f, s, n, value_f, value_s, value_n, hat, hat_n, error, p, fp, slope


@triton.jit
def invert(system, C: tl.constexpr):
    """(I + U)^-1 of what is above the diagonal, from its last row up.

    Doubling the series of U would need fewer steps, but its powers may be huge: for equal keys that
    are erased twice they reach 3^C, where the entries of the inverse are at most 2.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    turned = tl.trans(system)
    inverse = tl.where(i == j, 1.0, 0.0).to(system.dtype)
    for back in range(C):
        row = C - 1 - back
        factors = tl.sum(tl.where(j == row, turned, 0.0), 1)
        known = tl.sum(factors[:, None] * inverse, 0)
        inverse = tl.where(i == row, inverse - known[None, :], inverse)
    return inverse


@triton.jit
def carried(x, first, y, kept, pulled):
    """The part of X_{t-1} y_t that comes from the weights at the start of the chunk."""
    return kept[None, :] * product(x, y) + pulled[None, :] * product(first, y)


@triton.jit
def finish(x, first, written, y, end, log_end):
    """The matrix at the end of the chunk."""
    columns = product(written * end[None, :], tl.trans(y))
    return tl.exp(log_end) * x - expm1(log_end) * first + columns


@triton.jit
def answer(
    query, key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end, floor,
    anchor_ptr, running_ptr, initial_ptr, next_ptr, d, h, m,
    M: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """o_t = M_{t-1}(q_t) of mem, and its weights at the end of the chunk."""
    w2 = load_w2(anchor_ptr, 4, m, d, h, M, D)
    w1 = load_w1(anchor_ptr, 4, m, d, h, m, M, D)
    _, f, _, _, _, _, _, _, _, _, _, _, slope = surprise(w2, w1, key, value, eta, floor)
    w2 = load_w2(running_ptr, 4, m, d, h, M, D)
    first = load_w2(initial_ptr, 4, m, d, h, M, D)
    right = -slope - erase[None, :] * carried(w2, first, key, kept, pulled)
    written = product(right, invert(similarity * erase[None, :], C))
    read = carried(w2, first, query, kept, pulled)
    read += product(written, decay * product(tl.trans(key), query))
    after = finish(w2, first, written, key, end, log_end)
    store(next_ptr + 4 * h * d, after, m, d, d)
    query_f, _, _ = features(read, floor)
    w1 = load_w1(running_ptr, 4, m, d, h, m, M, D)
    first = load_w1(initial_ptr, 4, m, d, h, m, M, D)
    right = delta[None, :] * (value - key - carried(w1, first, f, kept, pulled))
    system = decay * product(tl.trans(f), f) * delta[None, :]
    written = product(right, invert(system, C))
    read = query + carried(w1, first, query_f, kept, pulled)
    read += product(written, decay * product(tl.trans(f), query_f))
    after = finish(w1, first, written, f, end, log_end)
    store(next_ptr + d * (8 * h + m), after, d, m, m)
    return read


@triton.jit
def learn(
    g, key, value, eta, inverse, kept, pulled, end, log_end, floor,
    anchor_ptr, running_ptr, initial_ptr, next_ptr, d, h, m, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The weights of generating memory g at the end of the chunk."""
    w2 = load_w2(anchor_ptr, g, h, d, h, H, D)
    w1 = load_w1(anchor_ptr, g, h, d, h, m, H, D)
    _, f, _, _, _, _, _, _, _, error, _, _, slope = surprise(w2, w1, key, value, eta, floor)
    w2 = load_w2(running_ptr, g, h, d, h, H, D)
    first = load_w2(initial_ptr, g, h, d, h, H, D)
    right = -slope - eta[None, :] * carried(w2, first, key, kept, pulled)
    after = finish(w2, first, product(right, inverse), key, end, log_end)
    store(next_ptr + g * h * d, after, h, d, d)
    w1 = load_w1(running_ptr, g, h, d, h, m, H, D)
    first = load_w1(initial_ptr, g, h, d, h, m, H, D)
    after = finish(w1, first, -error * eta[None, :], f, end, log_end)
    store(next_ptr + d * (4 * h + m) + g * h * d, after, d, h, h)


@triton.jit
def chunk_inputs(
    key_ptr, value_ptr, count, tokens, anchor_ptr, gates_ptr,
    max_eta, max_erase, max_delta, most_erase, most_delta, floor, sharpness, d, h, m,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What all memories of a chunk need: keys, values, rates, and how much of what was there is
    left at each token. The gradient also needs what these were made from."""
    x_key = load(key_ptr, d, count, tokens, D, C)
    x_value = load(value_ptr, d, count, tokens, D, C)
    key, key_n, value, value_n, of_eta, of_alpha = generate(
        x_key, x_value, anchor_ptr, d, h, m, floor, H, D
    )
    sig_eta, keep, sig_erase, sig_delta, log_alpha = set_rates(
        of_eta, of_alpha, gates_ptr, sharpness, d
    )
    is_token = tl.arange(0, C) < count
    half = tl.where(is_token, 0.5 + 0.5 * keep, 0.0)
    eta = max_eta * half * sig_eta
    erase = max_erase * half * at_most_1(most_erase * sig_erase)
    delta = max_delta * half * at_most_1(most_delta * sig_delta)
    kept, pulled, end, decay, log_end = times(log_alpha, is_token, C)
    similarity = decay * product(tl.trans(key), key)
    return (
        key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end,
        x_key, x_value, key_n, value_n, sig_eta, keep, sig_erase, sig_delta, half,
    )  # fmt: skip


@triton.jit
def memories_kernel(
    key_ptr, value_ptr, query_ptr, anchors_ptr, states_ptr, ends_ptr, initial_ptr, gates_ptr,
    out_ptr,
    max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness,
    heads, tokens, d, h, m, segments, slots, projection_chunk, memory_chunk, period, position,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One head of one sequence."""
    pair = tl.program_id(0).to(tl.int64)
    size = 2 * d * (4 * h + m)
    key_ptr += pair * d * tokens
    value_ptr += pair * d * tokens
    query_ptr += pair * d * tokens
    out_ptr += pair * d * tokens
    anchors_ptr += pair * size
    ends_ptr += pair * size
    states_ptr += pair * slots * size
    initial_ptr += (pair % heads) * size
    gates_ptr += (pair % heads) * 6
    most_erase = 1.1 * sigmoid(tl.load(gates_ptr + 4))
    most_delta = 1.1 * sigmoid(tl.load(gates_ptr + 5))
    start = position
    for n in range(segments):
        stop = tl.minimum(
            (start // projection_chunk + 1) * projection_chunk,
            (start // memory_chunk + 1) * memory_chunk,
        )
        stop = tl.minimum(stop, position + tokens)
        count, at = stop - start, start - position
        running_ptr = states_ptr + (n % slots).to(tl.int64) * size
        next_ptr = states_ptr + ((n + 1) % slots).to(tl.int64) * size
        if n + 1 == segments:
            next_ptr = ends_ptr
        anchor_ptr = anchor_of(
            start, projection_chunk, anchors_ptr, states_ptr, size, slots, position,
            projection_chunk, memory_chunk, period,
        )  # fmt: skip
        memory_anchor_ptr = anchor_of(
            start, memory_chunk, anchors_ptr, states_ptr, size, slots, position,
            projection_chunk, memory_chunk, period,
        )  # fmt: skip

        (
            key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end,
            _, _, _, _, _, _, _, _, _,
        ) = chunk_inputs(
            key_ptr + at, value_ptr + at, count, tokens, anchor_ptr, gates_ptr, max_eta, max_erase,
            max_delta, most_erase, most_delta, generator_floor, sharpness, d, h, m, H, D, C,
        )  # fmt: skip
        query = load(query_ptr + at, d, count, tokens, D, C)
        read = answer(
            query, key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end,
            memory_floor, memory_anchor_ptr, running_ptr, initial_ptr, next_ptr, d, h, m, M, D, C,
        )  # fmt: skip
        store(out_ptr + at, read, d, count, tokens)
        inverse = invert(similarity * eta[None, :], C)
        for g in range(4):
            learn(
                g, key, value, eta, inverse, kept, pulled, end, log_end, generator_floor,
                anchor_ptr, running_ptr, initial_ptr, next_ptr, d, h, m, H, D,
            )  # fmt: skip
        tl.debug_barrier()  # all threads have written what all will read
        start = stop


# Packing: a state is all W2 and then all W1, those of mem after the others.


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor (..., state) of the w2 and w1 of the generating memories and of the other one."""
    w2, w1, memory_w2, memory_w1 = (x.flatten(-3) for x in tensors)
    return torch.cat([w2, memory_w2, w1, memory_w1], -1)


def unpacked(state: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The four tensors of a packed state; `like` has the shapes of their last three dimensions."""
    w2, w1, memory_w2, memory_w1 = (x.shape[-3:] for x in like)
    sizes = [math.prod(shape) for shape in (w2, memory_w2, w1, memory_w1)]
    a, c, b, d = state.split(sizes, -1)
    shapes = zip((a, b, c, d), (w2, w1, memory_w2, memory_w1), strict=True)
    return [
        x.unflatten(-1, shape).clone(memory_format=torch.contiguous_format) for x, shape in shapes
    ]


def anchors(given: Any) -> Iterator[tuple[int, int]]:
    """The segments in which the anchors of a segment were set, or -1, for each in turn."""
    at, generators, memory = given.position, -1, -1
    for n, length in enumerate(given.segments):
        generators = n if at % given.projection_chunk == 0 else generators
        memory = n if at % given.memory_chunk == 0 else memory
        at += length
        yield generators, memory


def sizes(given: Any) -> dict[str, int]:
    """The keyword arguments of both kernels."""
    chunks = given.projection_chunk, given.memory_chunk
    d, h, m = given.key.shape[2], given.w2.shape[3], given.memory_w2.shape[3]
    blocks = {"D": d, "H": h, "M": m, "C": max(given.segments)}
    return {
        "heads": given.key.shape[1], "tokens": given.key.shape[3], "d": d, "h": h, "m": m,
        "segments": len(given.segments), "projection_chunk": chunks[0], "memory_chunk": chunks[1],
        "period": math.lcm(*chunks), "position": given.position,
        **{name: max(16, triton.next_power_of_2(n)) for name, n in blocks.items()},
    }  # fmt: skip


LARGEST = {"D": 32, "H": 64, "M": 64, "C": 32}
"""Channels, hidden widths and tokens of a segment: what larger tiles need was not looked at."""


def fits(given: Any) -> bool:
    """Whether the kernels are written for memories of these sizes."""
    d, h, m = given.key.shape[2], given.w2.shape[3], given.memory_w2.shape[3]
    if d < 3 or 0 in (h, m, given.key.shape[3]):
        return False
    return all(size <= LARGEST.get(name, size) for name, size in sizes(given).items())


def options(given: Any) -> dict[str, Any]:
    """How both kernels are launched."""
    return {"num_warps": 4, "num_stages": 1, **FUSED}


def initial(given: Any) -> Tensor:
    """Where retention pulls, (heads, state)."""
    if given.initial_w2 is not None:
        return packed(given[11:15])
    return torch.zeros_like(packed([x[0] for x in (*given[3:5], *given[7:9])]))


def memories(keep: bool, given: Any) -> list[Tensor]:
    """`deepopt.hope.fused.memories`, in one launch."""
    start = packed((*given[3:5], *given[7:9]))
    anchor = packed((*given[5:7], *given[9:11]))
    set_in = list(anchors(given))
    slots = len(set_in)
    if not keep:  # a state is needed until the last segment of which it is the anchor, and the next
        ages = [n - first for n, pair in enumerate(set_in) for first in pair if first >= 0]
        slots = min(slots, max(ages, default=0) + 2)
    states = start.new_empty(*start.shape[:2], slots, start.shape[2])
    states[:, :, 0] = start
    ends, out = torch.empty_like(start), torch.empty_like(given.key).contiguous()
    inputs = [x.contiguous() for x in given[:3]]
    if start.numel():
        memories_kernel[(start.shape[0] * start.shape[1],)](
            *inputs, anchor, states, ends, initial(given), given.gates.contiguous(), out,
            *given[16:22], slots=slots, **sizes(given), **options(given),
        )  # fmt: skip

    def end_anchor(first: int) -> Tensor:
        return anchor if first < 0 else states[:, :, first % slots]

    generators = unpacked(end_anchor(set_in[-1][0]), [*given[3:5], *given[7:9]])
    memory = unpacked(end_anchor(set_in[-1][1]), [*given[3:5], *given[7:9]])
    found = unpacked(ends, [*given[3:5], *given[7:9]])
    starts = states.flatten(2) if keep else start.new_empty(*start.shape[:2], 0)
    return [out, *found[:2], *generators[:2], *found[2:], *memory[2:], starts]
