"""Causal softmax attention with rotary positions, the mixer of Transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Every token mixes the values of the tokens up to its own, x (batch, tokens, dim) to the same.

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

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        cos, sin = rotations(x.shape[1], q.shape[-1], x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


def rotations(tokens: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of every position, (tokens, width // 2) each.

    Args:
        tokens: number of positions.
        width: channels of a head; every pair turns at a rate of its own, from 1 down to 1e-4.
        like: a tensor of the device and dtype to make.
    """
    rates = 10_000 ** -torch.linspace(0, 1, width // 2, device=like.device)
    angles = torch.outer(torch.arange(tokens, device=like.device), rates)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: channel pairs of x (..., tokens, width) turned by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
