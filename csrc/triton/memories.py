"""Hope's memories: a program for each head of each sequence, which goes from chunk to chunk.

The equations are those of docs/hope_chunks.md, and the names those of csrc/cpu/memories_forward.h
and memories_backward.h. A tile holds channels or features in its rows and tokens in its columns,
padded to powers of two. What is beyond the sizes is zero: a padded token has a key of zero and
rates of zero, so that it writes and forgets nothing.

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
def add_to(ptr, tile, rows, columns):
    """Adds to a matrix whose rows lie one after the other."""
    old = load(ptr, rows, columns, columns, tile.shape[0], tile.shape[1])
    tl.debug_barrier()  # all threads have read
    store(ptr, old + tile, rows, columns, columns)
    tl.debug_barrier()  # all threads have written


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
def features(h, floor):
    """f = n gelu(h), with the slopes of the gelu, and n."""
    share = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    u = h * share
    n = 1.0 / tl.sqrt(tl.sum(u * u, 0) + floor)
    return u * n[None, :], share + h * (tl.exp(-0.5 * h * h) * 0.3989422804014327), n


@triton.jit
def features_back(d, f, slope, n, d_n):
    """The gradient of h in f = n gelu(h), where n has a gradient of its own."""
    return slope * n[None, :] * (d - f * (tl.sum(f * d, 0) + n * d_n)[None, :])


@triton.jit
def unit(x):
    """Columns divided by their norms, and the reciprocals of the norms."""
    n = 1.0 / tl.sqrt(tl.sum(x * x, 0) + 1e-6)
    return x * n[None, :], n


@triton.jit
def unit_back(d, y, n):
    """The gradient of x in y = n x, a unit column."""
    return n[None, :] * (d - y * tl.sum(y * d, 0)[None, :])


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
        is_token = tl.arange(0, C) < count
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

        x_key = load(key_ptr + at, d, count, tokens, D, C)
        x_value = load(value_ptr + at, d, count, tokens, D, C)
        key, _, value, _, of_eta, of_alpha = generate(
            x_key, x_value, anchor_ptr, d, h, m, generator_floor, H, D
        )
        sig_eta, keep, sig_erase, sig_delta, log_alpha = set_rates(
            of_eta, of_alpha, gates_ptr, sharpness, d
        )
        half = tl.where(is_token, 0.5 + 0.5 * keep, 0.0)
        eta = max_eta * half * sig_eta
        erase = max_erase * half * tl.minimum(1.0, most_erase * sig_erase)
        delta = max_delta * half * tl.minimum(1.0, most_delta * sig_delta)
        kept, pulled, end, decay, log_end = times(log_alpha, is_token, C)
        similarity = decay * product(tl.trans(key), key)

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


# The way back, from the last chunk to the first. `d_` is for gradients of the outer loss.


@triton.jit
def decays_back(d, v):
    """The gradients of log b_{t-1} and, at the sources, of -log b_t from those of decayed v."""
    change = d * v
    return tl.sum(change, 0), tl.sum(change, 1)


@triton.jit
def carried_back(d, x, first, y, kept, pulled):
    """The gradients of x, first, y, kept and pulled in `carried`."""
    d_kept, d_pulled = tl.sum(d * product(x, y), 0), tl.sum(d * product(first, y), 0)
    of_x, of_first = kept[None, :] * d, pulled[None, :] * d
    d_y = product(tl.trans(x), of_x) + product(tl.trans(first), of_first)
    turned = tl.trans(y)
    return product(of_x, turned), product(of_first, turned), d_y, d_kept, d_pulled


@triton.jit
def read_back(d, x, first, key, written, query, kept, pulled, decay):
    """The gradients of a read, kept X q + pulled X_0 q + written mask."""
    mask = decay * product(tl.trans(key), query)
    d_x, d_first, d_query, d_kept, d_pulled = carried_back(d, x, first, query, kept, pulled)
    square = product(tl.trans(written), d)
    d_before, d_sources = decays_back(square, mask)
    square *= decay
    d_query += product(key, square)
    d_key = product(query, tl.trans(square))
    d_written = product(d, tl.trans(mask))
    return d_x, d_first, d_key, d_written, d_query, d_kept, d_pulled, d_before, d_sources


@triton.jit
def finish_back(d, x, first, written, y, end, log_end):
    """The gradients in `finish`; the last one is of log b_C, by way of b_C and of 1 - b_C."""
    seen = product(d, y)
    d_y = product(tl.trans(d), written * end[None, :])
    all_kept = tl.exp(log_end)
    d_log_end = all_kept * (tl.sum(d * x) - tl.sum(d * first))
    d_end = tl.sum(written * seen, 0)
    return all_kept * d, -expm1(log_end) * d, end[None, :] * seen, d_y, d_end, d_log_end


@triton.jit
def system_back(d, v, rate, decay):
    """The gradients of I + v diag(rate), which `d` is without its zeros: of the similarities, added
    to its transpose, of the rate and of the logarithms."""
    d = tl.where(decay > 0.0, d, 0.0)
    d_before, d_sources = decays_back(d, v * rate[None, :])
    d_rate = tl.sum(d * v, 0)
    d_similarity = d * rate[None, :] * decay
    return d_similarity + tl.trans(d_similarity), d_rate, d_before, d_sources


@triton.jit
def surprise_back(
    d_slope, d_scaled, d_f, w2, w1, key, value, eta, h, f, s, n, value_f, value_s, value_n, hat,
    hat_n, error, p, fp,
):  # fmt: skip
    """The gradients of w2, w1, key, value and eta from those of slope, scaled errors and f."""
    bend = tl.exp(-0.5 * h * h) * 0.3989422804014327 * (2.0 - h * h)
    y = p - f * fp[None, :]
    t = s * d_slope
    d_n = tl.sum(t * y, 0)
    fy = n * tl.sum(f * t, 0)
    d_y = n[None, :] * t
    direct = bend * n[None, :] * y * d_slope
    d_p = d_y - f * fy[None, :]
    d_f -= d_y * fp[None, :] + p * fy[None, :]
    d_w1 = product(error * eta[None, :], tl.trans(d_p))
    d_scaled += product(w1, d_p)
    d_error = eta[None, :] * d_scaled
    d_eta = tl.sum(d_scaled * error, 0)
    d_refined = unit_back(-d_error, hat, hat_n)
    d_w1 += product(d_error, tl.trans(f)) + product(d_refined, tl.trans(value_f))
    d_f += product(tl.trans(w1), d_error)
    d_value_f = product(tl.trans(w1), d_refined)
    d_h = features_back(d_f, f, s, n, d_n) + direct
    d_value_h = features_back(d_value_f, value_f, value_s, value_n, 0.0 * n)
    d_w2 = product(d_h, tl.trans(key)) + product(d_value_h, tl.trans(value))
    d_key = d_error + product(tl.trans(w2), d_h)
    d_value = d_refined + product(tl.trans(w2), d_value_h)
    return d_w2, d_w1, d_key, d_value, d_eta


@triton.jit
def recall_back(
    d, x, ptr, d_ptr, g, dim, h, m, floor, H: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """The gradient of x in `recall`; those of the weights are added at `d_ptr`."""
    w2 = load_w2(ptr, g, h, dim, h, H, D)
    f, slope, n = features(product(w2, x), floor)
    add_to(d_ptr + dim * (4 * h + m) + g * h * dim, product(d, tl.trans(f)), dim, h)
    d_f = product(tl.trans(load_w1(ptr, g, h, dim, h, m, H, D)), d)
    d_h = features_back(d_f, f, slope, n, 0.0 * n)
    add_to(d_ptr + g * h * dim, product(d_h, tl.trans(x)), h, dim)
    return d + product(tl.trans(w2), d_h)


@triton.jit
def share_back(d, most, share, sig):
    """The gradients of half, of the logit and of the range's logit in most half min(1, part)."""
    part = 1.1 * share * sig
    inside = tl.where(part > 1.0, 0.0, most * part * d)
    return most * tl.minimum(1.0, part) * d, inside * (1.0 - sig), inside * (1.0 - share)


@triton.jit
def release(d_running_ptr, d_anchor_ptr, g, rows, d, h, m, ROWS: tl.constexpr, D: tl.constexpr):
    """The anchor was the running weights: so are their gradients."""
    at2, at1 = g * h * d, d * (4 * h + m) + g * h * d
    old = load(d_anchor_ptr + at2, rows, d, d, ROWS, D)
    add_to(d_running_ptr + at2, old, rows, d)
    store(d_anchor_ptr + at2, 0.0 * old, rows, d, d)
    old = load(d_anchor_ptr + at1, d, rows, rows, D, ROWS)
    add_to(d_running_ptr + at1, old, d, rows)
    store(d_anchor_ptr + at1, 0.0 * old, d, rows, rows)


@triton.jit
def answer_back(
    d_out, query, key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end,
    floor, anchor_ptr, running_ptr, initial_ptr, d_anchor_ptr, d_running_ptr, d_initial_ptr,
    d, h, m, M: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The memory that answers once more, and the gradients of all that it was given."""
    anchor2 = load_w2(anchor_ptr, 4, m, d, h, M, D)
    anchor1 = load_w1(anchor_ptr, 4, m, d, h, m, M, D)
    hidden, f, s, n, value_f, value_s, v_n, hat, hat_n, error, p, fp, slope = surprise(
        anchor2, anchor1, key, value, eta, floor
    )
    w2 = load_w2(running_ptr, 4, m, d, h, M, D)
    first2 = load_w2(initial_ptr, 4, m, d, h, M, D)
    seen2 = carried(w2, first2, key, kept, pulled)
    inverse2 = invert(similarity * erase[None, :], C)
    written2 = product(-slope - erase[None, :] * seen2, inverse2)
    read = carried(w2, first2, query, kept, pulled)
    read += product(written2, decay * product(tl.trans(key), query))
    query_f, query_s, query_n = features(read, floor)
    w1 = load_w1(running_ptr, 4, m, d, h, m, M, D)
    first1 = load_w1(initial_ptr, 4, m, d, h, m, M, D)
    wanted = value - key - carried(w1, first1, f, kept, pulled)
    similarity1 = decay * product(tl.trans(f), f)
    inverse1 = invert(similarity1 * delta[None, :], C)
    written1 = product(delta[None, :] * wanted, inverse1)

    # Backward through W1, then W2, then the gradient at the anchor.
    d_next = load_w1(d_running_ptr, 4, m, d, h, m, M, D)
    d_w, d_first, d_f, d_written, d_query_f, d_kept, d_pulled, d_before, d_sources = read_back(
        d_out, w1, first1, f, written1, query_f, kept, pulled, decay
    )
    a_w, a_first, a_written, a_f, d_end, d_log_end = finish_back(
        d_next, w1, first1, written1, f, end, log_end
    )
    d_f += a_f
    d_right = product(d_written + a_written, tl.trans(inverse1))
    square, d_delta, a_before, a_sources = system_back(
        -product(tl.trans(written1), d_right), similarity1, delta, decay
    )
    d_before += a_before
    d_sources += a_sources
    d_f += product(f, square)
    d_delta += tl.sum(d_right * wanted, 0)
    change = delta[None, :] * d_right
    d_value, d_key = change, -change
    b_w, b_first, a_f, a_kept, a_pulled = carried_back(-change, w1, first1, f, kept, pulled)
    d_f += a_f
    d_kept += a_kept
    d_pulled += a_pulled
    at1 = d * (8 * h + m)
    add_to(d_initial_ptr + at1, d_first + a_first + b_first, d, m)
    store(d_running_ptr + at1, d_w + a_w + b_w, d, m, m)

    d_next = load_w2(d_running_ptr, 4, m, d, h, M, D)
    d_read = features_back(d_query_f, query_f, query_s, query_n, 0.0 * query_n)
    d_w, d_first, a_key, d_written, d_query, a_kept, a_pulled, a_before, a_sources = read_back(
        d_read, w2, first2, key, written2, query, kept, pulled, decay
    )
    d_query += d_out
    d_key += a_key
    d_kept += a_kept
    d_pulled += a_pulled
    d_before += a_before
    d_sources += a_sources
    a_w, a_first, a_written, a_key, a_end, a_log_end = finish_back(
        d_next, w2, first2, written2, key, end, log_end
    )
    d_key += a_key
    d_end += a_end
    d_log_end += a_log_end
    d_right = product(d_written + a_written, tl.trans(inverse2))
    square, d_erase, a_before, a_sources = system_back(
        -product(tl.trans(written2), d_right), similarity, erase, decay
    )
    d_before += a_before
    d_sources += a_sources
    d_key += product(key, square)
    d_erase -= tl.sum(d_right * seen2, 0)
    b_w, b_first, a_key, a_kept, a_pulled = carried_back(
        -erase[None, :] * d_right, w2, first2, key, kept, pulled
    )
    d_key += a_key
    d_kept += a_kept
    d_pulled += a_pulled
    at2 = 4 * h * d
    add_to(d_initial_ptr + at2, d_first + a_first + b_first, m, d)
    store(d_running_ptr + at2, d_w + a_w + b_w, m, d, d)
    d_w2, d_w1, a_key, a_value, d_eta = surprise_back(
        -d_right, 0.0 * error, d_f, anchor2, anchor1, key, value, eta, hidden, f, s, n, value_f,
        value_s, v_n, hat, hat_n, error, p, fp,
    )  # fmt: skip
    d_key += a_key
    d_value += a_value
    add_to(d_anchor_ptr + at2, d_w2, m, d)
    add_to(d_anchor_ptr + at1, d_w1, d, m)
    return (
        d_query, d_key, d_value, d_eta, d_erase, d_delta, d_kept, d_pulled, d_end, d_log_end,
        d_before, d_sources,
    )  # fmt: skip


@triton.jit
def learn_back(
    g, key, value, eta, inverse, kept, pulled, end, log_end, floor, anchor_ptr, running_ptr,
    initial_ptr, d_anchor_ptr, d_running_ptr, d_initial_ptr, d, h, m,
    H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Generating memory g once more, and the gradients of all that it was given but the inverse:
    of the triangular system in its place."""
    at2, at1 = g * h * d, d * (4 * h + m) + g * h * d
    anchor2 = load_w2(anchor_ptr, g, h, d, h, H, D)
    anchor1 = load_w1(anchor_ptr, g, h, d, h, m, H, D)
    hidden, f, s, n, value_f, value_s, v_n, hat, hat_n, error, p, fp, slope = surprise(
        anchor2, anchor1, key, value, eta, floor
    )
    w1 = load_w1(running_ptr, g, h, d, h, m, H, D)
    first1 = load_w1(initial_ptr, g, h, d, h, m, H, D)
    d_next = load_w1(d_running_ptr, g, h, d, h, m, H, D)
    d_w, d_first, d_written, d_f, d_end, d_log_end = finish_back(
        d_next, w1, first1, -error * eta[None, :], f, end, log_end
    )
    d_scaled = -d_written
    add_to(d_initial_ptr + at1, d_first, d, h)
    store(d_running_ptr + at1, d_w, d, h, h)

    w2 = load_w2(running_ptr, g, h, d, h, H, D)
    first2 = load_w2(initial_ptr, g, h, d, h, H, D)
    d_next = load_w2(d_running_ptr, g, h, d, h, H, D)
    seen2 = carried(w2, first2, key, kept, pulled)
    written2 = product(-slope - eta[None, :] * seen2, inverse)
    d_w, d_first, d_written, d_key, a_end, a_log_end = finish_back(
        d_next, w2, first2, written2, key, end, log_end
    )
    d_end += a_end
    d_log_end += a_log_end
    d_right = product(d_written, tl.trans(inverse))
    d_system = -product(tl.trans(written2), d_right)
    d_eta = -tl.sum(d_right * seen2, 0)
    b_w, b_first, a_key, d_kept, d_pulled = carried_back(
        -eta[None, :] * d_right, w2, first2, key, kept, pulled
    )
    d_key += a_key
    add_to(d_initial_ptr + at2, d_first + b_first, h, d)
    store(d_running_ptr + at2, d_w + b_w, h, d, d)
    d_w2, d_w1, a_key, d_value, a_eta = surprise_back(
        -d_right, d_scaled, d_f, anchor2, anchor1, key, value, eta, hidden, f, s, n,
        value_f, value_s, v_n, hat, hat_n, error, p, fp,
    )  # fmt: skip
    d_key += a_key
    d_eta += a_eta
    add_to(d_anchor_ptr + at2, d_w2, h, d)
    add_to(d_anchor_ptr + at1, d_w1, d, h)
    return d_key, d_value, d_eta, d_kept, d_pulled, d_end, d_log_end, d_system


@triton.jit
def memories_gradient_kernel(
    key_ptr, value_ptr, query_ptr, anchors_ptr, states_ptr, initial_ptr, gates_ptr, d_out_ptr,
    d_running_ptr, d_anchor_ptr, d_initial_ptr, d_gates_ptr, d_key_ptr, d_value_ptr, d_query_ptr,
    max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness,
    heads, tokens, d, h, m, segments, slots, projection_chunk, memory_chunk, period, position,
    D: tl.constexpr, H: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One head of one sequence. The gradients of the weights are where those of the end were."""
    pair = tl.program_id(0).to(tl.int64)
    size = 2 * d * (4 * h + m)
    key_ptr += pair * d * tokens
    value_ptr += pair * d * tokens
    query_ptr += pair * d * tokens
    d_key_ptr += pair * d * tokens
    d_value_ptr += pair * d * tokens
    d_query_ptr += pair * d * tokens
    d_out_ptr += pair * d * tokens
    anchors_ptr += pair * size
    states_ptr += pair * slots * size
    d_running_ptr += pair * size
    d_anchor_ptr += pair * size
    d_initial_ptr += pair * size
    d_gates_ptr += pair * 6
    initial_ptr += (pair % heads) * size
    gates_ptr += (pair % heads) * 6
    erase_share, delta_share = sigmoid(tl.load(gates_ptr + 4)), sigmoid(tl.load(gates_ptr + 5))
    d_bias_eta = 0.0 * erase_share
    d_bias_alpha, d_bias_erase, d_bias_delta = d_bias_eta, d_bias_eta, d_bias_eta
    d_range_erase, d_range_delta = d_bias_eta, d_bias_eta
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    stop = position + tokens
    for back in range(segments):
        n_segment = segments - 1 - back
        start = tl.maximum(
            (stop - 1) // projection_chunk * projection_chunk,
            (stop - 1) // memory_chunk * memory_chunk,
        )
        start = tl.maximum(start, position)
        count, at = stop - start, start - position
        is_token = tl.arange(0, C) < count
        running_ptr = states_ptr + n_segment.to(tl.int64) * size
        anchor_ptr = anchor_of(
            start, projection_chunk, anchors_ptr, states_ptr, size, slots, position,
            projection_chunk, memory_chunk, period,
        )  # fmt: skip
        memory_anchor_ptr = anchor_of(
            start, memory_chunk, anchors_ptr, states_ptr, size, slots, position,
            projection_chunk, memory_chunk, period,
        )  # fmt: skip

        # The chunk once more, as far as the generated keys, values and rates.
        x_key = load(key_ptr + at, d, count, tokens, D, C)
        x_value = load(value_ptr + at, d, count, tokens, D, C)
        key, key_n, value, value_n, of_eta, of_alpha = generate(
            x_key, x_value, anchor_ptr, d, h, m, generator_floor, H, D
        )
        sig_eta, keep, sig_erase, sig_delta, log_alpha = set_rates(
            of_eta, of_alpha, gates_ptr, sharpness, d
        )
        half = tl.where(is_token, 0.5 + 0.5 * keep, 0.0)
        eta = max_eta * half * sig_eta
        erase = max_erase * half * tl.minimum(1.0, 1.1 * erase_share * sig_erase)
        delta = max_delta * half * tl.minimum(1.0, 1.1 * delta_share * sig_delta)
        kept, pulled, end, decay, log_end = times(log_alpha, is_token, C)
        similarity = decay * product(tl.trans(key), key)

        query = load(query_ptr + at, d, count, tokens, D, C)
        d_out = load(d_out_ptr + at, d, count, tokens, D, C)
        (
            d_query, d_key, d_value, d_eta, d_erase, d_delta, d_kept, d_pulled, d_end, d_log_end,
            d_before, d_sources,
        ) = answer_back(
            d_out, query, key, value, eta, erase, delta, similarity, kept, pulled, end, decay,
            log_end, memory_floor, memory_anchor_ptr, running_ptr, initial_ptr, d_anchor_ptr,
            d_running_ptr, d_initial_ptr, d, h, m, M, D, C,
        )  # fmt: skip
        store(d_query_ptr + at, d_query, d, count, tokens)
        inverse = invert(similarity * eta[None, :], C)
        d_system = 0.0 * similarity
        for g in range(4):
            a_key, a_value, a_eta, a_kept, a_pulled, a_end, a_log_end, a_system = learn_back(
                g, key, value, eta, inverse, kept, pulled, end, log_end, generator_floor,
                anchor_ptr, running_ptr, initial_ptr, d_anchor_ptr, d_running_ptr, d_initial_ptr,
                d, h, m, H, D,
            )  # fmt: skip
            d_key += a_key
            d_value += a_value
            d_eta += a_eta
            d_kept += a_kept
            d_pulled += a_pulled
            d_end += a_end
            d_log_end += a_log_end
            d_system += a_system
        square, a_eta, a_before, a_sources = system_back(d_system, similarity, eta, decay)
        d_key += product(key, square)
        d_eta += a_eta
        d_before += a_before
        d_sources += a_sources

        # Logarithms of the b, and with them the rates. log b_t is a sum over all before it.
        d_before += kept * (d_kept - d_pulled)
        d_log_end += tl.sum(end * d_end, 0)
        d_log_b = tl.sum(tl.where(i > j, d_before[:, None], 0.0), 0)
        d_log_b -= tl.sum(tl.where(i >= j, (end * d_end)[:, None], 0.0), 0)
        d_log_b -= tl.sum(tl.where(i >= j, d_sources[:, None], 0.0), 0)
        d_log_b = tl.where(is_token, d_log_b + d_log_end, 0.0)
        d_eta, d_erase, d_delta = (
            tl.where(is_token, d_eta, 0.0), tl.where(is_token, d_erase, 0.0),
            tl.where(is_token, d_delta, 0.0),
        )  # fmt: skip
        d_half = max_eta * sig_eta * d_eta
        d_eta *= eta * (1.0 - sig_eta)
        a_half, d_erase, d_range = share_back(d_erase, max_erase, erase_share, sig_erase)
        d_half += a_half
        d_erase *= half
        d_range_erase += tl.sum(half * d_range, 0)
        a_half, d_delta, d_range = share_back(d_delta, max_delta, delta_share, sig_delta)
        d_half += a_half
        d_delta *= half
        d_range_delta += tl.sum(half * d_range, 0)
        d_keep = d_half * keep * (0.5 - 0.5 * keep) + d_log_b * (1.0 - keep)
        d_bias_eta += tl.sum(d_eta, 0)
        d_bias_alpha += tl.sum(d_keep, 0)
        d_bias_erase += tl.sum(d_erase, 0)
        d_bias_delta += tl.sum(d_delta, 0)

        # Eq 83 back.
        to_eta, to_kept, to_erase, to_delta = channels(d, of_alpha)
        d_eta_made = to_eta * d_eta[None, :]
        d_alpha_made = to_kept * d_keep[None, :] + sharpness * (
            to_erase * d_erase[None, :] + to_delta * d_delta[None, :]
        )
        d_x = recall_back(
            unit_back(d_value, value, value_n), x_value, anchor_ptr, d_anchor_ptr, 1, d, h, m,
            generator_floor, H, D,
        )  # fmt: skip
        store(d_value_ptr + at, d_x, d, count, tokens)
        d_made = unit_back(d_key, key, key_n)
        d_x = recall_back(
            d_made, x_key, anchor_ptr, d_anchor_ptr, 0, d, h, m, generator_floor, H, D
        )
        d_x += recall_back(
            d_eta_made, x_key, anchor_ptr, d_anchor_ptr, 2, d, h, m, generator_floor, H, D
        )
        d_x += recall_back(
            d_alpha_made, x_key, anchor_ptr, d_anchor_ptr, 3, d, h, m, generator_floor, H, D
        )
        store(d_key_ptr + at, d_x, d, count, tokens)
        tl.debug_barrier()  # all threads have written what all will read
        if start % projection_chunk == 0:
            for g in range(4):
                release(d_running_ptr, d_anchor_ptr, g, h, d, h, m, H, D)
        if start % memory_chunk == 0:
            release(d_running_ptr, d_anchor_ptr, 4, m, d, h, m, M, D)
        tl.debug_barrier()
        stop = start
    tl.store(d_gates_ptr, d_bias_eta)
    tl.store(d_gates_ptr + 1, d_bias_alpha)
    tl.store(d_gates_ptr + 2, d_bias_erase)
    tl.store(d_gates_ptr + 3, d_bias_delta)
    tl.store(d_gates_ptr + 4, d_range_erase)
    tl.store(d_gates_ptr + 5, d_range_delta)


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


def memories_gradient(grads: Sequence[Tensor], starts: Tensor, given: Any) -> list[Tensor]:
    """`deepopt.hope.fused.memories_gradient`, in one launch."""
    weights = [*given[3:5], *given[7:9]]
    ends = [
        grad if grad.numel() else torch.zeros_like(x)
        for grad, x in zip(grads, (given.key, *given[3:11]), strict=True)
    ]
    # The kernel works in place, from the gradients of the ends to those of the starts.
    d_running, d_anchor = packed((*ends[1:3], *ends[5:7])), packed((*ends[3:5], *ends[7:9]))
    d_initial = torch.zeros_like(d_running)
    d_gates = d_running.new_empty(*d_running.shape[:2], 6)
    inputs = [x.contiguous() for x in given[:3]]
    d_inputs = [torch.empty_like(x) for x in inputs]
    if d_running.numel():
        memories_gradient_kernel[(d_running.shape[0] * d_running.shape[1],)](
            *inputs, packed((*given[5:7], *given[9:11])), starts.contiguous(), initial(given),
            given.gates.contiguous(), ends[0].contiguous(), d_running, d_anchor, d_initial, d_gates,
            *d_inputs, *given[16:22], slots=len(given.segments), **sizes(given), **options(given),
        )  # fmt: skip
    running, anchor = unpacked(d_running, weights), unpacked(d_anchor, weights)
    d_states = [*running[:2], *anchor[:2], *running[2:], *anchor[2:]]
    return [*d_inputs, *d_states, *unpacked(d_initial.sum(0), weights), d_gates.sum(0)]
