"""The element-wise path is torch's AdamW: the fused one's bits, or with foreach that one's."""

import pytest
import torch
from torch import nn

from deepopt import DeepMomentum
from deepopt.ops import adamw_

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
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_with_foreach_given_it_equals_adamw_bit_for_bit(dtype, foreach, maximize):
    arguments = {"foreach": foreach, "maximize": maximize}
    found = trajectory(DeepMomentum, dtype, **arguments)
    for ours, theirs in zip(found, trajectory(torch.optim.AdamW, dtype, **arguments), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("maximize", [True, False])
def test_it_equals_adamw_to_the_last_places(dtype, maximize):
    found = trajectory(DeepMomentum, dtype, maximize=maximize)
    exact = trajectory(torch.optim.AdamW, dtype, maximize=maximize)
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps * ARGUMENTS["lr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("beta1", [0.9, 0.3])
def test_it_equals_fused_adamw_bit_for_bit(dtype, fused, beta1):
    if fused is None and not adamw_.has_backend("cpu"):
        pytest.skip("without the kernel torch's own default runs")

    def run(make, flag):
        generator = torch.Generator().manual_seed(0)
        # Sizes of whole vectors: torch's kernel rounds the entries after the last one otherwise.
        params = [torch.randn(n, generator=generator, dtype=dtype) for n in (16, 96, 20_000)]
        arguments = {**ARGUMENTS, "betas": (beta1, 0.95), "fused": flag}
        optimizer = make([param.requires_grad_() for param in params], **arguments)
        for _ in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, dtype=dtype)
            optimizer.step()
        states = [optimizer.state[param] for param in params]
        kept = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step")]
        return [*params, *kept]

    for ours, theirs in zip(run(DeepMomentum, fused), run(torch.optim.AdamW, True), strict=True):
        assert torch.equal(ours, theirs)


def test_a_complex_parameter_beside_real_ones_is_stepped_as_pairs_of_reals():
    def run(make):
        params = [torch.arange(1.0, 5.0), torch.tensor([1 + 2j, -3j])]
        optimizer = make([param.requires_grad_() for param in params], **ARGUMENTS)
        for _ in range(3):
            for param in params:
                param.grad = param.detach() * (2 - 1j if param.is_complex() else 2)
            optimizer.step()
        return params

    for ours, theirs in zip(run(DeepMomentum), run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs)


class Small:
    """Small parameters, stepped beside each other for a while."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(s, generator=generator) for s in ((4, 6), (9,), (5,))]
        self.optimizer = DeepMomentum(
            [param.requires_grad_() for param in self.params], path="elementwise", **ARGUMENTS
        )
        self.generator = generator

    def step(self, count=3, without=()):
        for _ in range(count):
            for index, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=self.generator)
                param.grad = None if index in without else grad
            self.optimizer.step()
        return [param.detach().clone() for param in self.params]


def exact(plan):
    """What torch's AdamW makes of a plan of steps."""
    run = Small()
    run.optimizer = torch.optim.AdamW(run.params, **ARGUMENTS)
    for without in plan:
        found = run.step(1, without)
    return found


def check(run, plan):
    for ours, theirs in zip(run, exact(plan), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_parameters_that_rest_now_and_then_keep_their_own_state():
    run, plan = Small(), [(), (), (1,), (0, 2), (), (1,), ()]
    for without in plan:
        found = run.step(1, without)
    check(found, plan)


def test_state_that_is_replaced_or_written_to_from_outside_counts():
    run, other = Small(), Small()
    run.step(), other.step()
    for stepped, write in ((run, True), (other, False)):
        state = stepped.optimizer.state[stepped.params[1]]
        if write:
            state["exp_avg"].zero_()
        else:
            state["exp_avg"] = torch.zeros(9)
    for ours, theirs in zip(run.step(), other.step(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_loaded_state_is_stepped_and_the_one_it_replaced_is_not():
    run, other = Small(), Small()
    run.step(2), other.step(2)
    saved = run.optimizer.state_dict()
    kept = saved["state"][0]["exp_avg"].clone()
    other.optimizer.load_state_dict(saved)
    check(other.step(2), [()] * 4)
    assert torch.equal(saved["state"][0]["exp_avg"], kept)
    check(run.step(2), [()] * 4)


def test_state_survives_a_new_memory_format_of_a_parameter():
    def run(make):
        param = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        params = [param.requires_grad_(), torch.ones(3, requires_grad=True)]
        optimizer = make(params, **ARGUMENTS)
        for step in range(4):
            if step == 2:
                param.data = param.data.contiguous(memory_format=torch.channels_last)
            for p in params:
                p.grad = p.detach().cos()
            optimizer.step()
        return params

    ours = run(lambda params, **kw: DeepMomentum(params, path="elementwise", **kw))
    for found, expected in zip(ours, run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(found, expected)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.float64])
def test_gradients_of_any_dtype_are_taken(dtype, grad_dtype):
    generator = torch.Generator().manual_seed(0)
    results = []
    value = torch.randn(7, generator=generator).to(dtype)
    grad = torch.randn(7, generator=generator).to(grad_dtype)
    for foreach in (None, False):
        param = nn.Parameter(value.clone())
        if not hasattr(param, "grad_dtype"):
            pytest.skip("this torch has no gradients of another dtype")
        param.grad_dtype = grad_dtype
        param.grad = grad.clone()
        DeepMomentum([param], foreach=foreach, **ARGUMENTS).step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
