"""M3 settled and as printed; what every optimizer does is in the contract's tests."""

import copy

import pytest
import torch
from torch import nn

import deepopt
from deepopt.memory import MultiScale
from deepopt.ops import polar_express
from deepopt.optim.m3 import M3, SlowUpdate
from deepopt.optim.output_map import Orthogonal
from tests import literal_m3

MUON = (3.4445, -4.7750, 2.0315)
FORMS = {
    "post": {},
    "pre": {"mix": "pre"},
    "gated": {"gate": True},
    "literal": {"literal": True, "eps": 0.5},
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def stream(count, shape=(6, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, dtype=torch.float64, generator=generator)


def path_of(grads, start=None, **options):
    """The parameter after every step."""
    param = nn.Parameter(torch.zeros_like(grads[0]) if start is None else start.clone())
    optimizer = M3([param], path="matrix", **options)
    places = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        places.append(param.detach().clone())
    return torch.stack(places)


# -- as printed --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_literal_is_algorithm_1_as_transcribed(shape, chunk):
    start, *grads = stream(12, shape)
    betas, common = (0.7, 0.6, 0.8), {"lr": 0.01, "eps": 1e-3, "alpha": 0.4}
    found = path_of(
        grads,
        start,
        literal=True,
        betas=betas[:2],
        beta3=betas[2],
        weight_decay=0,
        slow_chunk=chunk,
        ns_coefficients=MUON,
        **common,
    )
    expected = literal_m3.literal(
        start.numpy(),
        [g.numpy() for g in grads],
        betas=betas,
        chunk=chunk,
        coefficients=[MUON] * 5,
        **common,
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-9, atol=1e-12)


def test_fact_4_literal_does_not_depend_on_beta1_and_beta3_and_beta2_rescales_the_rate():
    grads, common = stream(12), {"literal": True, "eps": 0.0, "slow_chunk": 3, "weight_decay": 0}
    expected = path_of(grads, lr=0.01, betas=(0.9, 0.4), beta3=0.9, **common)
    found = path_of(grads, lr=0.01, betas=(0.1, 0.4), beta3=0.3, **common)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    found = path_of(grads, lr=0.02, betas=(0.9, 0.1), beta3=0.9, **common)
    torch.testing.assert_close(found, 4 * expected, rtol=1e-10, atol=1e-12)


def test_fact_5_literal_without_slow_momentum_and_division_is_muon(monkeypatch):
    """beta2 = 0 and eps = 1 make the divisor 1; a momentum so near 1 is a sum in direction."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    grads = stream(8, (16, 48))
    found = path_of(
        grads,
        literal=True,
        alpha=0.0,
        betas=(0.9, 0.0),
        eps=1.0,
        lr=0.02,
        weight_decay=0,
        ns_coefficients=MUON,
    )
    param = nn.Parameter(torch.zeros(16, 48, dtype=torch.float64))
    muon = torch.optim.Muon(
        [param], lr=0.02, weight_decay=0, momentum=1 - 1e-6, nesterov=False, ns_coefficients=MUON
    )
    for grad in grads:
        param.grad = grad.clone()
        muon.step()
    torch.testing.assert_close(found[-1], param.detach(), rtol=1e-4, atol=1e-5)


def test_fact_6_the_slow_update_is_zero_in_the_first_chunk(form):
    grads = stream(5) + stream(1, seed=1)
    with_, without = (path_of(grads, alpha=a, slow_chunk=4, ramp=0, **form) for a in (0.9, 0.0))
    assert torch.equal(with_[:4], without[:4])
    assert not torch.equal(with_[4], without[4])


# -- settled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("mix", ["post", "pre"])
@pytest.mark.parametrize("ramp", [0, 7])
def test_settled_is_the_rule_of_the_docstring_as_transcribed(shape, mix, ramp):
    start, *grads = stream(20, shape)
    common = {"lr": 0.01, "betas": (0.8, 0.95), "beta3": 0.4, "alpha": 0.6, "ramp": ramp}
    found = path_of(grads, start, slow_chunk=3, mix=mix, row_norm=False, rms_cap=1.2, **common)
    expected = literal_m3.settled(
        start.numpy(),
        [g.numpy() for g in grads],
        decay=1e-2,
        chunk=3,
        cap=1.2,
        mix=mix,
        coefficients=polar_express(5),
        **common,
    )
    # torch keeps step counts in float32, and the bias corrections with them
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["post", "pre"])
def test_fact_5_settled_without_slow_momentum_is_deep_momentums_linear_one_bit_for_bit(form):
    """Which is torch's Muon with row_norm=False and update_rms=0.2: see test_deep_momentum.py."""
    grads = stream(9, (16, 24)).float()
    found = path_of(grads, alpha=0.0, slow_chunk=2, ramp=0, **FORMS[form])
    param = nn.Parameter(torch.zeros(16, 24))
    optimizer = deepopt.DeepMomentum([param], memory="linear", path="matrix")
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    assert torch.equal(found[-1], param.detach())


@pytest.mark.parametrize("gate", [False, True])
def test_mixed_before_newton_schulz_it_is_deep_momentum_with_a_multi_scale_memory(gate):
    grads = stream(9, (16, 24)).float()
    options = {"slow_chunk": 2, "ramp": 4, "gate": gate}
    param = nn.Parameter(torch.zeros(16, 24))
    optimizer = deepopt.DeepMomentum([param], memory=MultiScale(**options), path="matrix")
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(path_of(grads, mix="pre", **options)[-1], param.detach())


def test_the_slow_momentum_turns_updates_and_does_not_enlarge_them():
    grads = stream(12, (16, 24)) + stream(1, (16, 24), seed=1)
    plain, mixed, pre = (
        path_of(grads, slow_chunk=3, ramp=0, weight_decay=0, row_norm=False, **options).diff(dim=0)
        for options in ({"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 1.0, "mix": "pre"})
    )
    for turned in (mixed, pre):
        cosines = (turned * plain).sum((1, 2)) / turned.norm(dim=(1, 2)) / plain.norm(dim=(1, 2))
        assert cosines[:2].min() > 1 - 1e-12
        assert cosines[3:].max() < 0.999
        torch.testing.assert_close(
            turned.norm(dim=(1, 2)), plain.norm(dim=(1, 2)), rtol=0.05, atol=0
        )


def test_a_persistent_direction_that_noise_hides_is_followed_further():
    signal = 0.25 * stream(1, (24, 24), seed=1)[0]
    grads = stream(200, (24, 24)) + signal

    def progress(**options):
        path = path_of(grads, slow_chunk=5, ramp=0, weight_decay=0, **options)
        return float(-(path[-1] * signal).sum())

    for mix in ("post", "pre"):
        assert progress(mix=mix) > 1.1 * progress(alpha=0.0)


def test_state_is_three_floats_per_parameter_or_two():
    param = nn.Parameter(torch.zeros(64, 64))
    floats = {}
    for name, form in FORMS.items():
        optimizer = M3([param], **form)
        param.grad = torch.randn(64, 64)
        optimizer.step()
        floats[name] = sum(v.numel() for v in optimizer.state[param].values()) / 64**2
    rest = 2 * 64 + 2  # rows; step and size of the gradient
    assert floats["post"] == 3 + rest / 64**2
    assert floats["pre"] == 2 + rest / 64**2
    assert floats["gated"] == 3 + (rest + 2) / 64**2
    assert floats["literal"] == 4 + 1 / 64**2


def test_the_slow_update_is_computed_once_per_chunk_and_for_the_rows_that_are_due(monkeypatch):
    seen = []
    original = Orthogonal.orthogonalize
    monkeypatch.setattr(
        Orthogonal, "orthogonalize", lambda self, x: seen.append(len(x)) or original(self, x)
    )
    params = [nn.Parameter(torch.zeros(16, 24)) for _ in range(3)]
    optimizer = M3(params, slow_chunk=3, ramp=0)
    for step in range(6):
        for param in params:
            param.grad = torch.randn(16, 24)
        if step == 0:
            params[2].grad = None
        optimizer.step()
    # The third has stepped once less: its chunk ends one step after that of the others.
    assert seen == [2, 1, 2]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("steps", "due"), [((3.0, 3.0), (0, 1)), ((3.0, 4.0), (0,)), ((4.0, 5.0), ())]
)
def test_rows_whose_chunk_ends_get_their_slow_update_and_others_keep_theirs(steps, due, capturable):
    slow, old = stream(2), stream(2, seed=1)
    state = {"step": torch.tensor(steps), "slow": slow, "slow_update": old}
    orthogonal = Orthogonal()
    assert SlowUpdate(orthogonal, 3, capturable)(state) is old
    for row in range(2):
        expected = orthogonal.orthogonalize(slow[row : row + 1])[0] if row in due else old[row]
        torch.testing.assert_close(state["slow_update"][row], expected)


def test_a_checkpoint_of_another_form_is_refused():
    def stepped(**options):
        param = nn.Parameter(torch.zeros(16, 24))
        param.grad = torch.ones(16, 24)
        optimizer = M3([param], **options)
        optimizer.step()
        return optimizer

    optimizer = stepped()
    before = copy.deepcopy(optimizer.state_dict())
    for form in ({"mix": "pre"}, {"literal": True}):
        other = copy.deepcopy(stepped(**form).state_dict())
        other["param_groups"] = before["param_groups"]
        with pytest.raises(ValueError, match="does not fit its matrix path"):
            optimizer.load_state_dict(other)


def test_the_step_is_differentiable_across_chunks(form):
    start, *grads = stream(6, (4, 6))

    def final(start, *grads):
        param = start.clone()
        optimizer = M3(
            [param], lr=0.1, path="matrix", slow_chunk=2, ramp=0, differentiable=True, **form
        )
        for grad in grads:
            param.grad = grad
            optimizer.step()
        return param

    inputs = [tensor.clone().requires_grad_() for tensor in (start, *grads)]
    assert torch.autograd.gradcheck(final, inputs, fast_mode=True)


def test_parameters_that_are_no_matrices_take_adamw_also_in_the_literal_form(form):
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    options = {"eps": 0.5} if "eps" in form else {}
    optimizers = M3(params[:1], **form), torch.optim.AdamW(params[1:], **options)
    for grad in stream(3, (5,)).float():
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*params)
