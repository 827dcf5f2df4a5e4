"""Self-modifying Titans: the sequence mixer of Hope (Eq 83, Eq 94)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.hope.config import HopeConfig
from deepopt.hope.convolution import CausalConv
from deepopt.hope.fused import self_modifying
from deepopt.hope.layout import Grid
from deepopt.hope.memory import GENERATORS, Gates, Initial, Inputs, MemoryState, Weights, unit
from deepopt.hope.state import TitansState


class InitialWeights(nn.Module):
    """Where a stack of memories starts in every sequence; learned by the outer loop.

    Args:
        heads: number of heads.
        count: memories per head.
        d: width of a head.
        hidden: hidden width of a memory; 0 for linear memories.
        gain: norm of W2 x for a unit input x.
    """

    def __init__(self, heads: int, count: int, d: int, hidden: int, gain: float) -> None:
        super().__init__()
        self.w2 = nn.Parameter(torch.empty(heads, count, hidden, d)) if hidden else None
        if self.w2 is not None:
            for matrix in self.w2.data.flatten(0, 1):
                nn.init.orthogonal_(matrix, gain)
        columns = hidden or d
        self.w1 = nn.Parameter(torch.randn(heads, count, d, columns) / math.sqrt(columns))

    @property
    def weights(self) -> Weights:
        """W2 and W1; W2 has no rows in linear memories."""
        if self.w2 is not None:
            return Weights(self.w2, self.w1)
        heads, count, d, _ = self.w1.shape
        return Weights(self.w1.new_zeros(heads, count, 0, d), self.w1)


class Turns(nn.Module):
    """Turns the first two channels of some heads' queries by a phase, to which tokens add angles.

    The angle is an amount, linear in the token's input, times a gate, a clamped sigmoid of another
    linear map. What is written into a memory fades or is erased. A phase is a sum and does neither,
    so that it can count: modulo n, by turns of 2 pi / n.

    Args:
        dim: width of the inputs.
        heads: how many heads turn, the first ones; each has a phase.
        sharpness: factor of the gates' logits.
    """

    def __init__(self, dim: int, heads: int, sharpness: float) -> None:
        super().__init__()
        self.heads = heads
        self.sharpness = sharpness
        self.rates = nn.Linear(dim, 2 * heads, bias=False)

    def forward(
        self, x: Tensor, query: Tensor, phase: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The queries, with those of the first heads turned, and the phases after the last token.

        Args:
            x: inputs (batch, tokens, dim).
            query: (batch, all heads, d, tokens).
            phase: (batch, heads), after the tokens before.
            lengths: number of real tokens in each sequence, when sequences are padded on the
                right; None if there is no padding.
        """
        return turned(self.rates(x).mT, query, phase, self.sharpness, lengths)


def turned(
    rates: Tensor,
    query: Tensor,
    phase: Tensor,
    sharpness: float,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `Turns` computes from the outputs `rates` (batch, 2 heads, tokens) of its linear map."""
    amount, gate = rates.to(phase.dtype).chunk(2, 1)
    # The gate reaches 0 and 1. A token that is not counted must turn nothing at all, or the sum
    # would drift in texts longer than those trained on.
    open_ = (1.2 * torch.sigmoid(sharpness * gate) - 0.1).clamp(0.0, 1.0)
    angle = amount * open_
    if lengths is not None:
        ends = torch.tensor(lengths, device=rates.device)[:, None, None]
        angle = angle * (torch.arange(rates.shape[-1], device=rates.device) < ends)
    # In float64: a long sum would leave float32 no digits for the angle within a turn.
    phases = phase.double().unsqueeze(-1) + angle.double().cumsum(-1)
    cos, sin = phases.cos().to(query.dtype), phases.sin().to(query.dtype)
    heads = phase.shape[1]
    turning, others = query[:, :heads], query[:, heads:]
    a, b = turning[:, :, 0], turning[:, :, 1]
    pair = torch.stack([a * cos - b * sin, a * sin + b * cos], 2)
    # Whole turns change nothing, and would cost digits of the angle.
    after = torch.remainder(phases[..., -1], 2 * math.pi)
    return torch.cat([torch.cat([pair, turning[:, :, 2:]], 2), others], 1), after.to(phase.dtype)


class SelfModifyingTitans(nn.Module):
    """Memories that generate their own keys, values and learning rates, and rewrite themselves.

    See `deepopt.hope.memory` for the update rule (Eq 83, Eq 88). Around it, as in Titans:
    projections and causal convolutions before keys, values and queries, unit queries and keys, a
    norm per head and a gate on the output, and, with `turns`, a turn of the queries of half of the
    heads (`Turns`). The memories refine the projected keys and values, M(z) = z + ...; without
    `projections` they make them from the layer's input alone, as printed, and the query has the
    only static projection.

    Args:
        config: sizes and options of the model.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, d, hidden = config.dim, config.heads, config.head_dim, config.hidden
        projected = config.projections
        self.key = nn.Linear(dim, dim, bias=False) if projected else None
        self.key_conv = CausalConv(dim, config.conv_width)
        self.value = nn.Linear(dim, dim, bias=False) if projected else None
        self.value_conv = CausalConv(dim, config.conv_width) if projected else None
        self.query = nn.Linear(dim, dim, bias=False)
        self.query_conv = CausalConv(dim, config.conv_width)
        # The other heads track states by erasing, which a phase in the same head would disturb.
        turning = (heads + 1) // 2 if config.turns else 0
        self.turns = Turns(dim, turning, config.form.sharpness) if turning else None
        self.generators = InitialWeights(heads, len(GENERATORS), d, config.projection_width, 1.0)
        # W2 of mem starts with orthonormal columns times sqrt(d). A unit key is then long enough
        # for the gelu to bend, so that the features have room for more than d pairs. W1 starts at
        # zero: a key that was not written recalls nothing.
        self.memory = InitialWeights(heads, 1, d, hidden, math.sqrt(d))
        nn.init.zeros_(self.memory.w1)
        # Eta and the erasure of W2 start small, and with them the drift of the features: what was
        # written with old features is neither read nor changed well with new ones.
        self.eta_bias = nn.Parameter(torch.full((heads,), -4.0))
        # alpha starts at 0.999: half of what is written is left after 760 tokens.
        self.alpha_bias = nn.Parameter(torch.full((heads,), 7.0))
        exact = config.update == "delta"
        erases = (
            config.update != "gd" and config.max_erase is not None and (hidden > 0 or not exact)
        )
        self.erase_bias = nn.Parameter(torch.zeros(heads)) if erases else None
        self.erase_range = nn.Parameter(torch.full((heads,), -7.0)) if erases else None
        # Delta starts near 0.5, in a range up to 2. From 1, recall is learned much later.
        self.delta_bias = nn.Parameter(torch.full((heads,), -1.1)) if exact else None
        self.delta_range = nn.Parameter(torch.full((heads,), 7.0)) if exact else None
        self.theta_logit = nn.Parameter(torch.zeros(heads)) if config.momentum else None
        self.norm = nn.RMSNorm(d)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> TitansState:
        """The state before the first token of `batch` sequences."""
        config = self.config
        zeros = self.generators.weights.w2.new_zeros
        tail = zeros(batch, config.dim, config.conv_width - 1)
        turning = self.turns.heads if self.turns else 0
        return TitansState(
            MemoryState.start(self.generators.weights, batch, config.momentum),
            MemoryState.start(self.memory.weights, batch, config.momentum),
            Inputs(tail, tail, tail),
            zeros(batch, turning, dtype=torch.promote_types(tail.dtype, torch.float32)),
            (0,) * batch,
        )

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, TitansState]:
        """Mix x (batch, tokens, dim); return outputs of the same shape and the state after them.

        Args:
            x: inputs.
            state: the state after earlier tokens; None for the start of a text.
            lengths: number of real tokens in each sequence, when sequences are padded on the
                right; None if there is no padding.
        """
        config = self.config
        batch, width = x.shape[:2]
        if state is None:
            state = self.initial_state(batch)
        inputs, tails = self._inputs(x, state.tails, lengths)
        phase = state.phase
        if self.turns is not None:
            query, phase = self.turns(x, inputs.query, phase, lengths)
            inputs = inputs._replace(query=query)
        period = math.lcm(config.memory_chunk, config.projection_chunk)
        counts = lengths or (width,) * batch
        position, valid, grid = state.positions[0], None, None
        # Differences, not remainders, so that one compiled step serves every position of a text.
        if lengths is not None or any((p - position) % period for p in state.positions[1:]):
            grid = Grid.of(state.positions, counts, period, width, x.device)
            position, valid = grid.position, grid.valid
            inputs = Inputs(*(grid.spread(u) for u in inputs))
        out, generators, memory = self_modifying(
            inputs,
            state.generators,
            state.memory,
            self._initial(),
            self.gates(),
            config.form,
            position=position,
            valid=valid,
        )
        if grid is not None:
            out = grid.collect(out)
        mixed = self.norm(out.permute(0, 3, 1, 2)).flatten(-2)
        y = self.output(mixed * F.silu(self.gate(x)))
        positions = tuple(p + n for p, n in zip(state.positions, counts, strict=True))
        return y, TitansState(generators, memory, tails, phase, positions)

    def _inputs(
        self, x: Tensor, tails: Inputs, lengths: tuple[int, ...] | None
    ) -> tuple[Inputs, Inputs]:
        """What the memories see of x (batch, tokens, dim), and the convolutions' new tails."""
        key = x if self.key is None else self.key(x)
        key, key_tail = self.key_conv(key.mT, tails.key, lengths)
        query, query_tail = self.query_conv(self.query(x).mT, tails.query, lengths)
        value, value_tail = key, tails.value
        if self.value is not None and self.value_conv is not None:
            value, value_tail = self.value_conv(self.value(x).mT, tails.value, lengths)
        heads = (self.config.heads, self.config.head_dim)
        key, value, query = (u.unflatten(1, heads) for u in (key, value, query))
        inputs = Inputs(F.silu(key), F.silu(value), unit(query))
        return inputs, Inputs(key_tail, value_tail, query_tail)

    def _initial(self) -> Initial:
        if self.config.retention == "zero":
            return Initial(None, None)
        return Initial(self.generators.weights, self.memory.weights)

    def gates(self) -> Gates:
        """The parameters that turn generated channels into rates; zeros where a form has none."""
        unused = torch.zeros_like(self.eta_bias)
        return Gates(
            self.eta_bias,
            self.alpha_bias,
            unused if self.erase_bias is None else self.erase_bias,
            unused if self.delta_bias is None else self.delta_bias,
            unused if self.erase_range is None else self.erase_range,
            unused if self.delta_range is None else self.delta_range,
            self.theta_logit,
        )
