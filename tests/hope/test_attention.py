import contextlib
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepopt.hope.attention import Attention


def test_attention_is_the_weighted_mean_that_a_loop_over_tokens_takes():
    torch.manual_seed(0)
    dim, heads, width = 8, 2, 4
    layer = Attention(dim, heads).double()
    x = torch.randn(2, 7, dim, dtype=torch.float64)

    def turned(vector, position):
        """Channel i and i + width / 2 as a complex number, turned by position * 10000^-..."""
        z = torch.complex(vector[: width // 2], vector[width // 2 :])
        angle = position * torch.tensor([1.0, 1e-4], dtype=torch.float64)
        z = z * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    expected = torch.zeros_like(x)
    for b in range(2):
        for h in range(heads):
            rows = slice(h * width, (h + 1) * width)
            q, k, v = (
                (x[b] @ part.weight.T)[:, rows] for part in (layer.query, layer.key, layer.value)
            )
            for t in range(7):
                scores = torch.stack(
                    [turned(q[t], t) @ turned(k[j], j) / math.sqrt(width) for j in range(t + 1)]
                )
                expected[b, t, rows] = scores.softmax(0) @ v[: t + 1]
    torch.testing.assert_close(
        layer(x)[0], expected @ layer.output.weight.T, rtol=1e-10, atol=1e-10
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=3 must divide dim=16"):
        Attention(16, 3)


def test_a_second_derivative_is_there_where_the_forward_pass_is_in_the_context_of_the_page():
    torch.manual_seed(0)
    layer, x = Attention(8, 2).double(), torch.randn(1, 5, 8).double()

    def slope(context, at):
        """The gradient of a loss at inputs, summed."""
        with context:
            loss = layer(at)[0].pow(2).sum()
        (grad,) = torch.autograd.grad(loss, at, create_graph=True)
        return grad.sum()

    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"derivative for .*attention.* is not implemented"):
        torch.autograd.grad(slope(contextlib.nullcontext(), x), x)
    (found,) = torch.autograd.grad(slope(sdpa_kernel(SDPBackend.MATH), x), x)
    up, down = (slope(contextlib.nullcontext(), x + step) for step in (1e-6, -1e-6))
    torch.testing.assert_close(found.sum(), (up - down) / 2e-6, rtol=1e-5, atol=1e-6)
