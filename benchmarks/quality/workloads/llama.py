"""Next byte, a small Llama: RMSNorm, rotary attention, SwiGLU, a head that starts at random."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hope.models import SwiGLU
from benchmarks.quality import language
from benchmarks.quality.workload import workload
from deepopt.hope.attention import rotate, rotations

DIM, LAYERS, HEADS, HIDDEN = 96, 3, 4, 256


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(DIM, DIM, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotations(torch.arange(x.shape[1]), DIM // HEADS, x)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(DIM), Attention()
        self.mlp_norm, self.mlp = nn.RMSNorm(DIM), SwiGLU(DIM, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(256, DIM)
        self.layers = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(DIM)
        self.lm_head = nn.Linear(DIM, 256, bias=False)
        for module in self.modules():  # as Hugging Face's Llama starts
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.norm(self.layers(self.embed_tokens(tokens))))


def data(seed: int, step: int) -> language.Text:
    return language.batch(16, 64, seed, step)


def model() -> nn.Module:
    return Llama()


def loss(model: nn.Module, batch: language.Text) -> Tensor:
    return language.cross_entropy(model, batch)


def metrics(model: nn.Module) -> dict[str, float]:
    return language.held_out(model, 64)


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=200,
    about="next byte of the standard library's sources, a Llama of width 96 with three "
    "layers and 0.4 M parameters, batches of 16 x 64 bytes",
    sha256=lambda: language.corpus().sha256,
)
