import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.memory import Delta, Linear

RETENTION = 0.95


def singular_bound(grad: torch.Tensor) -> torch.Tensor:
    """The Schatten-8 norm, written out."""
    return torch.linalg.svdvals(grad).pow(8).sum(-1).pow(1 / 8)


def run(memory, grads):
    state = memory.init(grads[0])
    for grad in grads:
        found = memory.write_and_read(state, grad, RETENTION)
    return state, found


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 9), (9, 4)])
def test_write_and_read_follow_the_printed_rule_with_normalized_keys(rows, columns):
    grads = torch.randn(6, 2, rows, columns, dtype=torch.float64)
    momentum = torch.zeros(2, rows, columns, dtype=torch.float64)
    energy, share = torch.zeros(2, 2, dtype=torch.float64)
    for grad in grads:
        square = singular_bound(grad) ** 2
        energy = 0.9 * energy + 0.1 * square
        keys = grad / torch.maximum(energy, square).sqrt()[:, None, None]
        erased = 0.3 * momentum @ keys.mT @ keys
        size = torch.linalg.matrix_norm(momentum)
        gain = (1 + share / (1 - RETENTION))[:, None, None]
        now = torch.where(size > 0, torch.linalg.matrix_norm(erased) / size, 0)
        share = 0.9 * share + 0.1 * now
        momentum = RETENTION * momentum - erased + (1 - RETENTION) * grad
    ahead = RETENTION * (momentum - erased) + (1 - RETENTION) * grads[-1]
    for nesterov, expected in ((True, ahead), (False, momentum)):
        state, found = run(Delta(nesterov=nesterov), list(grads))
        torch.testing.assert_close(state["momentum"], momentum)
        torch.testing.assert_close(found, gain * expected)


def test_its_mean_on_a_stationary_stream_is_the_closed_form():
    """E M = (1-b) G [(1-b) I + eta E K'K]^-1, evidence for the horizon of each direction."""
    generator = torch.Generator().manual_seed(0)
    rows, columns, streams, steps = 8, 12, 64, 400
    mean = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    spread = torch.logspace(0.7, -0.7, columns, dtype=torch.float64)
    memory = Delta(rate=0.3)
    state = memory.init(torch.zeros(streams, rows, columns, dtype=torch.float64))
    total = torch.zeros(rows, columns, dtype=torch.float64)
    gram = torch.zeros(columns, columns, dtype=torch.float64)
    burn_in = 150
    for step in range(steps):
        noise = torch.randn(streams, rows, columns, generator=generator, dtype=torch.float64)
        grad = 0.3 * mean + noise * spread
        memory.write_and_read(state, grad, RETENTION)
        if step >= burn_in:
            square = singular_bound(grad) ** 2
            keys = grad / torch.maximum(state["norm"].square(), square).sqrt()[:, None, None]
            gram += (keys.mT @ keys).mean(0) / (steps - burn_in)
            total += state["momentum"].mean(0) / (steps - burn_in)
    decay = 1 - RETENTION
    identity = torch.eye(columns, dtype=torch.float64)
    expected = decay * 0.3 * mean @ torch.linalg.inv(decay * identity + 0.3 * gram)
    cosine = (total * expected).sum() / total.norm() / expected.norm()
    assert cosine > 0.99
    assert 0.95 < total.norm() / expected.norm() < 1.05


@settings(max_examples=40, deadline=None)
@given(
    exponents=st.lists(st.integers(-36, 36), min_size=2, max_size=12),
    rank=st.integers(0, 4),
    rate=st.sampled_from([0.3, 1.0]),
)
def test_no_sequence_of_gradients_makes_it_larger_than_their_largest(exponents, rank, rate):
    """|I b - eta K'K| <= 1 whatever the gradients, so the momentum is a bounded mixture."""
    torch.manual_seed(rank)
    memory, largest = Delta(rate=rate), 0.0
    state = memory.init(torch.zeros(1, 4, 6))
    for exponent in exponents:
        grad = torch.randn(1, 4, rank) @ torch.randn(1, rank, 6) * 10.0**exponent
        found = memory.write_and_read(state, grad, RETENTION)
        largest = max(largest, float(torch.linalg.matrix_norm(grad, ord=2)))
        momentum = state["momentum"]
        assert found.isfinite().all()
        assert torch.linalg.matrix_norm(momentum, ord=2) <= largest * 1.001


def test_zero_gradients_first_leave_no_trace():
    grads = [torch.zeros(1, 4, 4)] * 3 + [torch.randn(1, 4, 4) for _ in range(3)]
    _, late = run(Delta(), grads)
    _, fresh = run(Delta(), grads[3:])
    assert late.isfinite().all()
    torch.testing.assert_close(late, fresh)


def test_rate_zero_is_the_linear_memory():
    grads = list(torch.randn(5, 2, 4, 6))
    for nesterov in (True, False):
        linear = Linear(nesterov)
        state = linear.init(grads[0])
        for grad in grads:
            linear.write(state, grad, RETENTION)
        _, found = run(Delta(rate=0.0, nesterov=nesterov), grads)
        torch.testing.assert_close(found, linear.read(state, grads[-1], RETENTION))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="Invalid rate"):
        Delta(rate=rate)
