r"""Self-modifying memories: what they are, what they read and how fast they learn.

A memory is a residual two-layer MLP (Eq 89, Eq 91) whose hidden features have a norm of at most 1,

    M(z) = z + W1 f(z),  f(z) = unit(gelu(W2 z)),  unit(u) = u / sqrt(|u|^2 + floor),
    W2: (hidden, d),  W1: (d, hidden),

or, with a hidden width of 0, the linear map M(z) = W1 z (Eq 88, Eq 93). Every head owns five. Four
*generate* the key, the value, the inner learning rate and the retention of a token (Eq 83); the
fifth, `mem`, answers the queries. All five store the same key k_t, each with a value that it makes
itself (Eq 84, Eq 85),

    v^_t = unit(M_anchor(v_t)),   L_t(M) = 1/2 |M(k_t) - v^_t|^2   or   -<M(k_t), v^_t>,

and learn by gradient descent at an anchor, the state at the end of the previous chunk
(Eq 86, Eq 87, Eq 88, Eq 90). Each of their matrices X follows one recurrence, in which X_0 is its
learned initial value and y_t what it sees of the key, k_t for W2 and f(k_t) at the anchor for W1:

    S_t = theta S_{t-1} + g_t y_t^T
    X_t = alpha_t X_{t-1} + (1 - alpha_t) X_0 - e_t (X_{t-1} y_t) y_t^T + S_t
    o_t = M_{mem, t-1}(q_t)                                              (read before write)

Without momentum theta = 0. What is written is the gradient, g_t y_t^T = -eta_t dL_t/dX at the
anchor. What is erased depends on the matrix and on the inner update:

    e_t            "delta"    "dgd"      "gd"
    W2 of mem      beta_t     beta_t     0       A linear memory has no W2: its W1 takes what the
    other W2       eta_t      eta_t      0       table says of W2, but for the exact delta rule.
    W1 of mem      delta_t    0          0
    other W1       0          0          0

"delta" is the exact delta rule (Eq 57 for a layer's own input): W1 of mem writes no gradient but
g_t = delta_t (v_t - k_t), so that with delta_t = 1 M(k_t) becomes v_t. "dgd" is delta gradient
descent (Eq 88), "gd" plain gradient descent.

Features and values of norm 1 bound what is written, and `rates` bounds how fast: no input can make
a memory run away (docs/hope_chunks.md has the conditions). The values v^_t are constants of the
inner objective, but the outer loss is differentiated through everything.

Tensors hold tokens as columns, (batch, heads, channels, tokens), as in the equations.
`deepopt.hope.reference` is these lines token by token; `deepopt.hope.scan` gives the same numbers
from matrix products over chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GENERATORS = ("key", "value", "eta", "alpha")

Objective = Literal["l2", "dot"]
Update = Literal["delta", "dgd", "gd"]


class Form(NamedTuple):
    """The arithmetic of the memories, as a layer's configuration sets it.

    Attributes:
        objective: inner objective, "l2" or "dot".
        update: inner update, "delta", "dgd" or "gd".
        max_eta: upper end of the inner learning rate eta.
        max_erase: upper end of the erasure beta of `mem`; None for beta = eta.
        max_delta: upper end of delta, the inner learning rate of the exact delta rule.
        per_channel: whether eta weighs every channel of the inner objective by itself.
        memory_chunk: tokens between two anchors of `mem`.
        projection_chunk: tokens between two anchors of the generating memories.
        generator_floor: added to the squared norm that divides the features of the generating
            memories, so that they are as long as their input, up to 1.
        memory_floor: the same for `mem`. Its features keep norm 1 down to inputs of 0.01, because a
            state is tracked by the sign of what is left of a column that was erased many times.
        sharpness: factor of the generated logits of the two erasures. A token should be written
            fully or not at all: half a write wears away what is stored, tracked states included.
    """

    objective: Objective
    update: Update
    max_eta: float
    max_erase: float | None
    max_delta: float
    per_channel: bool
    memory_chunk: int
    projection_chunk: int
    generator_floor: float = 1.0
    memory_floor: float = 1e-4
    sharpness: float = 6.0

    @property
    def has_kernel(self) -> bool:
        """Whether there are kernels for this form, if no memory is linear or has momentum."""
        exact = self.update == "delta" and self.objective == "l2"
        return exact and self.max_erase is not None and not self.per_channel

    @property
    def scalars(self) -> tuple[float, float, float, float, float, float]:
        """The numbers of this form that its kernel takes, if it has one, besides the chunks."""
        erase = self.max_erase or 0.0  # None has no kernel
        return (
            self.max_eta, erase, self.max_delta, self.generator_floor, self.memory_floor,
            self.sharpness,
        )  # fmt: skip

    @classmethod
    def of_scalars(cls, scalars: Sequence[float], memory_chunk: int, projection_chunk: int) -> Form:
        """The form that has these `scalars`, and a kernel."""
        max_eta, max_erase, max_delta, *others = scalars
        chunks = (memory_chunk, projection_chunk)
        return cls("l2", "delta", max_eta, max_erase, max_delta, False, *chunks, *others)

    def floor(self, generating: bool) -> float:
        """The floor of the memories that generate, or of the one that answers."""
        return self.generator_floor if generating else self.memory_floor


class Weights(NamedTuple):
    """The initial weights of a stack of G memories per head.

    Attributes:
        w2: (heads, G, hidden, d).
        w1: (heads, G, d, hidden), or (heads, G, d, d) for linear memories.
    """

    w2: Tensor
    w1: Tensor


class Initial(NamedTuple):
    """Where retention pulls the weights of all five memories; None means zero.

    Attributes:
        generators: the four that generate, in the order of `GENERATORS`.
        memory: the one that answers the queries, a stack of one.
    """

    generators: Weights | None
    memory: Weights | None


class MemoryState(NamedTuple):
    """Running weights of a stack of G memories per head, and the anchor of their gradients.

    Attributes:
        w2: (batch, heads, G, hidden, d).
        w1: (batch, heads, G, d, hidden).
        anchor_w2: W2 at the end of the previous chunk.
        anchor_w1: W1 at the end of the previous chunk.
        s2: momentum S of W2; None without momentum.
        s1: momentum S of W1; None without momentum.
    """

    w2: Tensor
    w1: Tensor
    anchor_w2: Tensor
    anchor_w1: Tensor
    s2: Tensor | None = None
    s1: Tensor | None = None

    @classmethod
    def start(cls, initial: Weights, batch: int, momentum: bool) -> MemoryState:
        """The state before the first token: the initial weights, momenta zero."""
        w2, w1 = (x.expand(batch, *x.shape) for x in initial)
        zeros = (torch.zeros_like(w2), torch.zeros_like(w1)) if momentum else (None, None)
        return cls(w2, w1, w2, w1, *zeros)

    def anchored(self, moves: Tensor | None = None) -> MemoryState:
        """The same state with its anchor moved to the running weights (Eq 90).

        Args:
            moves: (batch,), True for sequences whose anchor moves; None for all of them.
        """
        if moves is None:
            return self._replace(anchor_w2=self.w2, anchor_w1=self.w1)
        moves = moves[:, None, None, None, None]
        return self._replace(
            anchor_w2=torch.where(moves, self.w2, self.anchor_w2),
            anchor_w1=torch.where(moves, self.w1, self.anchor_w1),
        )

    def owned(self) -> MemoryState:
        """The same state with anchors of its own, not those of the model or of another state."""
        return self._replace(anchor_w2=self.anchor_w2.clone(), anchor_w1=self.anchor_w1.clone())


class Gates(NamedTuple):
    """Parameters that turn generated channels into the rates of a head; shapes (heads,).

    Attributes:
        eta: bias of the inner learning rate.
        alpha: bias of the retention.
        erase, delta: biases of the erasure beta and of delta.
        erase_range, delta_range: logits of the share of `max_erase` and `max_delta` that a head
            uses, so that one head can erase to track states while another keeps to recall.
        theta: logit of the momentum's retention; None without momentum.
    """

    eta: Tensor
    alpha: Tensor
    erase: Tensor
    delta: Tensor
    erase_range: Tensor
    delta_range: Tensor
    theta: Tensor | None = None

    def stacked(self) -> Tensor:
        """All but theta, for kernels, (heads, 6)."""
        return torch.stack(self[:6], -1)

    @classmethod
    def unstacked(cls, gates: Tensor) -> Gates:
        """The gates that `stacked` has put together."""
        return cls(*gates.unbind(-1))


class Inputs(NamedTuple):
    """What the memories see of some tokens; shapes (batch, heads, d, tokens).

    Attributes:
        key: inputs of the memories that generate keys, inner learning rates and retentions.
        value: inputs of the memory that generates values.
        query: queries, columns of norm 1.
    """

    key: Tensor
    value: Tensor
    query: Tensor


class Generated(NamedTuple):
    """What the generating memories say about some tokens.

    Attributes:
        key, value: (batch, heads, d, tokens), columns of norm 1.
        eta: inner learning rates, (batch, heads, d or 1, tokens).
        erase: erasures beta of `mem`, (batch, heads, tokens).
        delta: inner learning rates of the exact delta rule, (batch, heads, tokens).
        log_alpha: logarithms of the retentions, (batch, heads, tokens).
    """

    key: Tensor
    value: Tensor
    eta: Tensor
    erase: Tensor
    delta: Tensor
    log_alpha: Tensor

    @property
    def rate(self) -> Tensor:
        """The inner learning rate as one number per head and token: the mean of its channels."""
        return self.eta.mean(-2)


def unit(x: Tensor, floor: float = 1e-6) -> Tensor:
    """Columns of x (..., channels, tokens) divided by their norms; none is longer than 1."""
    return x * (x.square().sum(-2, keepdim=True) + floor).rsqrt()


def features(w2: Tensor, x: Tensor, floor: float) -> Tensor:
    """f(x) = unit(gelu(W2 x)), or x itself where W2 has no rows."""
    return unit(F.gelu(w2 @ x), floor) if w2.shape[-2] else x


def recall(w2: Tensor, w1: Tensor, x: Tensor, floor: float) -> Tensor:
    """M(x) of the columns x."""
    read = w1 @ features(w2, x, floor)
    return x + read if w2.shape[-2] else read


def generate(
    inputs: Inputs, w2: Tensor, w1: Tensor, gates: Gates, form: Form, valid: Tensor | None
) -> Generated:
    """Eq 83: keys, values and rates, from the generating memories at their anchor.

    `valid` (batch, 1, tokens) is False where a token is padding, which writes and forgets nothing.
    """
    seen = torch.stack([inputs.key, inputs.value, inputs.key, inputs.key], 2)
    key, value, eta, alpha = recall(w2, w1, seen, form.generator_floor).unbind(2)
    # The value is an input of the memories too, as v^_t = M(v_t). If it were longer than a key,
    # what M_value learns would come back longer through v^_t, and this loop would run away from the
    # initial weights.
    return Generated(unit(key), unit(value), *rates(eta, alpha, gates, form, valid))


def rates(
    eta: Tensor, alpha: Tensor, gates: Gates, form: Form, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eta, beta, delta and log alpha out of generated channels (batch, heads, d, tokens).

    The channels of M_alpha are divided: a third each for the retention and for the two erasures.
    Whatever the weights are, a chunk of C tokens has eta C <= 1, so that no gradient overshoots.
    And alpha - beta, alpha - delta and alpha - 2 eta are at least -1, so that no erasure enlarges
    what it erases; the last one counts because the regression of a linear memory erases a second
    time.
    """
    third = alpha.shape[-2] // 3
    keep, erase, delta = alpha.split([alpha.shape[-2] - 2 * third, third, third], -2)
    retention = _pooled(keep) + gates.alpha[:, None]
    # (1 + alpha) / 2: the bounds above are eta C <= half, beta <= 2 half and delta <= 2 half.
    half = (1 + torch.sigmoid(retention)) / 2
    eta_logit = eta if form.per_channel else _pooled(eta).unsqueeze(-2)
    eta = form.max_eta * half.unsqueeze(-2) * torch.sigmoid(eta_logit + gates.eta[:, None, None])
    if gates.theta is not None:  # the momentum sums 1 / (1 - theta) gradients
        eta = eta * torch.sigmoid(-gates.theta)[:, None, None]
    erase, delta = (form.sharpness * _pooled(x) for x in (erase, delta))
    if form.max_erase is None:
        beta = eta.mean(-2)
    else:
        # In this update the gradient erases too, and uses up part of the bound.
        room = half - eta.amax(-2) / 2 if form.update == "dgd" else half
        beta = form.max_erase * room * _share(erase, gates.erase, gates.erase_range)
    delta = form.max_delta * half * _share(delta, gates.delta, gates.delta_range)
    log_alpha = F.logsigmoid(retention)
    if valid is None:
        return eta, beta, delta, log_alpha
    return eta * valid.unsqueeze(-2), beta * valid, delta * valid, log_alpha * valid


def _share(logit: Tensor, bias: Tensor, range_logit: Tensor) -> Tensor:
    """Share of a range, from 0 to 1. It reaches 1, because an erasure of exactly 2 is a reflection.
    That keeps lengths, so that a state is tracked over any number of tokens, not only those trained
    on.
    """
    range_ = torch.sigmoid(range_logit)[:, None]
    return (1.1 * range_ * torch.sigmoid(logit + bias[:, None])).clamp(max=1.0)


def _pooled(x: Tensor) -> Tensor:
    """Sum over the n channels divided by sqrt(n), which keeps the variance of random channels."""
    return x.sum(-2) * x.shape[-2] ** -0.5


def erasures(
    tokens: Generated, form: Form, generating: bool, linear: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The erasures of W2 and W1, (batch, heads, tokens), as in the table above; None for zero."""
    if form.update == "gd":
        return None, None
    exact = form.update == "delta" and not generating
    of_input = tokens.rate if generating else tokens.erase
    if linear:
        return None, tokens.delta if exact else of_input
    return of_input, tokens.delta if exact else None
