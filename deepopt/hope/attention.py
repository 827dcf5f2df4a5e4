"""Causal softmax attention with rotary positions, the mixer of Transformers and Hope-Attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.hope.state import AttentionState


class Attention(nn.Module):
    """Causal multi-head softmax attention with rotary positions (RoPE).

    Each token attends to the tokens of its own text, up to and including itself.

    Args:
        dim: width of the residual stream.
        heads: attention heads; divides `dim` into even widths, as rotation needs.

    Raises:
        ValueError: `heads` does not divide `dim` into even widths.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % (2 * heads):
            raise ValueError(f"heads={heads} must divide dim={dim} into even widths")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> AttentionState:
        """The state before the first token of `batch` texts: no keys and no values."""
        weight = self.key.weight
        nothing = weight.new_zeros(batch, self.heads, 0, weight.shape[0] // self.heads).detach()
        return AttentionState(nothing, nothing, (0,) * batch)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """Mix x (batch, tokens, dim); return outputs of the same shape and the state after them.

        Args:
            x: inputs.
            state: the state after earlier tokens; None for the start of a text.
            lengths: number of real tokens in each sequence, when sequences are padded on the
                right; None if there is no padding.
        """
        batch, tokens = x.shape[:2]
        if state is None:
            state = self.initial_state(batch)
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        counts = lengths or (tokens,) * batch
        uniform = lengths is None and all(p == state.positions[0] for p in state.positions[1:])
        # (tokens,) if all texts are equally long so far, otherwise (batch, 1, tokens).
        past = torch.tensor(state.positions[0] if uniform else state.positions, device=x.device)
        position = torch.arange(tokens, device=x.device) + (
            past if uniform else past[:, None, None]
        )
        cos, sin = rotations(position, q.shape[-1], q)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        positions = tuple(p + n for p, n in zip(state.positions, counts, strict=True))
        # Autocast may narrow new keys and values; the state keeps its dtype.
        keys = torch.cat([state.keys, k.to(state.keys.dtype)], 2)
        values = torch.cat([state.values, v.to(state.values.dtype)], 2)
        if not uniform:
            # New keys are appended after the longest text's columns. Move each key to the column
            # of its position.
            column = torch.arange(max(positions), device=x.device)
            first, width = past[:, None], state.keys.shape[2]
            index = torch.where(column < first, column, width + column - first)
            index = index.clamp(max=width + tokens - 1)[:, None, :, None]
            keys, values = (
                cached.gather(2, index.expand(-1, self.heads, -1, cached.shape[-1]))
                for cached in (keys, values)
            )
        # Column j holds the key of position j, so a query attends to the columns up to its own.
        # `from_start` is a plain bool: from a comparison, torch.compile would make one graph per
        # length.
        seen, from_start = None, False
        if uniform and state.positions[0] == 0:
            from_start = True
        elif not (uniform and tokens == 1):
            seen = torch.arange(keys.shape[2], device=x.device) <= position.unsqueeze(-1)
        mixed = F.scaled_dot_product_attention(
            q, keys.to(q.dtype), values.to(q.dtype), attn_mask=seen, is_causal=from_start
        )
        y = self.output(mixed.transpose(1, 2).flatten(-2))
        return y, AttentionState(keys, values, positions)


def rotations(position: Tensor, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions (..., tokens), both (..., tokens, width // 2).

    Args:
        position: integers.
        width: channels of a head; every pair turns at a rate of its own, from 1 down to 1e-4.
        like: a tensor with the device and dtype of the result.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    rates = 10_000 ** -torch.linspace(0, 1, width // 2, device=like.device, dtype=dtype)
    angles = position.unsqueeze(-1) * rates
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + width / 2) of x (..., tokens, width) by their angles (RoPE)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
