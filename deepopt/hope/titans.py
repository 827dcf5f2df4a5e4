"""Self-modifying Titans: the sequence mixer of Hope (Eqs 83-91, 94)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.hope.config import HopeConfig
from deepopt.hope.memory import GENERATORS, MEMORIES, Gates, MemoryState, self_modifying, unit


class TitansState(NamedTuple):
    """All that a layer remembers of the tokens so far.

    Attributes:
        generators: the four memories that generate keys, values, etas and alphas.
        memory: the memory that answers queries.
        input_tail: last `conv_width - 1` inputs of the input convolution, (batch, dim, .).
        query_tail: the same for the query convolution.
        position: tokens seen.
    """

    generators: MemoryState
    memory: MemoryState
    input_tail: Tensor
    query_tail: Tensor
    position: int


class CausalConv(nn.Module):
    """Depthwise causal convolution over (batch, dim, tokens) that can go on where it stopped.

    Args:
        dim: number of channels.
        width: tokens that an output sees, itself included.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        # The last tap is the token itself: starts as the identity with a little of the past.
        weight = torch.randn(dim, 1, width) * 0.1
        weight[..., -1] += 1.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([tail, x], -1)
        out = F.conv1d(padded, self.weight, groups=x.shape[1])
        return out, padded[..., x.shape[-1] :]


class SelfModifyingTitans(nn.Module):
    """Memories that generate their own keys, values and learning rates, and rewrite themselves.

    See `deepopt.hope.memory` for the update rule. Around it, as in Titans: causal convolutions
    before the memories' input and after the static query projection (the only one: k, v, eta and
    alpha come from memories), unit queries and keys, a norm per head and a gate on the output.

    Args:
        config: sizes and options of the model.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        dim, heads, d, hidden = config.dim, config.heads, config.head_dim, config.hidden
        self.input_conv = CausalConv(dim, config.conv_width)
        self.query = nn.Linear(dim, dim, bias=False)
        self.query_conv = CausalConv(dim, config.conv_width)
        # Where every sequence starts; learned by the outer loop (heads, memories, ., .).
        self.initial_w2 = nn.Parameter(torch.randn(heads, len(MEMORIES), hidden, d) / math.sqrt(d))
        self.initial_w1 = nn.Parameter(
            torch.randn(heads, len(MEMORIES), d, hidden) / math.sqrt(hidden)
        )
        self.eta_bias = nn.Parameter(torch.zeros(heads))
        # alpha starts at 0.999: at 0.993 the weights fade to zero within 2048 tokens, and a memory
        # of zeros has no gradient to come back with.
        self.alpha_bias = nn.Parameter(torch.full((heads,), 7.0))
        self.theta_logit = nn.Parameter(torch.zeros(heads)) if config.momentum else None
        self.norm = nn.RMSNorm(d)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> TitansState:
        """The state before the first token of `batch` sequences."""
        split = len(GENERATORS)
        momentum = self.config.momentum
        tail = self.initial_w2.new_zeros(batch, self.config.dim, self.config.conv_width - 1)
        return TitansState(
            MemoryState.start(
                self.initial_w2[:, :split], self.initial_w1[:, :split], batch, momentum
            ),
            MemoryState.start(
                self.initial_w2[:, split:], self.initial_w1[:, split:], batch, momentum
            ),
            tail,
            tail,
            0,
        )

    def forward(self, x: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """Mixes x (batch, tokens, dim); gives the outputs, same shape, and the state after them."""
        config = self.config
        if state is None:
            state = self.initial_state(x.shape[0])
        z, input_tail = self.input_conv(x.mT, state.input_tail)
        q, query_tail = self.query_conv(self.query(x).mT, state.query_tail)
        per_head = (config.heads, config.head_dim)
        out, generators, memory = self_modifying(
            F.silu(z).unflatten(1, per_head),
            unit(q.unflatten(1, per_head)),
            state.generators,
            state.memory,
            Gates(self.eta_bias, self.alpha_bias, self.theta_logit, config.max_inner_lr),
            memory_chunk=config.memory_chunk,
            projection_chunk=config.projection_chunk,
            position=state.position,
        )
        mixed = self.norm(out.permute(0, 3, 1, 2)).flatten(-2)
        y = self.output(mixed * F.silu(self.gate(x)))
        position = state.position + x.shape[1]
        return y, TitansState(generators, memory, input_tail, query_tail, position)
