"""A small decoder-only Transformer: the second model of the swap benchmark, called like Hope."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepopt.hope.attention import rotate, rotations


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the model.

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads; divides ``dim`` into even widths, as rotation needs.
        expansion: hidden width of the MLP, in units of ``dim``.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 3
    heads: int = 4
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(f"heads={self.heads} must divide dim={self.dim} into even widths")


class Output(NamedTuple):
    """Logits (batch, tokens, vocab_size), and the mean cross entropy in nats or None."""

    logits: Tensor
    loss: Tensor | None

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor | None) -> "Output":
        if targets is None:
            return cls(logits, None)
        return cls(logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm causal attention with normalized, rotated queries and keys, and a GELU MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = MLP(dim, config.expansion * dim)
        for last in (self.out, self.mlp.down):
            nn.init.zeros_(last.weight)  # every block starts as the identity

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        z = self.attention_norm(x)
        q, k, v = (
            project(z).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q, k = (rotate(F.rms_norm(t, t.shape[-1:]), cos, sin) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Tokens (B, T) in, logits (B, T, vocab) and the mean cross entropy in nats out."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        nn.init.zeros_(self.head.weight)  # the first loss is ln(vocab_size)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        x = self.embedding(tokens)
        position = torch.arange(tokens.shape[1], device=x.device)
        cos, sin = rotations(position, self.config.dim // self.config.heads, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return Output.of(self.head(self.norm(x)), targets)
