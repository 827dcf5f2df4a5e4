r"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464), in plain torch.

Every head has one matrix S, (d, d), that forgets, erases what it holds at a key, and writes:

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t.

Over a chunk, what is written minus what is erased solves a unit triangular system of the chunk's
keys, so that a chunk is a few matrix products and only the chunks follow one another.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepopt.hope.convolution import CausalConv

CHUNK = 64
"""Tokens that are computed at once; it changes no number."""


class GatedDeltaNet(nn.Module):
    """The mixer: convolutions, unit queries and keys, S, a norm per head and a gate.

    Args:
        dim: width of the residual stream.
        heads: number of heads.
        conv_width: tokens seen by the causal depthwise convolutions.
        max_beta: upper end of beta. Beyond 1 eigenvalues can be negative, which tracks states.
    """

    def __init__(self, dim: int, heads: int, conv_width: int = 4, max_beta: float = 1.0) -> None:
        super().__init__()
        self.heads, self.max_beta = heads, max_beta
        self.projection = nn.Linear(dim, 3 * dim, bias=False)  # queries, keys, values
        self.conv = CausalConv(3 * dim, conv_width)
        self.rates = nn.Linear(dim, 2 * heads, bias=False)  # alpha and beta
        # As in Mamba 2: log alpha = -decay softplus(a + bias), with steps from 0.001 to 0.1.
        self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.bias = nn.Parameter(step.expm1().log())
        self.norm = nn.RMSNorm(dim // heads)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes x (batch, tokens, dim)."""
        z = self.projection(x).mT
        mixed, _ = self.conv(z, z.new_zeros(*z.shape[:2], self.conv.weight.shape[-1] - 1))
        q, k, v = F.silu(mixed).unflatten(1, (3, self.heads, -1)).mT.unbind(1)
        a, b = self.rates(x).mT.unflatten(1, (2, self.heads)).unbind(1)
        log_alpha = -self.log_decay.exp()[:, None] * F.softplus(a + self.bias[:, None])
        beta = self.max_beta * torch.sigmoid(b)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = gated_delta_rule(q, k, v, log_alpha, beta, CHUNK)
        return self.output(self.norm(out.transpose(1, 2)).flatten(-2) * F.silu(self.gate(x)))


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, chunk: int
) -> Tensor:
    """o_t of all tokens, (batch, heads, tokens, d).

    Args:
        q: queries (batch, heads, tokens, d).
        k: keys of norm 1, of the same shape.
        v: values, of the same shape.
        log_alpha: logarithms of the retentions (batch, heads, tokens).
        beta: learning rates, (batch, heads, tokens).
        chunk: tokens that are computed at once.
    """
    tokens, width = q.shape[-2:]
    size = min(chunk, tokens)
    missing = -tokens % size  # padding keeps everything and writes nothing
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, size)) for x in (q, k, v))
    log_alpha, beta = (F.pad(x, (0, missing)).unflatten(-1, (-1, size)) for x in (log_alpha, beta))

    log_b = log_alpha.cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    left = (log_b[..., :, None] - log_b[..., None, :]).masked_fill(later, -torch.inf).exp()
    since_start, to_end = log_b.exp()[..., None], (log_b[..., -1:] - log_b).exp()[..., None]
    beta = beta[..., None]
    system = (beta * k @ k.mT) * left  # `unitriangular` takes the diagonal as ones
    written, erased = torch.linalg.solve_triangular(
        system, torch.cat([beta * v, beta * since_start * k], -1), upper=False, unitriangular=True
    ).split(width, -1)
    seen, at_start, to_end = (q @ k.mT) * left, q * since_start, k * to_end
    kept = log_b[..., -1, None, None].exp()

    state, outputs = q.new_zeros(*q.shape[:2], width, width), []
    for n in range(q.shape[2]):
        columns = written[:, :, n] - erased[:, :, n] @ state
        outputs.append(at_start[:, :, n] @ state + seen[:, :, n] @ columns)
        state = kept[:, :, n] * state + to_end[:, :, n].mT @ columns
    return torch.cat(outputs, -2)[..., :tokens, :]
