import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.memory.delta_rule import RULES, DeltaRule
from deepopt.memory.preconditioned import Preconditioned
from deepopt.memory.preconditioner import Applied, resolve

SHAPES = [(4, 7), (7, 4), (5, 5), (6, 1), (1, 6), (1, 1)]
RETENTION = 0.9


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def written(memory, momentum, grad, retention=RETENTION):
    """The momentum after one write to a memory that held ``momentum``."""
    state = {**memory.init(grad), "momentum": momentum, "step": torch.ones(len(grad))}
    memory.write(state, grad, retention)
    assert memory.read(state, grad, retention) is state["momentum"]
    return state["momentum"]


def largest_growth(rule, size, rate, columns=3):
    """‖B_t‖ / ‖B_{t-1}‖ along the gradient, after many writes of a steady one of that size."""
    grad = torch.zeros(1, 2, columns, dtype=torch.float64)
    grad[0, 0, 0] = size
    momentum = 1e6 * grad
    for _ in range(20):
        before, momentum = momentum, written(DeltaRule(rule=rule, rate=rate), momentum, grad)
    return float(momentum.norm() / before.norm())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_derived_is_a_gradient_step_on_the_inner_objective_and_a_decay(rows, columns):
    eta, P = 0.03, random(rows, rows)
    momentum, grad = random(2, rows, columns), random(2, rows, columns)
    m = (-eta * momentum).requires_grad_()
    objective = (m @ grad.mT + P).square().sum() / 2
    (slope,) = torch.autograd.grad(objective, m)
    memory = DeltaRule(Applied(lambda g: P @ g), "derived", eta)
    expected = RETENTION * m.detach() - eta * slope
    torch.testing.assert_close(-eta * written(memory, momentum, grad), expected)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_implicit_solves_its_proximal_problem(rows, columns):
    """m is where the slope of eta/2 ‖m g' + P‖² + 1/2 ‖m - alpha m_before‖² vanishes."""
    eta, P = 0.7, random(rows, rows)
    momentum, grad = random(2, rows, columns), random(2, rows, columns)
    m = -eta * written(DeltaRule(Applied(lambda g: P @ g), "implicit", eta), momentum, grad)
    m.requires_grad_()
    fit = eta / 2 * (m @ grad.mT + P).square().sum()
    near = (m + RETENTION * eta * momentum).square().sum() / 2
    (slope,) = torch.autograd.grad(fit + near, m)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("rate", [0.0, 1e-3, 1.0, 1e4])
def test_implicit_is_the_inverse_written_out(rows, columns, rate):
    momentum, grad = random(3, rows, columns), random(3, rows, columns)
    inverse = torch.linalg.inv(torch.eye(columns, dtype=torch.float64) + rate * grad.mT @ grad)
    expected = (RETENTION * momentum + grad) @ inverse
    found = written(DeltaRule(rate=rate), momentum, grad)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("rule", ["implicit", "derived"])
@pytest.mark.parametrize("name", ["identity", "diagonal", "left_gram"])
def test_without_a_rate_it_is_the_preconditioned_heavy_ball(rule, name):
    preconditioner = resolve(name, 0.9)
    momentum, grad = random(2, 4, 6), random(2, 4, 6)
    found = written(DeltaRule(preconditioner, rule, 0.0), momentum, grad)
    torch.testing.assert_close(found, written(Preconditioned(preconditioner), momentum, grad))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-3, 0.3, 1.2])
def test_a_steady_vector_comes_to_the_fixed_point(rule, size):
    """Pg / (1 - alpha + c ‖g‖²): momentum for a small gradient, normalized for a large one."""
    eta = 0.2
    grad = random(1, 5, 1)
    grad *= size / grad.norm()
    P = random(5, 5)
    memory = DeltaRule(Applied(lambda g: P @ g), rule, eta)
    momentum = torch.zeros_like(grad)
    for _ in range(400):
        momentum = written(memory, momentum, grad)
    erase = 1.0 if rule == "literal" else eta
    expected = P @ grad / (1 - RETENTION + erase * size**2)
    torch.testing.assert_close(momentum, expected)


def test_the_printed_rule_grows_from_one_plus_alpha_on():
    below, above = math.sqrt(1 + RETENTION - 0.05), math.sqrt(1 + RETENTION + 0.05)
    assert largest_growth("literal", below, 1e-3) < 1 < largest_growth("literal", above, 1e-3)


def test_the_derived_rule_grows_from_one_plus_alpha_over_eta_on():
    eta = 0.02
    below, above = math.sqrt((1.9 - 0.05) / eta), math.sqrt((1.9 + 0.05) / eta)
    assert largest_growth("derived", below, eta) < 1 < largest_growth("derived", above, eta)


@settings(max_examples=60, deadline=None)
@given(
    exponents=st.lists(st.integers(-30, 30), min_size=1, max_size=8),
    rank=st.integers(0, 4),
    shape=st.sampled_from([(4, 6), (6, 4), (4, 4), (5, 1), (1, 1)]),
    rate=st.sampled_from([1e-4, 1e-2, 1.0]),
    name=st.sampled_from(["identity", "diagonal", "left_gram"]),
)
def test_implicit_is_bounded_for_every_gradient_in_float32(exponents, rank, shape, rate, name):
    """‖B‖ <= sqrt(r) / (2 sqrt(eta) (1 - alpha)), whatever the sequence of gradients."""
    torch.manual_seed(rank)
    rows, columns = shape
    memory = DeltaRule(resolve(name, 0.99), "implicit", rate)
    bound = math.sqrt(min(shape)) / (2 * math.sqrt(rate) * (1 - RETENTION))
    state = memory.init(torch.zeros(1, *shape))
    for step, exponent in enumerate(exponents):
        grad = torch.randn(1, rows, rank) @ torch.randn(1, rank, columns) * 10.0**exponent
        state["step"] = torch.full((1,), step + 1.0)
        memory.write(state, grad, RETENTION)
        assert torch.linalg.matrix_norm(state["momentum"]) <= 1.001 * bound


def test_a_huge_gradient_leaves_a_step_of_its_own_direction_and_inverse_size():
    """Not the rounding error of the difference of two huge numbers."""
    direction = torch.zeros(1, 6, 9)
    direction[:, 2] = torch.nn.functional.normalize(torch.randn(9), dim=0)
    found = written(DeltaRule(rate=0.01), torch.zeros(1, 6, 9), 1e20 * direction)
    torch.testing.assert_close(found * 1e20 * 0.01, direction, atol=1e-6, rtol=1e-4)


def test_a_large_gradient_erases_its_own_directions_and_no_others():
    grad = torch.zeros(1, 3, 5)
    grad[0, 0, 0] = 1e6
    momentum = torch.ones(1, 3, 5)
    found = written(DeltaRule(rate=1.0), momentum, grad)
    assert found[..., 0].abs().max() < 1e-5
    torch.testing.assert_close(found[..., 1:], RETENTION * momentum[..., 1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 1)])
def test_a_zero_gradient_decays_the_momentum_alone(rule, shape):
    momentum = torch.randn(2, *shape)
    found = written(DeltaRule(rule=rule), momentum, torch.zeros(2, *shape))
    torch.testing.assert_close(found, RETENTION * momentum)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 1)])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_write_is_differentiable_also_at_a_zero_gradient(rule, shape, size):
    def write(momentum, grad, rate):
        return written(DeltaRule(rule=rule, rate=rate), momentum, grad)

    arguments = (random(2, *shape), size * random(2, *shape), torch.tensor(0.4).double())
    assert torch.autograd.gradcheck(write, [a.requires_grad_() for a in arguments])


def test_a_matrix_that_is_not_finite_harms_no_other():
    grad = torch.randn(3, 4, 4)
    grad[1, 2, 2] = float("nan")
    found = written(DeltaRule(), torch.zeros(3, 4, 4), grad)
    assert found[[0, 2]].isfinite().all()
    assert not found[1].isfinite().any()
