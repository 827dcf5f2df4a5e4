"""Every class of the registry with its inputs, and what the contract tests share.

An entry of ``deepopt/optim/registry.py``, with its arguments in ``inputs.py``, brings a class under
all tests of this folder.
"""

import io
import re

import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim.registry import REGISTRY
from tests.optim.contract.inputs import INPUTS

EXPECTED_WARNINGS = pytest.mark.filterwarnings("ignore:.*(captured|element-wise).*:UserWarning")


class Wrapped(deepopt.Continuum):
    """A wrapper of optimizers under the contract of what it wraps."""

    def __init__(self, params, chunk=1, reduce="mean", **options):
        super().__init__(deepopt.DeepMomentum(params, **options), chunk, reduce=reduce)


ENTRIES = [(Wrapped if e.wraps else e.cls, INPUTS[name]) for name, e in REGISTRY.items()]
SETTLED = [(cls, options) for cls, inputs in ENTRIES for options in inputs.options]
LITERAL = [(cls, options) for cls, inputs in ENTRIES for options in inputs.literal]
DEFAULT = [cls for cls, _ in ENTRIES]


def label(value):
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return ",".join(f"{key}={_short(value[key])}" for key in value) or "default"
    return None


def _short(value):
    return getattr(value, "__name__", None) or re.sub(" at 0x[0-9a-f]+", "", str(value)[:40])


every = pytest.mark.parametrize(("cls", "options"), SETTLED + LITERAL, ids=label)
every_settled = pytest.mark.parametrize(("cls", "options"), SETTLED, ids=label)
every_class = pytest.mark.parametrize("cls", DEFAULT, ids=label)


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = (nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    return nn.Sequential(*layers).to(dtype)


def backward(model, step=0, size=8):
    inputs = torch.randn(size, 16, generator=torch.Generator().manual_seed(step))
    weight = next(model.parameters())
    loss = (model(inputs.to(weight.dtype)) - 1).square().mean()
    loss.backward()
    return loss


def run(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(model.parameters())


def values(params):
    return [param.detach().clone() for param in params]


def moved(params, before):
    return all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def assert_near(found, expected, atol=2e-6, rtol=2e-4):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def states(optimizer):
    """All state tensors, in a fixed order."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            found += [state[key].clone() for key in sorted(state)]
    return found


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def gradient_stream(shapes, steps, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    kind = dtype if dtype in (torch.float64, torch.complex64) else torch.float32
    for _ in range(steps):
        yield [torch.randn(s, generator=generator, dtype=kind).to(dtype) for s in shapes]


def start_values(shapes, dtype=torch.float32, seed=0):
    return next(gradient_stream(shapes, 1, dtype, seed))


def feed(optimizer, params, stream):
    for grads in stream:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


def refuses_capturable(cls, options):
    try:
        cls([torch.zeros(1)], **options, capturable=True)
    except RuntimeError as error:
        return "does not support capturable=True" in str(error)
    return False
