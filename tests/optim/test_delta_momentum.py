import math

import numpy as np
import pytest
import torch
from torch import nn

from deepopt import DeltaMomentum, PreconditionedMomentum
from tests import literal

REFERENCES = {
    "literal": literal.DeltaMomentum,
    "derived": literal.DerivedDeltaMomentum,
    "implicit": literal.ImplicitDeltaMomentum,
}
SHAPES = [(4, 6), (6, 4), (5, 5), (7,), (), (3, 2, 2, 2)]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def as_matrix(tensor):
    return (tensor.flatten(1) if tensor.ndim > 1 else tensor).numpy()


@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_printed_algebra(rule, shape):
    start = random(*shape)
    P = random(shape[0], shape[0]) if shape else torch.tensor([[1.5]]).double()
    param = nn.Parameter(start.clone())
    optimizer = DeltaMomentum([param], lr=0.03, rule=rule, preconditioner=lambda g: P @ g)
    apply = (lambda g: P.numpy() @ g) if shape else (lambda g: 1.5 * g)
    reference = REFERENCES[rule](as_matrix(start), eta=0.03, alpha=0.9, P=apply)
    for _ in range(8):
        grad = 0.4 * random(*shape)
        param.grad = grad
        optimizer.step()
        expected = reference.step(as_matrix(grad))
        np.testing.assert_allclose(param.detach().numpy(), expected.reshape(shape), atol=1e-12)


@pytest.mark.parametrize("rule", ["implicit", "derived"])
def test_without_an_inner_rate_it_is_sgd_with_momentum(rule):
    start = random(4, 6)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = DeltaMomentum([ours], lr=0.1, rule=rule, inner_lr=0.0)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(10):
        ours.grad = random(4, 6)
        theirs.grad = ours.grad.clone()
        mine.step()
        sgd.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rule", ["implicit", "derived"])
def test_small_gradients_make_it_momentum(rule):
    ours, theirs = (nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
    optimizers = [DeltaMomentum([ours], rule=rule), PreconditionedMomentum([theirs])]
    for _ in range(5):
        ours.grad = 1e-3 * torch.randn(4, 6)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("inner_lr", [None, 0.03])
def test_the_inner_rate_is_the_learning_rate_unless_it_is_given(inner_lr):
    ours, theirs = (nn.Parameter(torch.zeros(4, 6)) for _ in range(2))
    mine = DeltaMomentum([ours], lr=0.01, inner_lr=inner_lr)
    other = DeltaMomentum([theirs], lr=0.01, inner_lr=0.03)
    for step in range(6):
        if step == 3:  # a schedule moves the one and not the other
            mine.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.03
        ours.grad = torch.randn(4, 6)
        theirs.grad = ours.grad.clone()
        mine.step()
        other.step()
        same = torch.equal(ours, theirs)
        assert same == (inner_lr is not None)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e15])
def test_no_step_is_longer_than_the_bound_says(size):
    lr, alpha = 0.04, 0.9
    param = nn.Parameter(torch.zeros(5, 8))
    optimizer = DeltaMomentum([param], lr=lr, betas=(alpha, 0.999))
    for _ in range(30):
        before = param.detach().clone()
        param.grad = size * torch.rand(5, 8)
        optimizer.step()
        step = torch.linalg.matrix_norm(param.detach() - before, ord=2)
        assert step <= math.sqrt(lr) / (2 * (1 - alpha))


def end_on_a_steep_quadratic(rule, curvature, steps=60):
    param = nn.Parameter(torch.full((3, 4), 2.0))
    optimizer = DeltaMomentum([param], lr=0.01, rule=rule)
    for _ in range(steps):
        optimizer.zero_grad()
        (curvature / 2 * param.square().sum()).backward()
        optimizer.step()
    return float(param.detach().norm())


def test_the_printed_rule_is_lost_where_the_others_descend():
    """Gradients of norm 7: beyond 1 + alpha squared, though not beyond (1 + alpha) / eta."""
    start = 2 * math.sqrt(12)
    assert end_on_a_steep_quadratic("implicit", 1.0) < 0.5 * start
    assert end_on_a_steep_quadratic("derived", 1.0) < 0.5 * start
    assert not end_on_a_steep_quadratic("literal", 1.0) < 1e6


def test_the_derived_rule_is_lost_on_steeper_ground_where_implicit_stays():
    start = 2 * math.sqrt(12)
    assert not end_on_a_steep_quadratic("derived", 100.0) < 1e6
    assert end_on_a_steep_quadratic("implicit", 100.0) < start
