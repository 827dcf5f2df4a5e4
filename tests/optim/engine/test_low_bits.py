"""A group's ``rounding``: how steps reach bfloat16 parameters, on the matrix and other paths."""

import copy
import io

import pytest
import torch

import deepopt
from deepopt.ops import backend
from deepopt.optim.engine.low_bits import lows_and_seeds

CLASSES = [deepopt.DeepMomentum, deepopt.M3, deepopt.DMGD, deepopt.DeltaMomentum]
SHAPES = [(24, 32), (7,), (3, 5)]


class Run:
    def __init__(self, cls, rounding="nearest", dtype=torch.bfloat16, lr=1e-5, shapes=SHAPES):
        generator = torch.Generator().manual_seed(0)
        start = [torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes]
        self.params = [value.requires_grad_() for value in start]
        self.start = [param.detach().clone() for param in self.params]
        self.optimizer = cls(self.params, lr=lr, weight_decay=0.1, rounding=rounding, path="auto")

    def step(self, count=1, first=0):
        for seed in range(first, first + count):
            for index, param in enumerate(self.params):
                generator = torch.Generator().manual_seed(100 * seed + index)
                grad = torch.rand(param.shape, generator=generator)
                param.grad = grad.bfloat16().to(param.dtype)
            self.optimizer.step()
        return self

    def values(self):
        """What the parameters stand for, with the bits beside them."""
        values = []
        for param in self.params:
            low = self.optimizer.state[param].get("low")
            if low is None:
                values.append(param.detach().float())
            else:
                high = param.detach().view(torch.int16).int() << 16
                values.append((high + low.int()).view(torch.float32))
        return values


def same(left, right):
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("cls", CLASSES)
def test_small_steps_are_lost_to_the_nearest_and_kept_otherwise(cls):
    lost, kept, likely = (Run(cls, r).step(4) for r in ("nearest", "exact", "stochastic"))
    wide = Run(cls, dtype=torch.float32).step(4)
    for index, start in enumerate(wide.start):
        moved = (wide.values()[index] - start).mean()
        assert moved < 0
        large = start.abs() > 1 / 16  # beside which the steps are small
        assert torch.equal(lost.values()[index][large], start[large])
        assert not torch.equal(likely.values()[index], start) or start.numel() < 100
    assert same(kept.values(), wide.values())


def test_stochastic_rounding_is_right_on_average():
    shapes = {"shapes": [(300, 300), (90_000,)], "lr": 1e-3}
    run = Run(deepopt.DeepMomentum, "stochastic", **shapes).step(4)
    wide = Run(deepopt.DeepMomentum, dtype=torch.float32, **shapes).step(4)
    for found, exact, start in zip(run.values(), wide.values(), wide.start, strict=True):
        error, moved = (found - exact).mean(), (exact - start).mean()
        assert abs(error) < 0.1 * abs(moved)


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_run_repeats_resumes_and_is_copied_bit_for_bit(cls, rounding):
    run, again = Run(cls, rounding).step(2), Run(cls, rounding).step(2)
    file = io.BytesIO()
    torch.save((run.optimizer.state_dict(), run.params), file)
    file.seek(0)
    saved, params = torch.load(file, weights_only=True)
    resumed = Run(cls)
    with torch.no_grad():
        for param, value in zip(resumed.params, params, strict=True):
            param.copy_(value)
    resumed.optimizer.load_state_dict(saved)
    copied = copy.deepcopy(again)
    for other in (again, resumed, copied):
        other.step(2, first=2)
    expected = run.step(2, first=2)
    for other in (again, resumed, copied):
        assert same(other.values(), expected.values())
        assert same([p.detach() for p in other.params], [p.detach() for p in expected.params])


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
def test_a_parameter_is_rounded_the_same_whatever_else_is_stepped(rounding):
    together = Run(deepopt.DeepMomentum, rounding).step(3)
    for index, shape in enumerate(SHAPES):
        alone = Run(deepopt.DeepMomentum, rounding)
        alone.optimizer = deepopt.DeepMomentum(
            [alone.params[index]], lr=1e-5, weight_decay=0.1, rounding=rounding
        )
        for param in alone.params:
            alone.optimizer.state.setdefault(param, {})
        alone.step(3)
        assert alone.params[index].shape == shape
        assert torch.equal(alone.params[index], together.params[index])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("foreach", [None, True])
def test_kernels_torch_and_the_reference_round_alike(rounding, foreach):
    def run(forced):
        made = Run(deepopt.DeepMomentum, rounding)
        made.optimizer.param_groups[0]["foreach"] = foreach
        if forced is None:
            return made.step(3).values()
        with backend(forced):
            return made.step(3).values()

    for found, expected in zip(run(None), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


def test_a_skipped_step_changes_no_bit():
    run = Run(deepopt.DeepMomentum, "exact").step(1)
    before = run.values()
    run.optimizer.grad_scale, run.optimizer.found_inf = torch.ones(()), torch.ones(())
    run.step(1)
    assert same(run.values(), before)


def test_the_rounding_can_change_in_mid_run():
    run = Run(deepopt.DeepMomentum).step(1)
    run.optimizer.param_groups[0]["rounding"] = "exact"
    run.step(2, first=1)
    assert all(run.optimizer.state[param]["low"].any() for param in run.params[:2])
    run.optimizer.param_groups[0]["rounding"] = "nearest"
    run.step(1, first=3)
    other = Run(deepopt.DeepMomentum)
    other.optimizer.load_state_dict(run.optimizer.state_dict())


def test_other_dtypes_keep_no_low_bits():
    run = Run(deepopt.DeepMomentum, "exact", dtype=torch.float32).step(1)
    assert all("low" not in state for state in run.optimizer.state.values())


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
def test_float16_is_refused_when_it_is_given_and_when_it_becomes_so(rounding):
    refused = f"Invalid rounding: '{rounding}' for a float16 parameter of shape .*bfloat16"
    with pytest.raises(ValueError, match=refused):
        deepopt.DeepMomentum([torch.zeros(20, 20, dtype=torch.float16)], rounding=rounding)
    param = torch.nn.Parameter(torch.zeros(20, 20))
    optimizer = deepopt.DeepMomentum([param], rounding=rounding)
    param.data = param.data.half()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=refused):
        optimizer.step()
    assert not param.any()


@pytest.mark.parametrize("cls", CLASSES)
def test_what_cannot_be_is_refused_by_name(cls):
    param = [torch.zeros(20, 20)]
    with pytest.raises(ValueError, match="Invalid rounding: 'up'; choose from"):
        cls(param, rounding="up")
    with pytest.raises(RuntimeError, match="`differentiable` does not support rounding='exact'"):
        cls(param, rounding="exact", differentiable=True)
    with pytest.raises(RuntimeError, match="`capturable` does not support rounding='stochastic'"):
        cls(param, rounding="stochastic", capturable=True)


def test_seeds_of_the_largest_parameters_fit_an_operator():
    param = torch.empty(2**31, 3, dtype=torch.bfloat16, device="meta")
    _, (seed,) = lows_and_seeds([param], [{"step": torch.ones(())}], {"rounding": "stochastic"})
    assert 0 <= seed < 2**63
