import pytest
import torch
from torch import nn

import deepopt
from tests.optim.contract.helpers import EXPECTED_WARNINGS, every_settled

pytestmark = EXPECTED_WARNINGS


def make_params():
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((32, 40), (7,), (16, 16))]
    for param in params[:2]:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def named(params):
    return list(zip(("wide", "bias", "resting"), params, strict=False))


@every_settled
def test_they_tell_what_the_step_did_and_change_nothing_of_it(cls, options):
    plain, watched = make_params(), make_params()
    optimizer, other = cls(named(watched), **options), cls(named(plain), **options)
    before = [param.detach().clone() for param in watched]
    with optimizer.diagnostics(condition_number=True) as seen:
        optimizer.step()
    other.step()
    for found, expected in zip(watched, plain, strict=True):
        assert torch.equal(found, expected)
    assert seen.keys() == {"wide", "bias"}
    for (name, param), old in zip(named(watched)[:2], before, strict=False):
        row, change = seen[name], (param.detach() - old).double()
        assert row.update == pytest.approx(change.square().mean().sqrt().item())
        assert row.parameter == pytest.approx(old.double().square().mean().sqrt().item())
        assert row.ratio == pytest.approx(row.update / row.parameter)
        descent = param.grad.double() * (1 if options.get("maximize") else -1)
        cosine = torch.nn.functional.cosine_similarity(change.flatten(), descent.flatten(), 0)
        assert row.cosine == pytest.approx(cosine.item(), abs=1e-6)
        if name == "wide" and row.path != "elementwise":
            values = torch.linalg.svdvals(change)
            assert row.condition_number == pytest.approx((values[0] / values[-1]).item(), rel=1e-6)
        assert all(isinstance(value, float) for value in row.scalars().values())


def test_outside_of_them_a_step_has_no_hooks():
    optimizer = deepopt.DeepMomentum(make_params())
    with optimizer.diagnostics():
        optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_the_delta_memory_tells_what_it_erases_and_m3_the_weight_of_its_slow_momentum():
    params = make_params()
    optimizer = deepopt.DeepMomentum(params, memory="delta")
    with optimizer.diagnostics() as seen:
        for _ in range(3):
            optimizer.step()
    expected = optimizer.state[params[0]]["erasure"].item()
    assert seen["parameter 0"].memory == {"erased": pytest.approx(expected)}
    assert seen["parameter 0"].condition_number is None
    assert seen["parameter 1"].memory == {}
    m3 = deepopt.M3(make_params(), slow_chunk=1, ramp=0, alpha=0.5)
    with m3.diagnostics() as seen:
        for _ in range(3):
            m3.step()
    assert seen["parameter 0"].scalars()["slow weight"] == 0.5


def test_a_wrapped_optimizer_has_them():
    params = make_params()
    optimizer = deepopt.Continuum(deepopt.DeepMomentum(params), chunk=2)
    with optimizer.diagnostics() as seen:
        optimizer.step()
        assert not seen
        optimizer.step()
        assert seen.keys() == {"parameter 0", "parameter 1"}


def test_gradients_of_a_closure_count_and_rows_are_those_of_the_last_step():
    params = make_params()
    optimizer = deepopt.DeepMomentum(params)

    def closure():
        for param in params[:2]:
            param.grad = torch.ones_like(param)
        return torch.tensor(0.0)

    for param in params:
        param.grad = -torch.ones_like(param)  # stale: the closure has others
    params[2].grad = None
    with optimizer.diagnostics() as seen:
        optimizer.step(closure)
        assert seen.keys() == {"parameter 0", "parameter 1"}
        assert all(row.cosine > 0 for row in seen.values())
        params[0].grad = None
        optimizer.step()
        assert seen.keys() == {"parameter 1"}


def test_equal_names_in_two_groups_are_told_apart():
    groups = [{"params": named(make_params()[:2])}, {"params": named(make_params()[:2])}]
    optimizer = deepopt.DeepMomentum(groups)
    with optimizer.diagnostics() as seen:
        optimizer.step()
    assert seen.keys() == {"wide", "bias", "wide of group 1", "bias of group 1"}
