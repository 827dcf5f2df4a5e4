"""Gradient scaling, ``torch.compile`` and functional use."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.lr_scheduler import LambdaLR

import deepopt
from deepopt.optim import base
from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    assert_same,
    backward,
    every,
    every_class,
    gradient_stream,
    make_model,
    run,
    states,
    values,
)

pytestmark = EXPECTED_WARNINGS


@every
@pytest.mark.parametrize("fused", [None, True], ids=["unfused", "fused"])
def test_grad_scaler_unscales_and_skips_a_step_with_infinite_gradients(cls, options, fused):
    model, twin = make_model(), make_model()
    optimizer = cls(model.parameters(), **options, fused=fused)
    plain = cls(twin.parameters(), **options, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(step, poison=False):
        optimizer.zero_grad()
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(inputs) - 1).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = torch.inf
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            assert_same([p.grad for p in model.parameters()], grads)

    for step in range(3):
        scaled_step(step)
        assert_near(values(model.parameters()), run(twin, plain, 1, first=step))
        before = values(model.parameters()), states(optimizer)
        scaled_step(step, poison=True)
        assert_same(values(model.parameters()), before[0])
        assert_same(states(optimizer), before[1])


@every_class
def test_narrow_gradients_are_unscaled_in_float32(cls):
    """The fused protocol hands over scaled gradients, whose true values float16 does not hold."""
    narrow = nn.Parameter(torch.zeros(20, 24, dtype=torch.float16))
    wide = nn.Parameter(torch.zeros(20, 24))
    optimizer, reference = cls([narrow], fused=True), cls([wide])
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("the scaler unscales for it")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    ((true,),) = gradient_stream([(20, 24)], 1)
    narrow.grad = (true * 1e-7 * 2**16).half()
    wide.grad = narrow.grad.float() / 2**16
    optimizer.step()
    reference.step()
    assert_near(states(optimizer), states(reference), atol=0.0, rtol=1e-5)
    torch.testing.assert_close(narrow.detach(), wide.detach().half())


@every_class
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_compiled_training_step_does_not_recompile_when_the_rate_changes(cls, tensor_lr):
    torch._dynamo.reset()
    model, twin = make_model(), make_model()
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    optimizer, plain = cls(model.parameters(), lr=lr), cls(twin.parameters(), lr=1e-2)
    backend = CompileCounterWithBackend("aot_eager")
    inputs = torch.randn(64, 16)  # gradients of full rank

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        optimizer.step()

    compiled = torch.compile(step, backend=backend)
    schedules = [LambdaLR(o, lambda step: 0.9**step) for o in (optimizer, plain)]
    counts = []
    for _ in range(5):
        compiled(model, optimizer)
        step(twin, plain)
        for schedule in schedules:
            schedule.step()
        counts.append(backend.frame_count)
    assert counts[0] >= 1
    assert counts[1:] == counts[1:2] * 4
    assert_near(values(model.parameters()), values(twin.parameters()), 1e-5, 1e-3)


@every
def test_functional_use_is_the_same_run_and_writes_into_nothing(cls, options):
    if not issubclass(cls, base.MemoryOptimizer):
        pytest.skip("a wrapper is no rule of its own")
    model, twin = make_model(), make_model()
    optimizer = cls(model.named_parameters(), **options)
    init, update = deepopt.functional(cls, **options)
    params = {name: param.detach() for name, param in twin.named_parameters()}
    state = init(params)
    for step in range(4):
        run(model, optimizer, 1, first=step)
        twin.load_state_dict(params)
        twin.zero_grad()
        backward(twin, step)
        grads = {name: param.grad for name, param in twin.named_parameters()}
        before = copy.deepcopy((grads, state, params))
        new_params, new_state = update(grads, state, params)
        for given, kept in zip((grads, params), before[::2], strict=True):
            assert_same(given.values(), kept.values())
        for name in state:
            assert_same(state[name].values(), before[1][name].values())
        params, state = new_params, new_state
    assert_near(params.values(), values(model.parameters()), 1e-5, 1e-3)
