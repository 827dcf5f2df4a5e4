"""The backward pass of Hope's memories: a program for each head of each sequence, back to front.

The kernel goes from the last chunk to the first, from the gradients of the end to those of the
start. It computes each chunk once more from the weights at its start, which the forward kernel of
memories.py kept. What csrc/cpu/memories_backward.h does too mostly has its name there; `d_` is for
gradients of the outer loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepopt.ops.triton.memories import (
    anchor_of,
    at_most_1,
    carried,
    channels,
    chunk_inputs,
    expm1,
    features,
    initial,
    invert,
    load,
    load_w1,
    load_w2,
    options,
    packed,
    product,
    sigmoid,
    sizes,
    store,
    surprise,
    unpacked,
)


@triton.jit
def add_to(ptr, tile, rows, columns):
    """Adds to a matrix whose rows lie one after the other."""
    old = load(ptr, rows, columns, columns, tile.shape[0], tile.shape[1])
    tl.debug_barrier()  # all threads have read
    store(ptr, old + tile, rows, columns, columns)
    tl.debug_barrier()  # all threads have written


@triton.jit
def features_back(d, f, slope, n, d_n):
    """The gradient of h in f = n gelu(h), where n has a gradient of its own."""
    return slope * n[None, :] * (d - f * (tl.sum(f * d, 0) + n * d_n)[None, :])


@triton.jit
def unit_back(d, y, n):
    """The gradient of x in y = n x, a unit column."""
    return n[None, :] * (d - y * tl.sum(y * d, 0)[None, :])


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
    return most * at_most_1(part) * d, inside * (1.0 - sig), inside * (1.0 - share)


@triton.jit
def merge_anchor_gradient(
    d_running_ptr, d_anchor_ptr, g, rows, d, h, m, ROWS: tl.constexpr, D: tl.constexpr
):
    """A chunk begins here, where the anchor became a copy of the running weights: its gradient is
    added to theirs."""
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
        (
            key, value, eta, erase, delta, similarity, kept, pulled, end, decay, log_end,
            x_key, x_value, key_n, value_n, sig_eta, keep, sig_erase, sig_delta, half,
        ) = chunk_inputs(
            key_ptr + at, value_ptr + at, count, tokens, anchor_ptr, gates_ptr, max_eta, max_erase,
            max_delta, 1.1 * erase_share, 1.1 * delta_share, generator_floor, sharpness, d, h, m,
            H, D, C,
        )  # fmt: skip
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
        to_eta, to_kept, to_erase, to_delta = channels(d, key)
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
                merge_anchor_gradient(d_running_ptr, d_anchor_ptr, g, h, d, h, m, H, D)
        if start % memory_chunk == 0:
            merge_anchor_gradient(d_running_ptr, d_anchor_ptr, 4, m, d, h, m, M, D)
        tl.debug_barrier()
        stop = start
    tl.store(d_gates_ptr, d_bias_eta)
    tl.store(d_gates_ptr + 1, d_bias_alpha)
    tl.store(d_gates_ptr + 2, d_bias_erase)
    tl.store(d_gates_ptr + 3, d_bias_delta)
    tl.store(d_gates_ptr + 4, d_range_erase)
    tl.store(d_gates_ptr + 5, d_range_delta)


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
