"""What a step promises on a GPU, for every class of the registry."""

import pytest
import torch
from torch import nn

import deepopt
from tests.gpu import DEVICE, captured, capturing_allowed, needs_gpu, no_waiting
from tests.optim.contract.helpers import (
    DEFAULT,
    EXPECTED_WARNINGS,
    LITERAL,
    SETTLED,
    Wrapped,
    label,
    refuses_capturable,
    values,
)

pytestmark = [needs_gpu, EXPECTED_WARNINGS]
# Sides of 64 and more are orthogonalized in half precision, smaller ones in float32.
SHAPES = [(64, 192), (64, 192), (192, 64), (24, 32), (7,), ()]
SMALL = [(24, 32), (32, 24), (24, 32), (7,)]
EVERY_CASE = [case for case in SETTLED + LITERAL if case[0] is not Wrapped]
EVERY_CLASS = [cls for cls in DEFAULT if cls is not Wrapped]

every = pytest.mark.parametrize(("cls", "options"), EVERY_CASE, ids=label)
every_class = pytest.mark.parametrize("cls", EVERY_CLASS, ids=label)


def stream(shapes, steps, seed=1):
    """The same gradients on every device."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [torch.randn(shape, generator=generator) for shape in shapes]


def start(shapes, device=DEVICE, dtype=torch.float32):
    return [nn.Parameter(x.to(device, dtype)) for x in next(stream(shapes, 1, seed=0))]


def feed(optimizer, params, gradients):
    for grads in gradients:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param)
        optimizer.step()


@every
def test_a_replayed_graph_is_the_eager_step(cls, options, monkeypatch):
    if refuses_capturable(cls, options):
        pytest.skip("this memory decides on the host, and says so: nothing to capture")
    found = []
    for replayed in (True, False):
        params = start(SHAPES)
        static = [torch.zeros_like(param) for param in params]
        for param, grad in zip(params, static, strict=True):
            param.grad = grad
        lr = torch.tensor(1e-2, device=DEVICE)
        with capturing_allowed(monkeypatch):
            optimizer = cls(params, **{**options, "lr": lr}, capturable=True)
            play = captured(optimizer.step) if replayed else optimizer.step
            if not replayed:
                for _ in range(3):  # as the warm-up did, with gradients of zero
                    optimizer.step()
            for index, grads in enumerate(stream(SHAPES, 6)):
                for mine, grad in zip(static, grads, strict=True):
                    mine.copy_(grad)
                lr.fill_(1e-2 / (1 + index))
                play()
        found.append(values(params))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@every
def test_no_step_waits_for_the_device(cls, options):
    params = start(SHAPES)
    optimizer = cls(params, **options)
    feed(optimizer, params, stream(SHAPES, 2))  # makes state and chooses kernels
    for _ in range(12):
        with no_waiting():
            optimizer.step()
    assert all(param.isfinite().all() for param in params)


@every
def test_steps_in_float32_follow_those_of_the_cpu(cls, options):
    found = []
    for device in ("cpu", DEVICE):
        params = start(SMALL, device)
        feed(cls(params, **options), params, stream(SMALL, 4))
        found.append([x.cpu() for x in values(params)])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@every
def test_grad_scaler_unscales_and_skips_a_step_with_infinite_gradients(cls, options):
    for fused in (None, True):
        params, twins = start(SMALL), start(SMALL)
        optimizer, plain = (cls(p, **options, fused=fused) for p in (params, twins))
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
        scaler.scale(torch.zeros((), device=DEVICE))  # makes the scale
        for grads in stream(SMALL, 3):
            before = values(params)
            for poisoned in (True, False):
                scale = scaler.get_scale()
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.to(DEVICE) * scale
                if poisoned:
                    params[0].grad[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                if poisoned:
                    assert all(map(torch.equal, values(params), before))
            feed(plain, twins, [grads])
        torch.testing.assert_close(values(params), values(twins), rtol=1e-4, atol=1e-5)


@every_class
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
def test_bfloat16_parameters_are_rounded_as_on_the_cpu(cls, rounding):
    found = []
    for device in ("cpu", DEVICE):
        params = start(SMALL, device, torch.bfloat16)
        feed(cls(params, rounding=rounding), params, stream(SMALL, 4))
        found.append([x.cpu().float() for x in values(params)])
    for ours, theirs in zip(*found, strict=True):
        # What is rounded differs in its last place, and now and then falls to the other side.
        assert (ours == theirs).float().mean() >= (0.9 if ours.numel() > 100 else 0.5)
        assert ((ours - theirs).abs() <= 2.0**-6 * theirs.abs() + 1e-6).all()


@every
def test_checkpoints_go_from_device_to_device(cls, options):
    for source, target in (("cpu", DEVICE), (DEVICE, "cpu")):
        params = start(SMALL, source)
        optimizer = cls(params, **options)
        gradients = list(stream(SMALL, 4))
        feed(optimizer, params, gradients[:2])
        moved = [nn.Parameter(x.to(target)) for x in values(params)]
        loaded = cls(moved, **options)
        loaded.load_state_dict(optimizer.state_dict())
        for state in loaded.state.values():
            assert {x.device.type for k, x in state.items() if k != "step" and x.dim()} <= {
                torch.device(target).type
            }
        feed(optimizer, params, gradients[2:])
        feed(loaded, moved, gradients[2:])
        torch.testing.assert_close(
            [x.cpu() for x in values(params)], [x.cpu() for x in values(moved)],
            rtol=1e-3, atol=1e-4,
        )  # fmt: skip


def test_a_model_trains_in_mixed_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(DEVICE)
    optimizer = deepopt.DeepMomentum(deepopt.param_groups(model), lr=3e-3)
    inputs = torch.randn(256, 64, device=DEVICE)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = (model(inputs) - inputs.sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0]
