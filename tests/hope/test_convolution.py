"""The short causal convolution: torch's own, in pieces, with its derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepopt.hope.convolution import CausalConv, causal_conv, causal_conv_gradient
from deepopt.ops import backend
from deepopt.ops.operator import UNAVAILABLE

BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif("cpu" in UNAVAILABLE, reason="not built")),
]


def inputs(width: int, tokens: int = 37) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(width)
    padded = torch.randn(2, 3, tokens + width - 1, generator=g, dtype=torch.float64)
    weight = torch.randn(3, width, generator=g, dtype=torch.float64)
    return padded.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("width", [1, 4, 7])
def test_it_and_its_gradients_are_those_of_torchs_convolution(
    width: int, tokens: int, name: str
) -> None:
    padded, weight = given = inputs(width, tokens)
    expected = F.conv1d(padded, weight.unsqueeze(1), groups=3)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    with backend(name):
        found = causal_conv(padded, weight)
        torch.testing.assert_close(found, expected)
        theirs = torch.autograd.grad(expected, given, grad)
        torch.testing.assert_close(torch.autograd.grad(found, given, grad), theirs)
        alone = causal_conv_gradient(grad, padded.detach(), weight.detach())
        torch.testing.assert_close(alone, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forward-mode gradcheck imports jit
@pytest.mark.parametrize("name", BACKENDS)
def test_second_and_forward_derivatives_and_single_examples_agree(name: str) -> None:
    padded, weight = given = inputs(3, 5)
    with backend(name):
        assert torch.autograd.gradgradcheck(causal_conv, given)
        assert torch.autograd.gradcheck(causal_conv, given, check_forward_ad=True)
        one: Any = lambda w, row: causal_conv(row[None], w).square().sum()  # noqa: E731
        each = torch.func.vmap(torch.func.grad(one), (None, 0))(weight.detach(), padded.detach())
    losses = [one(weight, row) for row in padded]
    expected = torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])
    torch.testing.assert_close(each, expected)


def test_pieces_with_their_tails_are_the_whole() -> None:
    conv, x = CausalConv(3, 4).double(), inputs(1)[0]
    tail = x.new_zeros(2, 3, 3)
    whole, end = conv(x, tail)
    pieces = []
    for piece in x.split([1, 2, 9, 25], -1):
        out, tail = conv(piece, tail)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, -1), whole)
    assert torch.equal(tail, end)
    _, ends = conv(x, x.new_zeros(2, 3, 3), lengths=(30, 2))
    assert torch.equal(ends[0], x[0, :, 27:30])
    assert torch.equal(ends[1], F.pad(x[1, :, :2], (1, 0)))
