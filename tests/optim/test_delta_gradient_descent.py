"""The delta rule on the weights is what its derivation says, and nothing where it has no inputs."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import deepopt
from deepopt import DeltaGradientDescent, capture_inputs
from deepopt.optim.layer_inputs import seen_inputs
from tests.literal_dgd import exact_dgd, literal_dgd


def layer(columns=5, rows=3):
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


def step(module, inputs, targets, **options):
    """One step on the mean of 1/2 |Wx - t|^2; returns the local errors before it."""
    optimizer = DeltaGradientDescent(module.parameters(), **options)
    with capture_inputs(module):
        outputs = module(inputs)
        (0.5 * (outputs - targets).square().sum() / len(inputs)).backward()
    optimizer.step()
    return (outputs - targets).detach()


@settings(max_examples=40, deadline=None)
@given(
    norm=st.floats(1e-3, 1e3),
    eta=st.floats(1e-3, 10.0),
    rule=st.sampled_from(["implicit", "scalar"]),
)
def test_one_sample_solves_the_regression_for_every_norm_of_its_input(norm, eta, rule):
    """Eq 56 by torch.linalg.solve, and its closed form eta / (1 + eta |x|^2)."""
    torch.manual_seed(0)
    module, target = layer(), torch.randn(1, 3, dtype=torch.float64)
    x = F.normalize(torch.randn(1, 5, dtype=torch.float64)) * norm
    before = module.weight.detach().clone()
    delta = step(module, x, target, lr=eta, rule=rule, decay_scale=1.0)
    system = x.mT @ x + torch.eye(5, dtype=torch.float64) / eta
    solved = torch.linalg.solve(system, (-delta.mT @ x + before / eta).mT).mT
    torch.testing.assert_close(module.weight.detach(), solved, rtol=1e-7, atol=1e-9)
    rate = eta / (1 + eta * norm**2)
    closed = before - rate * (before @ x.mT @ x + delta.mT @ x)
    torch.testing.assert_close(module.weight.detach(), closed, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("norm", "right"), [(1.0, True), (1.7, False)])
def test_the_printed_coefficient_is_right_for_unit_inputs_alone(norm, right):
    module, target = layer(), torch.randn(1, 3, dtype=torch.float64)
    x = F.normalize(torch.randn(1, 5, dtype=torch.float64)) * norm
    before = module.weight.detach().clone()
    delta = step(module, x, target, lr=0.3, rule="literal")
    solved = exact_dgd(before.numpy(), x.numpy(), delta.numpy(), 0.3)
    error = np.abs(module.weight.detach().numpy() - solved).max()
    assert error < 1e-12 if right else error > 1e-2


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_the_literal_rule_is_the_printed_one(batch):
    module, targets = layer(), torch.randn(batch, 3, dtype=torch.float64)
    inputs = torch.randn(batch, 5, dtype=torch.float64)
    weight = module.weight.detach().numpy().copy()
    for _ in range(3):
        delta = inputs.numpy() @ weight.T - targets.numpy()
        weight = literal_dgd(weight, inputs.numpy(), delta, 0.2)
        step(module, inputs, targets, lr=0.2, rule="literal")
        module.zero_grad()
    np.testing.assert_allclose(module.weight.detach().numpy(), weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [2, 9])
def test_a_batch_solves_the_regression_on_all_of_it(batch):
    module, targets = layer(), torch.randn(batch, 3, dtype=torch.float64)
    inputs = 3 * torch.randn(batch, 5, dtype=torch.float64)
    before = module.weight.detach().numpy().copy()
    delta = step(module, inputs, targets, lr=0.8, decay_scale=1.0)
    solved = exact_dgd(before, inputs.numpy(), delta.numpy(), 0.8)
    np.testing.assert_allclose(module.weight.detach().numpy(), solved, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize("rule", ["implicit", "scalar", "literal"])
def test_the_fixed_point_recalls_a_part_of_the_target(rule, scale):
    """W x = t / (1 + d) for 1/2 |Wx - t|^2, so t/2 for the paper's d = 1: not the minimum."""
    module = layer()
    x = F.normalize(torch.randn(1, 5, dtype=torch.float64))
    target = torch.randn(1, 3, dtype=torch.float64)
    for _ in range(60):
        module.zero_grad()
        step(module, x, target, lr=1.0, rule=rule, decay_scale=scale)
    torch.testing.assert_close(module(x).detach(), target / (1 + scale))


@settings(max_examples=25, deadline=None)
@given(
    exponent=st.integers(-3, 6),
    rule=st.sampled_from(["implicit", "scalar"]),
    batch=st.sampled_from([2, 7]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_settled_rules_are_stable_where_the_printed_one_diverges(exponent, rule, batch, dtype):
    """Erasure alone never makes a weight longer, whatever the rate and the inputs."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, 5, dtype=dtype) * 10.0**exponent
    module = layer().to(dtype)
    before = torch.linalg.matrix_norm(module.weight.detach(), ord=2)
    step(module, inputs, module(inputs).detach(), lr=10.0, rule=rule, decay_scale=1.0)
    rounding = 1e-9 if dtype == torch.float64 else 1e-6
    assert torch.linalg.matrix_norm(module.weight.detach(), ord=2) <= before * (1 + rounding)


@pytest.mark.parametrize("batch", [1, 4, 16])  # whose roots are exact, so that the rows are equal
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("rule", ["implicit", "scalar"])
def test_large_inputs_cost_no_accuracy_in_float32(rule, size, batch):
    """The step in float32 is the one in float64, of the same gradient."""
    narrow, inputs = layer(8, 5).float(), size * torch.randn(batch, 8)
    wide = copy.deepcopy(narrow).double()
    for module in (narrow, wide):
        optimizer = DeltaGradientDescent(module.parameters(), lr=1.0, rule=rule, decay_scale=1.0)
        with capture_inputs(module):
            module(inputs.to(module.weight.dtype)).square().mean().backward()
        if module is wide:
            module.weight.grad = narrow.weight.grad.double()
        optimizer.step()
    torch.testing.assert_close(narrow.weight.double(), wide.weight, rtol=1e-5, atol=1e-6)


def test_the_printed_rule_diverges_on_long_inputs():
    module, x = layer(), torch.full((1, 5), 3.0, dtype=torch.float64)
    before = module.weight.detach().norm()
    for _ in range(5):
        step(module, x, module(x).detach(), lr=1.0, rule="literal")
        module.zero_grad()
    assert module.weight.norm() > 100 * before


@pytest.mark.parametrize(("alpha", "lr"), [(1.0, 0.2), (0.9, 0.4)])
def test_with_a_decay_it_is_the_linear_memory_of_hope(alpha, lr):
    """Eq 88, Eq 93: a key is erased and regressed on, Mk -> (alpha - 2 eta) Mk + eta v."""
    module, value = layer(), torch.randn(1, 3, dtype=torch.float64)
    key = F.normalize(torch.randn(1, 5, dtype=torch.float64))
    before, eta = module.weight.detach().clone(), lr / (1 + lr)
    step(module, key, value, lr=lr, rule="literal", weight_decay=(1 - alpha) / lr)
    printed = before @ (alpha * torch.eye(5).double() - eta * key.mT @ key)
    printed -= eta * (before @ key.mT - value.mT) @ key
    torch.testing.assert_close(module.weight.detach(), printed)
    recalled = (alpha - 2 * eta) * before @ key.mT + eta * value.mT
    torch.testing.assert_close(module.weight.detach() @ key.mT, recalled)


def test_without_erasure_it_is_gradient_descent_and_asks_for_no_inputs():
    module, other = layer(), layer()
    other.load_state_dict(module.state_dict())
    inputs, targets = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    step(module, inputs, targets, lr=0.3, decay_scale=0.0)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.3)
    (0.5 * (other(inputs) - targets).square().sum() / 6).backward()
    optimizer.step()
    torch.testing.assert_close(module.weight, other.weight)
    DeltaGradientDescent(other.parameters(), decay_scale=0.0).step()  # no warning either


def test_vectors_and_what_has_no_inputs_descend_with_one_warning():
    model = nn.ModuleDict({"table": nn.Embedding(7, 4), "other": nn.Embedding(3, 4)})
    model["norm"] = nn.LayerNorm(4)
    expected = copy.deepcopy(model)
    optimizer = DeltaGradientDescent(model.named_parameters(), lr=0.1)
    for m in (model, expected):
        loss = m["norm"](m["table"](torch.arange(7))).square().sum()
        (loss + m["other"](torch.arange(3)).square().sum()).backward()
    with pytest.warns(UserWarning, match=r"no inputs for parameter table\.weight") as caught:
        optimizer.step()
    optimizer.step()  # silent: warnings are errors here
    assert len(caught) == 1
    assert caught[0].filename == __file__
    other = torch.optim.SGD(expected.parameters(), lr=0.1)
    other.step()
    other.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["implicit", "scalar", "literal"])
def test_groups_of_a_convolution_regress_each_on_its_own_inputs(rule):
    conv = nn.Conv1d(4, 6, 3, groups=2, bias=False, dtype=torch.float64)
    before = conv.weight.detach().clone()
    inputs = torch.randn(2, 4, 9, dtype=torch.float64)
    expected = []
    for group in range(2):
        part = nn.Conv1d(2, 3, 3, bias=False, dtype=torch.float64)
        part.weight.data.copy_(before[3 * group : 3 * group + 3])
        optimizer = DeltaGradientDescent(part.parameters(), lr=0.1, rule=rule, decay_scale=1.0)
        with capture_inputs(part):
            part(inputs[:, 2 * group : 2 * group + 2]).square().sum().backward()
        optimizer.step()
        expected.append(part.weight.detach())
    optimizer = DeltaGradientDescent(conv.parameters(), lr=0.1, rule=rule, decay_scale=1.0)
    with capture_inputs(conv):
        conv(inputs).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(conv.weight.detach(), torch.cat(expected))


@pytest.mark.parametrize("rule", ["implicit", "scalar", "literal"])
def test_to_ascend_is_to_descend_on_the_negative_loss(rule):
    down, inputs = layer(), torch.randn(6, 5).double()
    up = copy.deepcopy(down)
    for module, sign in ((down, 1.0), (up, -1.0)):
        maximize = sign < 0
        optimizer = DeltaGradientDescent(module.parameters(), lr=0.1, rule=rule, maximize=maximize)
        with capture_inputs(module):
            (sign * module(inputs).square().mean()).backward()
        optimizer.step()
    torch.testing.assert_close(down.weight, up.weight)


@pytest.mark.parametrize("fused", [None, True])
def test_scaled_gradients_leave_the_erasure_as_it_is(fused):
    plain, inputs = layer().float(), torch.randn(6, 5)
    scaled = copy.deepcopy(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for module in (plain, scaled):
        optimizer = DeltaGradientDescent(module.parameters(), lr=0.1, decay_scale=1.0, fused=fused)
        with capture_inputs(module):
            loss = module(inputs).square().mean()
            (loss if module is plain else scaler.scale(loss)).backward()
        if module is plain:
            optimizer.step()
        else:
            scaler.step(optimizer)
    torch.testing.assert_close(plain.weight, scaled.weight)


@pytest.mark.parametrize("path", ["auto", "elementwise"])
def test_the_elementwise_path_is_adamw_with_inputs_and_without(path):
    ours = layer()
    theirs = copy.deepcopy(ours)
    one = DeltaGradientDescent(ours.parameters(), lr=0.1, path=path, weight_decay=0.2)
    two = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.2)
    inputs = torch.randn(6, 5).double()
    with capture_inputs(ours):
        for module, optimizer in ((ours, one), (theirs, two)):
            module(inputs).square().mean().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)


def test_a_refused_step_uses_up_no_inputs():
    model, inputs = (
        nn.Sequential(layer(), nn.Embedding(3, 4, sparse=True)),
        torch.randn(6, 5).double(),
    )
    expected = copy.deepcopy(model[0])
    with capture_inputs(model):
        loss = 0.5 * model[0](inputs).square().sum() / 6
        (loss + model[1](torch.arange(3)).sum()).backward()
    optimizer = DeltaGradientDescent(model.parameters(), lr=0.1, decay_scale=1.0)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    model[1].weight.grad = None
    optimizer.step()
    step(expected, inputs, torch.zeros(6, 3).double(), lr=0.1, decay_scale=1.0)
    assert seen_inputs(model[0].weight) is None
    torch.testing.assert_close(model[0].weight, expected.weight)


def test_a_layer_without_inputs_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is nothing to initialize
        module = nn.Linear(0, 3)
    optimizer = DeltaGradientDescent(module.parameters(), lr=0.1)
    with capture_inputs(module):
        module(torch.ones(2, 0)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(module.bias.detach(), torch.full((3,), -0.2))


def train(model, optimizer, steps, first=0):
    for index in range(first, first + steps):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(32, 1, 6, 6, generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())
        loss.backward()
        optimizer.step()
    return loss.item()


def make_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(),
        nn.Linear(16, 2),
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["implicit", "scalar"])
def test_it_trains(rule):
    model = make_model()
    optimizer = DeltaGradientDescent(model.parameters(), lr=0.3, rule=rule)
    with capture_inputs(model):
        first = train(model, optimizer, 1)
        last = train(model, optimizer, 60, first=1)
    assert last < 0.6 * first


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_model_is_recorded_on_its_own_account(copier):
    model = make_model()
    optimizer = DeltaGradientDescent(model.parameters(), lr=0.1, decay_scale=1.0)
    capture_inputs(model)
    train(model, optimizer, 2)
    model2, optimizer2 = copier((model, optimizer))
    train(model, optimizer, 3, first=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model2, optimizer2, 3, first=2)
    for one, two in zip(model.parameters(), model2.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_group_has_its_own_rule_and_scale():
    model = nn.Sequential(layer(), layer(3, 3))
    groups = [
        {"params": model[0].parameters(), "rule": "literal"},
        {"params": model[1].parameters(), "decay_scale": 0.5},
    ]
    optimizer = DeltaGradientDescent(groups, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    inputs = torch.randn(6, 5).double()
    hidden = model[0](inputs).detach()
    with capture_inputs(model):
        (model(inputs) * 0).sum().backward()  # erasure alone
    optimizer.step()
    first = before[0] @ (torch.eye(5).double() - 0.1 / 1.1 * inputs.mT @ inputs / 6)
    second = before[1] @ torch.linalg.inv(torch.eye(3).double() + 0.05 * hidden.mT @ hidden / 6)
    torch.testing.assert_close(model[0].weight.detach(), first)
    torch.testing.assert_close(model[1].weight.detach(), second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "exact"}, "Invalid rule: 'exact'; choose from"),
        ({"decay_scale": -0.5}, "Invalid decay_scale: -0.5; it must be a number from 0 on"),
        ({"decay_scale": float("nan")}, "Invalid decay_scale: nan"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        deepopt.DeltaGradientDescent([nn.Parameter(torch.zeros(3))], **options)
