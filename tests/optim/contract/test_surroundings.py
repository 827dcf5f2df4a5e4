"""What a user has switched on around ``step()`` changes nothing of what it computes."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import deepopt
from deepopt.memory import BUILT_IN
from deepopt.ops import backend
from tests.optim.contract.helpers import EXPECTED_WARNINGS, every_settled

pytestmark = EXPECTED_WARNINGS


class Functions(TorchFunctionMode):
    """Makes every tensor that is created a float64 one, as a careless mode may."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.zeros, torch.empty, torch.zeros_like, torch.empty_like):
            kwargs = {**(kwargs or {}), "dtype": torch.float64}
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "enabled grad": torch.enable_grad,
    "default device": lambda: torch.device("meta"),
    "default dtype": default_dtype,
    "deterministic": deterministic,
    "function mode": Functions,
    "dispatch mode": Operators,
}


def run(cls, options, surroundings, steps=4):
    generator = torch.Generator().manual_seed(0)
    shapes = [(20, 24), (20, 24), (64, 80), (5,)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = cls(params, **options)
    for number in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        with surroundings() if number in (0, 2) else nullcontext():
            optimizer.step()
    return optimizer, params


@every_settled
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_step_is_the_same_in_all_surroundings(cls, options, name):
    exact, expected = run(cls, options, nullcontext)
    optimizer, params = run(cls, options, SURROUNDINGS[name])
    for found, wanted in zip(params, expected, strict=True):
        if name == "default dtype":  # counts are of that one, as torch's are
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, wanted)
        for key, tensor in exact.state[wanted].items():
            other = optimizer.state[found][key]
            assert (other.device, other.is_inference()) == (tensor.device, False)
            assert key == "step" or other.dtype == tensor.dtype


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_motion_and_continuum_are_the_same_in_all_surroundings(name):
    def run_both(surroundings):
        motions = []

        def joined(params):
            inner = deepopt.DeepMomentum(params, lr=0.1)
            motions.append(deepopt.Motion(inner))
            return deepopt.Continuum(inner, chunk=3)  # one ends inside

        optimizer, params = run(joined, {}, surroundings, steps=7)
        held = [param.detach().clone() for param in params]
        with surroundings():
            motions[0].eval()
        memories = [optimizer.state[param]["motion"] for param in params]
        return held, params, memories, list(optimizer.pending.values())

    for found, expected in zip(run_both(SURROUNDINGS[name]), run_both(nullcontext), strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            tolerance = 1e-5 if name == "default dtype" else 0.0
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
            assert not ours.is_inference()


@pytest.mark.parametrize("memory", BUILT_IN)
@pytest.mark.parametrize("name", ["autocast", "default dtype"])
def test_the_reference_is_the_same_in_them(memory, name):
    def final(surroundings):
        with backend("reference"):
            return run(deepopt.DeepMomentum, {"memory": memory}, surroundings)[1]

    plain, changed = final(nullcontext), final(SURROUNDINGS[name])
    for found, expected in zip(changed, plain, strict=True):
        tolerance = 1e-5 if name == "default dtype" else 0.0
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


@every_settled
def test_a_state_that_is_loaded_in_inference_mode_is_an_ordinary_one(cls, options):
    saved = run(cls, options, nullcontext)[0].state_dict()
    optimizer, params = run(cls, options, nullcontext, steps=0)
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    for param in params:
        assert not any(x.is_inference() for x in optimizer.state[param].values())
        param.grad = torch.ones_like(param)
    optimizer.step()


def test_a_closure_runs_in_the_users_surroundings():
    seen = []
    param = nn.Parameter(torch.randn(20, 24))
    optimizer = deepopt.DeepMomentum([param])

    def closure():
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        param.grad = torch.ones_like(param)
        return torch.tensor(1.0)

    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        optimizer.step(closure)
    assert seen == [(True, True)]
