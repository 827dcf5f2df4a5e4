r"""Self-modifying memories: the slow, obvious form and the chunk-parallel form.

A memory is a residual two-layer MLP (Eqs 89, 91)

    M(z) = z + W1 gelu(W2 z),       W2: (hidden, d),  W1: (d, hidden).

Every head owns five of them. Four *generate* the keys, the values, the inner learning rates and the
retentions of a token (Eq 83); the fifth, `mem`, answers the queries. All five store the same key,
each with the value that it generates for itself (Eqs 84, 85):

    L_t(M) = 1/2 || M(k_t) - v^_t ||^2,   v^_t = M_anchor(v_t),

and learn by gradient descent with a delta rule for the decay (Eqs 86-88), the gradient taken at an
anchor, the state at the end of the previous chunk (Eq 90):

    S2_t = theta S2_{t-1} - eta_t dL_t/dW2 |_anchor
    W2_t = W2_{t-1} (alpha_t I - eta_t k_t k_t^T) + S2_t
    S1_t = theta S1_{t-1} - eta_t dL_t/dW1 |_anchor
    W1_t = alpha_t W1_{t-1} + S1_t
    o_t  = M_{mem, t-1}(q_t)

The erasing factor acts on W2, the side of the network that sees the key; W1 has its decay alone.
Without momentum theta = 0. The values v^_t are constants of the inner objective, but the outer loss
is differentiated through everything.

`self_modifying_reference` is these lines token by token; `self_modifying` gives the same numbers
from matrix products over chunks. All tensors hold tokens as columns, (batch, heads, channels,
tokens), as in the equations.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

GENERATORS = ("key", "value", "eta", "alpha")
MEMORIES = (*GENERATORS, "mem")


class MemoryState(NamedTuple):
    """Running weights of a stack of G memories per head, and the anchor of their gradients.

    Attributes:
        w2: (batch, heads, G, hidden, m * d): W2, and with momentum (m = 2) S2 to the right of it.
        w1: (batch, heads, G, m * d, hidden): W1, and with momentum S1 below it.
        anchor_w2: (batch, heads, G, hidden, d): W2 at the end of the previous chunk.
        anchor_w1: (batch, heads, G, d, hidden): W1 at the end of the previous chunk.
    """

    w2: Tensor
    w1: Tensor
    anchor_w2: Tensor
    anchor_w1: Tensor

    @classmethod
    def start(cls, w2: Tensor, w1: Tensor, batch: int, momentum: bool) -> MemoryState:
        """The state before the first token: learned weights (heads, G, ., .), momenta zero."""
        w2, w1 = w2.expand(batch, *w2.shape), w1.expand(batch, *w1.shape)
        if not momentum:
            return cls(w2, w1, w2, w1)
        return cls(
            torch.cat([w2, torch.zeros_like(w2)], -1),
            torch.cat([w1, torch.zeros_like(w1)], -2),
            w2,
            w1,
        )

    def anchored(self) -> MemoryState:
        """The same state with its anchor moved to the running weights."""
        d = self.anchor_w2.shape[-1]
        return self._replace(anchor_w2=self.w2[..., :d], anchor_w1=self.w1[..., :d, :])


class Gates(NamedTuple):
    """What turns the generated channels into scalars per head and token; shapes (heads,).

    Attributes:
        eta: bias of the inner learning rate, eta = max_eta * sigmoid(mean M_eta(z) + eta).
        alpha: bias of the retention, alpha = sigmoid(mean M_alpha(z) + alpha).
        theta: logit of the momentum, theta = sigmoid(theta); None for no momentum.
        max_eta: upper end of the inner learning rate.
    """

    eta: Tensor
    alpha: Tensor
    theta: Tensor | None
    max_eta: float


class Generated(NamedTuple):
    """What the generating memories say about some tokens.

    Attributes:
        key, value: (batch, heads, d, tokens), columns of norm 1.
        eta: inner learning rates, (batch, heads, tokens).
        log_alpha: logarithms of the retentions, (batch, heads, tokens).
    """

    key: Tensor
    value: Tensor
    eta: Tensor
    log_alpha: Tensor


def unit(x: Tensor) -> Tensor:
    """Columns of x (..., channels, tokens) divided by their norms."""
    return x * (x.square().sum(-2, keepdim=True) + 1e-6).rsqrt()


def generate(z: Tensor, w2: Tensor, w1: Tensor, gates: Gates) -> Generated:
    """Eq 83: keys, values, inner learning rates and retentions of the inputs z (B, H, d, T)."""
    hidden = F.gelu(_all_hidden(w2, z))
    # A value meets the memories as an input, M(v_t). Unless it is as short as a key, what M_value
    # learns comes back longer through v^_t = M(v_t), and the loop runs away from the first weights.
    key, value, eta, alpha = (z.unsqueeze(2) + w1 @ hidden).unbind(2)
    return Generated(
        unit(key),
        unit(value),
        gates.max_eta * torch.sigmoid(eta.mean(-2) + gates.eta[:, None]),
        F.logsigmoid(alpha.mean(-2) + gates.alpha[:, None]),
    )


# ------------------------------------------------------------------ reference


def self_modifying_reference(
    z: Tensor,
    q: Tensor,
    generators: MemoryState,
    memory: MemoryState,
    gates: Gates,
    *,
    memory_chunk: int,
    projection_chunk: int,
    position: int = 0,
) -> tuple[Tensor, MemoryState, MemoryState]:
    """`self_modifying`, token by token, with the inner gradients left to autograd."""
    theta = torch.zeros_like(gates.eta) if gates.theta is None else torch.sigmoid(gates.theta)

    def read(w2: Tensor, w1: Tensor, x: Tensor) -> Tensor:  # x: (B, H, 1 or G, d)
        return x + (w1 @ F.gelu(w2 @ x.unsqueeze(-1))).squeeze(-1)

    def objective(w2: Tensor, w1: Tensor, key: Tensor, value_hat: Tensor) -> Tensor:
        return 0.5 * (read(w2, w1, key) - value_hat).square().sum()

    def write(
        state: MemoryState, key: Tensor, value: Tensor, eta: Tensor, alpha: Tensor
    ) -> MemoryState:
        d = key.shape[-1]
        w2, s2 = state.w2[..., :d], state.w2[..., d:]
        w1, s1 = state.w1[..., :d, :], state.w1[..., d:, :]
        key, value = key.unsqueeze(2), value.unsqueeze(2)
        eta, alpha = eta[..., None, None, None], alpha[..., None, None, None]
        value_hat = read(state.anchor_w2, state.anchor_w1, value)
        grad2, grad1 = torch.func.grad(objective, (0, 1))(
            state.anchor_w2, state.anchor_w1, key, value_hat
        )
        decay = theta[:, None, None, None]
        s2 = (decay * s2 if gates.theta is not None else 0.0) - eta * grad2
        s1 = (decay * s1 if gates.theta is not None else 0.0) - eta * grad1
        erase = alpha * torch.eye(d, dtype=key.dtype, device=key.device) - eta * key.unsqueeze(
            -1
        ) * key.unsqueeze(-2)
        w2, w1 = w2 @ erase + s2, alpha * w1 + s1
        if gates.theta is None:
            return state._replace(w2=w2, w1=w1)
        return state._replace(w2=torch.cat([w2, s2], -1), w1=torch.cat([w1, s1], -2))

    outputs = []
    for t in range(z.shape[-1]):
        if (position + t) % projection_chunk == 0:
            generators = generators.anchored()
        if (position + t) % memory_chunk == 0:
            memory = memory.anchored()
        new = generate(z[..., t : t + 1], generators.anchor_w2, generators.anchor_w1, gates)
        key, value, eta, log_alpha = (x[..., 0] for x in new)
        d = key.shape[-1]
        query = q[..., t].unsqueeze(2)
        outputs.append(read(memory.w2[..., :d], memory.w1[..., :d, :], query).squeeze(2))
        generators = write(generators, key, value, eta, log_alpha.exp())
        memory = write(memory, key, value, eta, log_alpha.exp())
    return torch.stack(outputs, -1), generators, memory


# ------------------------------------------------------------- chunk-parallel


def self_modifying(
    z: Tensor,
    q: Tensor,
    generators: MemoryState,
    memory: MemoryState,
    gates: Gates,
    *,
    memory_chunk: int,
    projection_chunk: int,
    position: int = 0,
) -> tuple[Tensor, MemoryState, MemoryState]:
    """Reads and writes of all memories over some tokens: Eqs 83-91 in their chunk-parallel form.

    Args:
        z: inputs of the generating memories, (batch, heads, d, tokens).
        q: queries, (batch, heads, d, tokens).
        generators: state of the four generating memories, in the order of `GENERATORS`.
        memory: state of the memory that answers the queries (a stack of one).
        gates: biases and limits of the generated scalars.
        memory_chunk: tokens between two anchors of the memory.
        projection_chunk: tokens between two anchors of the generating memories.
        position: tokens that the states have seen; decides where the chunks end.

    Returns:
        the outputs o_t (batch, heads, d, tokens) and the two states after the last token.
    """
    parts = []
    seen = position
    for piece in z.split(_segments(z.shape[-1], projection_chunk, position), -1):
        if seen % projection_chunk == 0:
            generators = generators.anchored()
        part = generate(piece, generators.anchor_w2, generators.anchor_w1, gates)
        chunk = _chunk(part.key, part.eta, part.log_alpha, gates.theta)
        generators = _advance(generators, chunk, _surprise(generators, part.key, part.value))
        parts.append(part)
        seen += piece.shape[-1]
    tokens = Generated(
        *(torch.cat(x, -1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    )
    out, memory = _read_and_write(memory, tokens, q, gates, memory_chunk, position)
    return out, generators, memory


class _Chunk(NamedTuple):
    """What keys, inner learning rates and retentions of a chunk mean for *any* memory.

    Every W2_t is linear in [W2_0 | S2_0] and in the C vectors a_j that the gradients hand over, so
    one matrix per query, made of keys alone, says how to combine them; so does one for the end.

    Attributes:
        past: (..., C, C + 1), the weight of token j's gradient in W_t; -eta_j is in it.
        keep: (..., m, C + 1), the weights of W_0 and S_0 in W_t.
        erased: (..., C, C + 1), the weight of token j's erased vector in W_t: b_t / b_j.
        solved: (..., m d + C, C), maps [W2_0 | S2_0 | a] to the erased vectors -eta_j W2_{j-1} k_j.
        end: (..., m d + C, m d), maps [W2_0 | S2_0 | a] to [W2_C | S2_C].
        end_past: (..., m, C), the weights of the gradients in W1_C and in S1_C.
        end_keep: (..., m, m), the weights of W1_0 and S1_0 in W1_C and S1_C.
    """

    key: Tensor
    past: Tensor
    keep: Tensor
    erased: Tensor
    solved: Tensor
    end: Tensor
    end_past: Tensor
    end_keep: Tensor

    def recall(self, y: Tensor) -> Tensor:
        """The matrix that turns [W2_0 | S2_0 | a] into the columns W2_{t-1} y_t, t = 1..C."""
        similarity = self.key.mT @ y
        direct = _direct(y, self.keep[..., :-1], self.past[..., :-1] * similarity)
        return direct + self.solved @ (self.erased[..., :-1] * similarity)


def _chunk(key: Tensor, eta: Tensor, log_alpha: Tensor, theta: Tensor | None) -> _Chunk:
    """Solves the chunk's recurrence for keys (..., heads, d, C); the rest has no channel axis."""
    d, c = key.shape[-2:]
    log_b = F.pad(log_alpha.cumsum(-1), (1, 0))  # b_t = alpha_1 ... alpha_t, t = 0..C
    steps = torch.arange(c + 1, device=key.device)
    later = steps[1:, None] > steps  # column t knows nothing of a source j > t
    # Differences of logarithms before the exponential: a ratio of two tiny products stays exact.
    ratio = (log_b[..., None, :] - log_b[..., 1:, None]).masked_fill(later, -torch.inf).exp()
    b = log_b.exp().unsqueeze(-2)
    eye = torch.eye(d, dtype=key.dtype, device=key.device)
    if theta is None:
        past, keep = ratio, b
    else:
        log_theta = F.logsigmoid(theta)[:, None, None]
        lag = (steps[1:] - steps[1:, None]).to(key.dtype)
        power = (log_theta * lag).masked_fill(later[:, 1:], -torch.inf).exp()
        # Token i's gradient enters W_t through all the momenta S_j, i <= j <= t.
        past = power @ ratio
        keep = torch.cat([b, log_theta.exp() * past[..., :1, :]], -2)
    write = -eta.unsqueeze(-1)
    past = past * write

    # x_j = -eta_j W2_{j-1} k_j needs all earlier x_i: a unit triangular system, shared by memories.
    similarity = key.mT @ key
    minus_eta = write.mT
    system = -(ratio[..., :-1] * similarity * minus_eta)
    direct = _direct(key, keep[..., :-1], past[..., :-1] * similarity) * minus_eta
    exact = torch.promote_types(key.dtype, torch.float32)  # LAPACK knows nothing narrower
    solved = torch.linalg.solve_triangular(
        system.to(exact), direct.to(exact), upper=True, left=False, unitriangular=True
    ).to(key.dtype)

    end = solved @ (ratio[..., -1:] * key.mT)
    end_past, end_keep = past[..., -1:].mT, keep[..., -1:].mT
    if theta is None:
        end = end + torch.cat([b[..., -1:] * eye, past[..., -1:] * key.mT], -2)
    else:
        momentum_past = power[..., -1:] * write
        momentum_keep = (log_theta * c).exp()  # theta^C
        blocks = keep[..., -1:, None] * eye
        end = end + torch.cat([blocks.flatten(-3, -2), past[..., -1:] * key.mT], -2)
        still = torch.cat([torch.zeros_like(eye), eye])
        momentum_end = torch.cat(
            [(momentum_keep * still).expand(*end.shape[:-2], 2 * d, d), momentum_past * key.mT], -2
        )
        end = torch.cat([end, momentum_end], -1)
        end_past = torch.cat([end_past, momentum_past.mT], -2)
        momentum_row = F.pad(momentum_keep, (1, 0)).expand(end_keep.shape)
        end_keep = torch.cat([end_keep, momentum_row], -2)
    return _Chunk(key, past, keep, ratio, solved, end, end_past, end_keep)


def _direct(y: Tensor, keep: Tensor, weighted: Tensor) -> Tensor:
    """What the columns y draw from [W2_0 | S2_0 | a] before any erasing."""
    return torch.cat([(keep.unsqueeze(-2) * y.unsqueeze(-3)).flatten(-3, -2), weighted], -2)


class _Surprise(NamedTuple):
    """Gradients at the anchor, factored: dL/dW1 = error s^T and dL/dW2 = slope k^T, per token."""

    error: Tensor  # (..., G, d, C)
    hidden: Tensor  # s, (..., G, hidden, C)
    slope: Tensor  # a, (..., G, hidden, C)


def _surprise(state: MemoryState, key: Tensor, value: Tensor) -> _Surprise:
    """Error e = M(k) - M(v), s = gelu(W2 k) and a = gelu'(W2 k) * (W1^T e), all at the anchor."""
    pre = _all_hidden(state.anchor_w2, key)
    hidden = F.gelu(pre)
    hidden_value = F.gelu(_all_hidden(state.anchor_w2, value))
    error = (key - value).unsqueeze(-3) + state.anchor_w1 @ (hidden - hidden_value)
    slope = _times_gelu_slope(state.anchor_w1.mT @ error, pre)
    return _Surprise(error, hidden, slope)


class _TimesGeluSlope(torch.autograd.Function):
    """x * gelu'(h). Torch's own second derivative of gelu takes several times as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(x, h)
        return torch.ops.aten.gelu_backward(x, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, h = ctx.saved_tensors
        square = h * h
        # gelu''(h) = (2 - h^2) exp(-h^2 / 2) / sqrt(2 pi)
        bend = (square * -0.5).exp_().mul_(square.sub_(2.0)).mul_(-1 / math.sqrt(2 * math.pi))
        return torch.ops.aten.gelu_backward(grad, h), bend.mul_(grad).mul_(x)


def _times_gelu_slope(x: Tensor, h: Tensor) -> Tensor:
    out: Tensor = _TimesGeluSlope.apply(x, h)
    return out


def _all_hidden(w2: Tensor, x: Tensor) -> Tensor:
    """W2 x for all G memories at once: (..., G, hidden, d), (..., d, T) -> (..., G, hidden, T)."""
    return (w2.flatten(-3, -2) @ x).unflatten(-2, w2.shape[-3:-1])


def _advance(state: MemoryState, chunk: _Chunk, surprise: _Surprise) -> MemoryState:
    """The running weights at the end of the chunk; the anchor stays."""
    w2 = state.w2.flatten(-3, -2)
    width = w2.shape[-1]
    w2 = w2 @ chunk.end[..., :width, :] + surprise.slope.flatten(-3, -2) @ chunk.end[..., width:, :]
    # (m, m) weights over the m stacked matrices W1, S1; then the gradients of the chunk.
    m, d = chunk.end_keep.shape[-1], surprise.error.shape[-2]
    old = state.w1.unflatten(-2, (m, d)).flatten(-2)
    old = (chunk.end_keep.unsqueeze(-3) @ old).view(state.w1.shape)
    errors = (chunk.end_past[..., None, :, None, :] * surprise.error.unsqueeze(-3)).flatten(-3, -2)
    return state._replace(w2=w2.view(state.w2.shape), w1=old + errors @ surprise.hidden.mT)


def _read_and_write(
    memory: MemoryState, tokens: Generated, q: Tensor, gates: Gates, size: int, position: int
) -> tuple[Tensor, MemoryState]:
    """The memory's reads and writes. Whole chunks are prepared and read together."""
    outputs = []
    start, total = 0, q.shape[-1]
    first = min(-position % size, total)
    whole = (total - first) // size
    for count, length in ((1, first), (whole, size), (1, total - first - whole * size)):
        if count * length == 0:
            continue
        stop = start + count * length
        key, value, eta, log_alpha, query = (
            _split(x[..., start:stop], count) for x in (*tokens, q)
        )
        chunks = _chunk(key, eta, log_alpha, gates.theta)
        keys, values = key.unbind(), value.unbind()
        per_chunk = [_Chunk(*x) for x in zip(*(x.unbind() for x in chunks), strict=True)]
        states, surprises = [], []
        for i in range(count):
            if (position + start) % size == 0:
                memory = memory.anchored()
            surprise = _surprise(memory, keys[i], values[i])
            states.append(memory)
            surprises.append(surprise)
            memory = _advance(memory, per_chunk[i], surprise)
            start += length
        outputs.append(_join(_read(states, chunks, surprises, query)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), memory


def _read(
    states: list[MemoryState], chunks: _Chunk, surprises: list[_Surprise], q: Tensor
) -> Tensor:
    """o_t = q_t + W1_{t-1} gelu(W2_{t-1} q_t) for all tokens of all chunks, (count, B, H, d, C)."""
    w2 = torch.stack([x.w2 for x in states]).squeeze(-3)
    w1 = torch.stack([x.w1 for x in states]).squeeze(-3)
    error, s, slope = (torch.stack(x).squeeze(-3) for x in zip(*surprises, strict=True))
    recall = chunks.recall(q)
    width = w2.shape[-1]
    hidden = F.gelu(w2 @ recall[..., :width, :] + slope @ recall[..., width:, :])
    kept = (w1 @ hidden).unflatten(-2, (-1, q.shape[-2])) * chunks.keep[..., None, :-1]
    learned = error @ (chunks.past[..., :-1] * (s.mT @ hidden))
    return q + kept.sum(-3) + learned


def _segments(total: int, size: int, position: int) -> list[int]:
    """Lengths of the pieces of `total` tokens that start or end where a chunk does."""
    lengths = []
    while total > 0:
        length = min(size - position % size, total)
        lengths.append(length)
        position, total = position + length, total - length
    return lengths


def _split(x: Tensor, count: int) -> Tensor:
    """(..., count * C) -> (count, ..., C)."""
    return x.unflatten(-1, (count, -1)).movedim(-2, 0).contiguous()


def _join(x: Tensor) -> Tensor:
    """(count, ..., C) -> (..., count * C)."""
    return x.movedim(0, -2).flatten(-2)
