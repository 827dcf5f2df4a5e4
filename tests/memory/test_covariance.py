import pytest
import torch

from deepopt.memory import Covariance, Linear
from deepopt.ops import inverse_power

RETENTION = 0.9


def run(memory, grads):
    state = memory.init(grads[0])
    for step, grad in enumerate(grads, 1):
        state["step"] = torch.full((len(grad),), float(step))
        memory.write(state, grad, RETENTION)
        read = memory.read(state, grad, RETENTION)
    return state, read


@pytest.mark.parametrize("sides", ["short", "both"])
@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (4, 9), (9, 4)])
def test_reading_multiplies_by_the_powers_of_the_running_gram_matrices(rows, columns, sides):
    grads = list(torch.randn(4, 2, rows, columns, dtype=torch.float64))
    memory = Covariance(power=0.3, sides=sides, refresh=1, damping=1e-4)
    left = torch.zeros(2, rows, rows, dtype=torch.float64)
    right = torch.zeros(2, columns, columns, dtype=torch.float64)
    linear = Linear()
    state = linear.init(grads[0])
    for grad in grads:
        left = 0.95 * left + 0.05 * grad @ grad.mT
        right = 0.95 * right + 0.05 * grad.mT @ grad
        linear.write(state, grad, RETENTION)
    expected = linear.read(state, grads[-1], RETENTION)
    if sides == "both" or rows <= columns:
        expected = inverse_power(left, 0.3, 1e-4) @ expected
    if sides == "both" or rows > columns:
        expected = expected @ inverse_power(right, 0.3, 1e-4)
    _, found = run(memory, grads)
    size = torch.linalg.matrix_norm(linear.read(state, grads[-1], RETENTION), keepdim=True)
    expected = expected * size / torch.linalg.matrix_norm(expected, keepdim=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("power", "scale"), [(0.1, 1e30), (0.5, 1e-30), (0.5, 1e30), (3.0, 1.0)])
def test_the_read_has_the_norm_of_the_momentum_at_every_power(power, scale):
    grads = list(torch.randn(3, 2, 4, 9, generator=torch.Generator().manual_seed(0)) * scale)
    state, read = run(Covariance(power=power, sides="both", refresh=1), grads)
    momentum = Linear().read(state, grads[-1], RETENTION)
    torch.testing.assert_close(
        (read / scale).norm(dim=(1, 2)), (momentum / scale).norm(dim=(1, 2)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e34])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    grads = list(torch.randn(6, 2, 4, 9, generator=torch.Generator().manual_seed(0)))
    _, expected = run(Covariance(refresh=1), grads)
    _, found = run(Covariance(refresh=1), [grad * scale for grad in grads])
    torch.testing.assert_close(found / scale, expected, rtol=1e-3, atol=1e-5)


def test_one_huge_gradient_is_forgotten():
    grads = list(torch.randn(200, 1, 4, 9, generator=torch.Generator().manual_seed(0)))
    grads[0] *= 1e30
    state, found = run(Covariance(refresh=1, retention=0.5), grads)
    assert found.isfinite().all()
    assert state["gram_left"].isfinite().all()
    assert state["scale"] < 10


def test_powers_are_refreshed_at_the_first_write_and_every_few_after_it():
    grads = list(torch.randn(7, 1, 4, 6))
    memory = Covariance(refresh=3)
    state = memory.init(grads[0])
    changed = []
    for step, grad in enumerate(grads, 1):
        before = state["root_left"].clone()
        state["step"] = torch.tensor([float(step)])
        memory.write(state, grad, RETENTION)
        changed.append(not torch.equal(before, state["root_left"]))
    assert changed == [True, False, False, True, False, False, True]


def test_matrices_of_different_age_are_refreshed_each_at_its_own_time():
    grads = torch.randn(2, 4, 6)
    memory = Covariance(refresh=2)
    state = memory.init(grads)
    state["step"] = torch.tensor([1.0, 2.0])
    memory.write(state, grads, RETENTION)
    assert state["root_left"][0].any()
    assert not state["root_left"][1].any()


def test_the_direction_gradients_keep_coming_from_is_damped():
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([10.0, 1.0, 1.0, 1.0])[:, None]
    grads = [torch.randn(1, 4, 32, generator=generator) * spread for _ in range(60)]
    _, plain = run(Linear(), grads)
    _, damped = run(Covariance(power=0.5, refresh=1), grads)

    def anisotropy(momentum):
        rows = momentum[0].norm(dim=-1)
        return float(rows[0] / rows[1:].mean())

    assert anisotropy(plain) > 5
    assert anisotropy(damped) < 2


def test_zero_gradients_read_as_zero():
    _, read = run(Covariance(), [torch.zeros(2, 4, 6)] * 3)
    assert torch.equal(read, torch.zeros(2, 4, 6))


@pytest.mark.parametrize(
    "arguments",
    [
        {"power": 0.0},
        {"power": float("nan")},
        {"power": float("inf")},
        {"sides": "left"},
        {"retention": 1.0},
        {"refresh": 0},
        {"refresh": 2.5},
        {"damping": 0.0},
        {"gain": 0.0},
        {"gain": float("inf")},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(arguments))}"):
        Covariance(**arguments)
