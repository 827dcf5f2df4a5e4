"""The four flags that torch's optimizers share: foreach, fused, capturable, differentiable."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.gpu import pretend_that_cpus_capture
from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    every,
    every_settled,
    feed,
    gradient_stream,
    label,
    make_model,
    refuses_capturable,
    run,
    states,
)

pytestmark = EXPECTED_WARNINGS


@every
@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=label
)
def test_implementations_agree_in_parameters_and_state_after_every_step(cls, options, flags):
    model, twin = make_model(), make_model()
    plain, other = cls(model.parameters(), **options), cls(twin.parameters(), **options, **flags)
    for step in range(5):
        if step == 2:
            model[0].bias.requires_grad_(False), twin[0].bias.requires_grad_(False)
        assert_near(run(model, plain, 1, first=step), run(twin, other, 1, first=step))
        assert_near(states(plain), states(other), 2e-5, 2e-3)
        with torch.no_grad():  # a memory may enlarge differences in the last place of gradients
            for param, same in zip(twin.parameters(), model.parameters(), strict=True):
                param.copy_(same)


@every
def test_capturable_is_the_same_step_with_counts_on_the_device(cls, options, monkeypatch):
    params = [nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(7))]
    if refuses_capturable(cls, options):
        pytest.skip("this memory decides on the host, and says so: nothing to capture")
    optimizer = cls(params, **options, capturable=True)
    with pytest.raises(AssertionError, match="must be on supported devices"):
        feed(optimizer, params, gradient_stream([(24, 32), (7,)], 1))
    pretend_that_cpus_capture(monkeypatch)
    model, twin = make_model(), make_model()
    found = run(model, cls(model.parameters(), **options, capturable=True), 4)
    assert_near(found, run(twin, cls(twin.parameters(), **options), 4))


@every
def test_a_capturable_step_asks_the_device_for_no_value(cls, options, monkeypatch):
    """A fake tensor has no values: whatever the host wants to know of it raises."""
    if refuses_capturable(cls, options):
        pytest.skip("this memory decides on the host, and says so: nothing to capture")
    model = make_model()
    run(model, cls(model.parameters(), **options), 1)  # constants are computed once, on the host
    pretend_that_cpus_capture(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [(16, 32), (16, 32), (32, 32), (32,)]
        params = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        optimizer = cls(params, **options, capturable=True)
        feed(optimizer, params, ([torch.empty(s) for s in shapes] for _ in range(3)))
        assert {type(v) for v in states(optimizer)} == {type(params[0].detach())}


def differentiable_outcome(cls, options, start, lr, grads):
    params = [start.clone(), start[0].clone()]
    optimizer = cls(params, **{**options, "lr": lr, "differentiable": True})
    for grad in grads:
        params[0].grad, params[1].grad = grad, grad[0]
        optimizer.step()
    return params[0].sum() + params[1].square().sum()


@every
def test_the_step_is_differentiable_in_parameters_gradients_and_rate(cls, options):
    generator = torch.Generator().manual_seed(0)
    inputs = list(torch.randn(3, 16, 17, dtype=torch.float64, generator=generator))
    inputs.append(torch.tensor(0.01, dtype=torch.float64))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda start, first, second, lr: differentiable_outcome(
            cls, options, start, lr, (first, second)
        ),
        inputs,
        fast_mode=True,
    )


@every_settled
def test_a_learning_rate_is_learned_through_ten_steps(cls, options):
    """Optimizing the optimizer: from a rate far too small, by gradient descent on the outcome."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    sign = -1 if options.get("maximize") else 1
    log_lr = torch.tensor(-7.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([log_lr], lr=0.5)
    losses = []
    for _ in range(15):
        weight = torch.zeros_like(target).requires_grad_().clone()
        flags = {"lr": log_lr.exp(), "weight_decay": 0, "differentiable": True}
        inner = cls([weight], **{**options, **flags})
        for _ in range(10):
            weight.grad = sign * (weight - target)
            inner.step()
        loss = (weight - target).square().mean()
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
