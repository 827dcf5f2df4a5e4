"""The element-wise path is torch's AdamW, bit for bit."""

import pytest
import torch
from torch import nn

from deepopt import DeepMomentum

ARGUMENTS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}


def trajectory(make, dtype=torch.float32, steps=6, layout=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (7,), (5, 3), (3, 4, 5), (0, 3)]
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = make(params, **ARGUMENTS, **arguments)
    for step in range(steps):
        for index, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator).to(dtype)
            param.grad = None if step == 2 and index == 1 else grad
            if layout == "transposed" and param.ndim == 2 and param.grad is not None:
                param.grad = param.grad.mT.contiguous().mT
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("arguments", [{}, {"foreach": True}, {"maximize": True}])
def test_it_equals_adamw_bit_for_bit(dtype, arguments):
    found = trajectory(DeepMomentum, dtype, **arguments)
    for ours, theirs in zip(found, trajectory(torch.optim.AdamW, dtype, **arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_fused_equals_fused_adamw_bit_for_bit():
    found = trajectory(DeepMomentum, fused=True)
    for ours, theirs in zip(found, trajectory(torch.optim.AdamW, fused=True), strict=True):
        assert torch.equal(ours, theirs)


def test_fused_is_right_where_gradients_lie_in_another_order_than_parameters():
    """torch 2.13's own fused CPU kernel is not: conventions of AdamW(fused=True) on the CPU."""
    found = trajectory(DeepMomentum, fused=True, layout="transposed")
    for ours, exact in zip(found, trajectory(torch.optim.AdamW, layout="transposed"), strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-6, rtol=1e-5)


def test_fused_is_right_where_the_parameter_is_a_strided_view():
    def run(make, **flags):
        param = torch.linspace(-1, 1, 24).view(4, 6)[:, ::2].requires_grad_()
        optimizer = make([param], lr=0.1, **flags)
        for step in range(3):
            param.grad = torch.linspace(1, 2 + step, 12).view(4, 3)
            optimizer.step()
        return param.detach()

    torch.testing.assert_close(run(DeepMomentum, fused=True), run(torch.optim.AdamW))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_are_stepped_in_float32_and_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, generator=generator).to(dtype)
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours, theirs = DeepMomentum([narrow], **ARGUMENTS), torch.optim.AdamW([wide], **ARGUMENTS)
    for _ in range(4):
        narrow.grad = torch.randn(9, generator=generator).to(dtype)
        wide.grad = narrow.grad.float()
        with torch.no_grad():
            wide.copy_(narrow)
        ours.step()
        theirs.step()
        assert torch.equal(narrow.detach(), wide.detach().to(dtype))
    state = ours.state[narrow]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
