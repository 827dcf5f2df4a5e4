"""Self-modifying memories, a chunk at a time: `deepopt.hope.memory` in matrix products.

With the gradients of a chunk taken at one anchor, a matrix is a linear recurrence with rank-one
erasures inside the chunk. What is erased solves a unit triangular system of the chunk's keys, and a
read is a masked product of C x C matrices. docs/hope_chunks.md derives it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepopt.hope.memory import (
    Form,
    Gates,
    Generated,
    Initial,
    Inputs,
    MemoryState,
    Weights,
    erasures,
    generate,
    unit,
)


def self_modifying(
    inputs: Inputs,
    generators: MemoryState,
    memory: MemoryState,
    initial: Initial,
    gates: Gates,
    form: Form,
    *,
    position: int = 0,
    valid: Tensor | None = None,
) -> tuple[Tensor, MemoryState, MemoryState]:
    """Reads and writes of all memories over some tokens, chunk by chunk.

    This is Eq 83, Eq 84, Eq 85, Eq 86, Eq 87, Eq 88, Eq 89 and Eq 91, with the anchor of Eq 90.

    The anchor, at which `_surprise` takes all gradients of a chunk, moves to the running weights at
    the start of the next one (Eq 90; the printed one lies in the future, E29 of docs/paper.md).

    Args:
        inputs: what the memories see, (batch, heads, d, tokens) each.
        generators: state of the four generating memories, in the order of `GENERATORS`.
        memory: state of mem, the memory that answers the queries (a stack of one).
        initial: where retention pulls the weights of all five.
        gates: parameters of the rates.
        form: the arithmetic of the memories.
        position: tokens that the states have seen; decides where the chunks end.
        valid: (batch, 1, tokens), False where a token is padding: it counts for `position`, but
            leaves both states as they are, and its output means nothing; a chunk that begins with
            padding goes on from the anchor before it. None for no padding.

    Returns:
        the outputs o_t (batch, heads, d, tokens) and the two states after the last token.
    """
    chunks = (form.projection_chunk, form.memory_chunk)
    outputs, start = [], 0
    for length in segments(inputs.query.shape[-1], chunks, position):
        piece = slice(start, start + length)
        seen = Inputs(*(x[..., piece] for x in inputs))
        now = None if valid is None else valid[..., piece]
        begins = None if now is None else now[:, 0, 0]
        if (position + start) % form.projection_chunk == 0:
            generators = generators.anchored(begins)
        if (position + start) % form.memory_chunk == 0:
            memory = memory.anchored(begins)
        tokens = generate(seen, generators.anchor_w2, generators.anchor_w1, gates, form, now)
        times = _chunk_weights(tokens.log_alpha, gates.theta, now)
        generating = _write(generators, initial.generators, tokens, times, form, generating=True)
        answering = _write(memory, initial.memory, tokens, times, form, generating=False)
        outputs.append(answering.read(seen.query, form.memory_floor))
        generators, memory = generating.after(generators), answering.after(memory)
        start += length
    return torch.cat(outputs, -1), generators, memory


class _ChunkWeights(NamedTuple):
    """Weights, at the times t = 0..C of a chunk, of what was there and of what tokens write.

    Attributes:
        kept: weight b_t = alpha_1 ... alpha_t of X_s, X at the chunk's start, (..., C + 1).
        pulled: weight 1 - b_t of the initial weights X_0, (..., C + 1).
        written: weight b_t / b_j of a column that token j writes or erases, (..., C, C + 1).
        summed: weight of S_s in X_t, (..., C + 1); None without momentum.
        passed: weight of token j's gradient in X_t, through all the momenta from j to t.
        momentum: weights of S_s and of the gradients in S_C, (..., C + 1).
    """

    kept: Tensor
    pulled: Tensor
    written: Tensor
    summed: Tensor | None
    passed: Tensor | None
    momentum: Tensor | None


def _chunk_weights(log_alpha: Tensor, theta: Tensor | None, valid: Tensor | None) -> _ChunkWeights:
    """The weights of a chunk with log retentions (batch, heads, C) and logits theta (heads,)."""
    count = log_alpha.shape[-1]
    log_b = F.pad(log_alpha.cumsum(-1), (1, 0))
    steps = torch.arange(count + 1, device=log_alpha.device)
    later = steps[1:, None] > steps  # column t knows nothing of a source j > t
    # Differences of logarithms before the exponential: a ratio of two tiny products stays exact.
    written = _ratios(log_b, later)
    kept, pulled = log_b.exp(), -torch.expm1(log_b)
    if theta is None:
        return _ChunkWeights(kept, pulled, written, None, None, None)
    log_theta = F.logsigmoid(theta)[:, None].expand_as(log_alpha)
    there = (
        torch.ones_like(log_alpha) if valid is None else valid.to(log_alpha).expand_as(log_alpha)
    )
    log_p = F.pad((log_theta * there).cumsum(-1), (1, 0))
    # Token i's gradient enters X_t through all the momenta S_j, i <= j <= t.
    decayed = _ratios(log_p, later)
    through = there.unsqueeze(-2) * decayed[..., 1:]
    first = there * log_p[..., 1:].exp()
    summed = (first.unsqueeze(-2) @ written).squeeze(-2)
    momentum = torch.cat([log_p[..., -1:].exp(), decayed[..., -1]], -1)
    return _ChunkWeights(kept, pulled, written, summed, through @ written, momentum)


def _ratios(logs: Tensor, later: Tensor) -> Tensor:
    """exp(log b_t - log b_j) for sources j = 1..C at times t = 0..C, 0 for j > t."""
    return (logs[..., None, :] - logs[..., 1:, None]).masked_fill(later, -torch.inf).exp()


class _Recurrence(NamedTuple):
    """One kind of matrix X over a chunk.

    Attributes:
        start: X at the chunk's start, (..., rows, n).
        initial: X_0, where retention pulls it; None for zero.
        momentum: S at the chunk's start; None without momentum.
        times: the weights of the chunk.
        key: what X sees of the tokens, y_1 .. y_C, (..., n, C).
        written: the columns that tokens write, less what they erase, (..., rows, C). Without
            momentum the gradients are among them.
        gradient: the columns g that go through the momentum, (..., rows, C); None without.
    """

    start: Tensor
    initial: Tensor | None
    momentum: Tensor | None
    times: _ChunkWeights
    key: Tensor
    written: Tensor | None
    gradient: Tensor | None

    def before(self, y: Tensor) -> Tensor:
        """The columns X_{t-1} y_t, t = 1..C."""
        return self._carried(self.start @ y, y) + self._wrote(self.key.mT @ y)

    def _carried(self, seen: Tensor, y: Tensor) -> Tensor:
        """The part of X_{t-1} y_t from before the chunk; `seen` is X y_t at the chunk's start."""
        times = self.times
        found = times.kept[..., None, :-1] * seen
        if self.initial is not None:
            found = found + times.pulled[..., None, :-1] * (self.initial @ y)
        if self.momentum is not None and times.summed is not None:
            found = found + times.summed[..., None, :-1] * (self.momentum @ y)
        return found

    def _wrote(self, similarity: Tensor) -> Tensor | float:
        """The part of X_{t-1} y_t from earlier tokens of the chunk; `similarity` is key^T y."""
        found: Tensor | float = 0.0
        if self.written is not None:
            found = self.written @ (self.times.written[..., :-1] * similarity)
        if self.gradient is not None and self.times.passed is not None:
            found = found + self.gradient @ (self.times.passed[..., :-1] * similarity)
        return found

    def after(self) -> tuple[Tensor, Tensor | None]:
        """X_C and S_C."""
        times = self.times
        end = times.kept[..., -1:, None] * self.start
        if self.initial is not None:
            end = end + times.pulled[..., -1:, None] * self.initial
        if self.written is not None:
            end = end + (self.written * times.written[..., None, :, -1]) @ self.key.mT
        if (
            self.momentum is None or self.gradient is None
            or times.summed is None or times.passed is None or times.momentum is None
        ):  # fmt: skip
            return end, self.momentum
        end = end + times.summed[..., -1:, None] * self.momentum
        end = end + (self.gradient * times.passed[..., None, :, -1]) @ self.key.mT
        momentum = times.momentum[..., None, :1] * self.momentum
        return end, momentum + (self.gradient * times.momentum[..., None, 1:]) @ self.key.mT

    def erased(self, erase: Tensor, seen: Tensor) -> _Recurrence:
        """The same, with what the tokens erase, e_t X_{t-1} y_t, subtracted from what they write.

        An erased column depends on all that earlier tokens erased: a unit triangular system.
        `seen` holds the columns X y_t of the chunk's start.
        """
        erase = erase.unsqueeze(-2)
        similarity = self.key.mT @ self.key
        right = self._carried(seen, self.key)
        if self.gradient is not None:
            right = right + self._replace(written=None)._wrote(similarity)
        right = -erase * right
        if self.written is not None:
            right = right + self.written
        system = self.times.written[..., :-1] * similarity * erase
        exact = torch.promote_types(right.dtype, torch.float32)  # LAPACK has no narrower dtypes
        solved = torch.linalg.solve_triangular(
            system.to(exact), right.to(exact), upper=True, left=False, unitriangular=True
        )
        return self._replace(written=solved.to(right.dtype))


class _Chunk(NamedTuple):
    """A stack of G memories over a chunk. W2 stacks their rows; W1 keeps them apart."""

    w2: _Recurrence | None
    w1: _Recurrence

    def after(self, state: MemoryState) -> MemoryState:
        """The state at the end of the chunk; the anchor stays."""
        w1, s1 = self.w1.after()
        state = state._replace(w1=w1, s1=state.s1 if s1 is None else s1)  # exact rule: S stays
        if self.w2 is None:
            return state
        w2, s2 = self.w2.after()
        return state._replace(
            w2=w2.view_as(state.w2), s2=None if s2 is None else s2.view_as(state.w2)
        )

    def read(self, query: Tensor, floor: float) -> Tensor:
        """o_t = M_{t-1}(q_t) of a stack of one memory; query (batch, heads, d, C)."""
        if self.w2 is None:
            return self.w1.before(query.unsqueeze(2)).squeeze(2)
        hidden = unit(F.gelu(self.w2.before(query)), floor)
        return query + self.w1.before(hidden.unsqueeze(2)).squeeze(2)


def _write(
    state: MemoryState,
    initial: Weights | None,
    tokens: Generated,
    times: _ChunkWeights,
    form: Form,
    generating: bool,
) -> _Chunk:
    """What the tokens of a chunk write into a stack of memories."""
    linear = state.w2.shape[-2] == 0
    surprise = _surprise(state, tokens, form, form.floor(generating))
    start2, start1 = (None, None) if initial is None else initial
    erase2, erase1 = erasures(tokens, form, generating, linear)
    wrote: Tensor = -surprise.error
    exact = form.update == "delta" and not generating
    if exact:
        wanted = tokens.value if linear else tokens.value - tokens.key
        wrote = (tokens.delta.unsqueeze(-2) * wanted).unsqueeze(2)
    direct = exact or state.s1 is None  # written at once, not through a momentum
    w1 = _Recurrence(
        state.w1, start1, None if direct else state.s1,
        _ChunkWeights._make(None if x is None else x.unsqueeze(2) for x in times),
        surprise.features, wrote if direct else None, None if direct else wrote,
    )  # fmt: skip
    if erase1 is not None:
        # At the beginning of a chunk the anchor is the running weights: nothing is read twice.
        fresh = state.anchor_w1 is state.w1
        seen = surprise.read if fresh else state.w1 @ surprise.features
        w1 = w1.erased(erase1.unsqueeze(2), seen)
    if linear:
        return _Chunk(None, w1)
    direct = state.s2 is None
    slope = -surprise.slope.flatten(2, 3)
    running = state.w2.flatten(2, 3)
    w2 = _Recurrence(
        running, None if start2 is None else start2.flatten(1, 2),
        None if state.s2 is None else state.s2.flatten(2, 3), times, tokens.key,
        slope if direct else None, None if direct else slope,
    )  # fmt: skip
    if erase2 is not None:
        fresh = state.anchor_w2 is state.w2
        seen = surprise.before.flatten(2, 3) if fresh else running @ tokens.key
        w2 = w2.erased(erase2, seen)
    return _Chunk(w2, w1)


class _Surprise(NamedTuple):
    """Gradients at the anchor, factored: dL/dW1 = error f^T and dL/dW2 = slope k^T, per token.

    Attributes:
        before: W2 k, (batch, heads, G, hidden, C).
        features: f(k), (batch, heads, G, hidden, C); k itself in a linear memory.
        read: W1 f(k), (batch, heads, G, d, C).
        error: eta (M(k) - v^), or -eta v^ for the dot product, (batch, heads, G, d, C).
        slope: the error's gradient in W2 k, (batch, heads, G, hidden, C).
    """

    before: Tensor
    features: Tensor
    read: Tensor
    error: Tensor
    slope: Tensor


def _surprise(state: MemoryState, tokens: Generated, form: Form, floor: float) -> _Surprise:
    """Gradients of the inner objective at the anchor (Eq 90), by hand."""
    w2, w1 = state.anchor_w2, state.anchor_w1
    count, hidden = w2.shape[-3:-1]
    key, value, eta = (x.unsqueeze(2) for x in (tokens.key, tokens.value, tokens.eta))
    if hidden == 0:
        found = key.expand(-1, -1, count, -1, -1)
        read = w1 @ found
        value_hat = unit(w1 @ value)
        error = read - value_hat if form.objective == "l2" else -value_hat
        nothing = error[..., :0, :]
        return _Surprise(nothing, found, read, eta * error, nothing)
    both = w2.flatten(2, 3) @ torch.cat([tokens.key, tokens.value], -1)
    both = both.unflatten(2, (count, hidden))
    active = F.gelu(both)
    shrink = (active.square().sum(-2, keepdim=True) + floor).rsqrt()
    active = active * shrink
    found, _ = active.chunk(2, -1)
    before, _ = both.chunk(2, -1)
    read, read_value = (w1 @ active).chunk(2, -1)
    shrink, _ = shrink.chunk(2, -1)
    value_hat = unit(value + read_value)
    error = key + read - value_hat if form.objective == "l2" else -value_hat
    error = eta * error
    slope = w1.mT @ error
    slope = shrink * (slope - found * (found * slope).sum(-2, keepdim=True))
    return _Surprise(before, found, read, error, _times_gelu_slope(slope, before))


class _TimesGeluSlope(torch.autograd.Function):
    """x * gelu'(h), with a derivative of its own: torch's takes several times as many passes over
    memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, h: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(x, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, h = ctx.saved_tensors
        return _times_gelu_slope(grad, h), _gelu_bend(h) * grad * x

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, d_h: Tensor) -> Tensor:
        x, h = ctx.saved_tensors
        return _times_gelu_slope(d_x, h) + _gelu_bend(h) * x * d_h


def _gelu_bend(h: Tensor) -> Tensor:
    """gelu''(h) = (2 - h^2) exp(-h^2 / 2) / sqrt(2 pi)"""
    square = h * h
    return torch.exp(square * -0.5) * (square - 2.0) * (-1 / math.sqrt(2 * math.pi))


def _times_gelu_slope(x: Tensor, h: Tensor) -> Tensor:
    out: Tensor = _TimesGeluSlope.apply(x, h)
    return out


def segments(total: int, chunks: tuple[int, int], position: int) -> list[int]:
    """Lengths of the pieces into which the chunks of both sizes cut `total` tokens."""
    lengths = []
    while total > 0:
        length = min(*(size - position % size for size in chunks), total)
        lengths.append(length)
        position, total = position + length, total - length
    return lengths


def segment_count(total: int, chunks: tuple[int, int], position: int) -> int:
    """`len(segments(...))` for at least one token, without a loop: `total` may be symbolic."""
    a, b = chunks
    last = position + total - 1

    def starts(size: int) -> int:
        """Chunks of a size that start after the first token."""
        return last // size - position // size

    # At least one, which torch does not see in a sum of symbols.
    return torch.sym_max(1, 1 + starts(a) + starts(b) - starts(math.lcm(a, b)))
