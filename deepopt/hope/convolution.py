"""The short causal convolution of Hope's inputs, with an operator for its arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt.ops.operator import operator


class CausalConv(nn.Module):
    """Depthwise causal convolution over (batch, dim, tokens) that can go on where it stopped.

    Args:
        dim: number of channels.
        width: tokens that an output sees, itself included.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        # Initialized as torch's convolutions are. From the identity with a little noise, a model
        # takes hundreds of steps before it looks at earlier tokens.
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(dim, 1, width).uniform_(-bound, bound))

    def forward(
        self, x: Tensor, tail: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        return convolved(x, tail, self.weight, lengths)


def convolved(
    x: Tensor, tail: Tensor, weight: Tensor, lengths: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The depthwise causal convolution of x (batch, dim, tokens), and its new tail.

    Args:
        x: inputs.
        tail: the inputs before, (batch, dim, width - 1).
        weight: (dim, 1, width).
        lengths: number of real tokens in each sequence, when sequences are padded on the
            right; None if there is no padding.
    """
    padded, tokens = torch.cat([tail, x], -1), x.shape[-1]
    out = causal_conv(padded, weight[:, 0].to(padded.dtype))
    if lengths is None:
        # A copy, because a view would keep all the tokens before the tail in memory.
        return out, padded[..., tokens:].clone(memory_format=torch.contiguous_format)
    width = tail.shape[-1]
    ends = [row[..., n : n + width] for row, n in zip(padded, lengths, strict=True)]
    return out, torch.stack(ends)


def _supports(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(x.dtype == dtype for x in tensors)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return causal_conv_gradient(grad, *ctx.saved_tensors)


@operator("(Tensor padded, Tensor weight) -> Tensor", _supports, gradient=(_save, _backward))
def causal_conv(padded: Tensor, weight: Tensor) -> Tensor:
    """The sums of every `width` neighbors of a channel, weighted.

    Args:
        padded: inputs with those before them, (batch, dim, tokens + width - 1).
        weight: (dim, width), the last for the newest token.

    Returns:
        (batch, dim, tokens).

    Cost: the kernel reads the inputs once from memory; torch's operations read them `width` times.
    """
    width = weight.shape[1]
    tokens = padded.shape[-1] - width + 1
    if tokens == 1:  # fewer calls, which are what a decoded token costs
        return (padded * weight).sum(-1, keepdim=True)
    # This is as fast as torch's convolution, which inductor compiles for one length alone.
    out = padded[..., :tokens] * weight[:, :1]
    for i in range(1, width):
        out = torch.addcmul(out, padded[..., i : i + tokens], weight[:, i : i + 1])
    return out


@operator("(Tensor grad, Tensor padded, Tensor weight) -> (Tensor, Tensor)", _supports)
def causal_conv_gradient(grad: Tensor, padded: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `causal_conv` for its two tensors, from the gradient of its result."""
    width = weight.shape[1]
    around = F.pad(grad, (width - 1, width - 1))
    d_padded = causal_conv.reference(around, weight.flip(1))
    windows = padded.unfold(-1, grad.shape[-1], 1)  # (batch, dim, width, tokens)
    return d_padded, torch.einsum("bdt,bdwt->dw", grad, windows)
