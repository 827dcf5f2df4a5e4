import pytest
import torch

from deepopt.memory import Linear
from deepopt.memory.multi_scale import MultiScale, MultiScaleSums

RETENTION = 0.9


def stream(count, seed=0, size=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, 4, 6, dtype=torch.float64, generator=generator))


def states(memory, grads):
    state = memory.init(grads[0])
    for step, grad in enumerate(grads, 1):
        state["step"] = torch.full((len(grad),), float(step))
        memory.write(state, grad, RETENTION)
        yield dict(state)


def test_the_slow_momentum_gets_the_mean_of_each_chunk_at_its_end():
    grads = stream(12)
    ends = list(states(MultiScale(slow_chunk=3, beta3=0.35), grads))[2::3]
    slow = torch.zeros_like(grads[0])
    for k, end in enumerate(ends):
        kept = min(0.35, k / (k + 4))
        slow = kept * slow + (1 - kept) * sum(grads[3 * k : 3 * k + 3]) / 3
        torch.testing.assert_close(end["slow"], slow, rtol=1e-12, atol=1e-12)


def test_the_fast_momentum_is_the_linear_memorys():
    grads = stream(7)
    expected = [s["momentum"] for s in states(Linear(), grads)]
    found = [s["momentum"] for s in states(MultiScale(slow_chunk=3), grads)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_the_weight_is_zero_in_the_first_chunk_and_grows_to_alpha_with_the_run():
    def weights(**options):
        memory, grads = MultiScale(slow_chunk=2, alpha=0.8, **options), stream(9)
        return [float(memory.weight(s, grads[0])) for s in states(memory, grads)]

    assert weights(ramp=8) == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8])
    assert weights(ramp=0) == pytest.approx([0, 0] + 7 * [0.8])


def test_a_constant_gradient_is_read_as_it_is_at_every_step():
    grad = stream(1)[0]
    memory = MultiScale(slow_chunk=3, ramp=0)
    for step, state in enumerate(states(memory, [grad] * 8), 1):
        read = memory.read(state, grad, RETENTION)
        size = RETENTION * (1 - RETENTION**step) + 1 - RETENTION
        torch.testing.assert_close(read, size * grad, rtol=1e-12, atol=1e-12)


def test_the_read_turns_the_fast_momentum_and_keeps_its_norm():
    memory, grads = MultiScale(slow_chunk=2, ramp=0, alpha=0.5), stream(7)
    state = list(states(memory, grads))[-1]
    fast, slow = Linear().read(state, grads[-1], RETENTION)[0], state["slow"][0]
    expected = fast / fast.norm() + 0.5 * slow / slow.norm()
    found = memory.read(state, grads[-1], RETENTION)[0]
    torch.testing.assert_close(found, expected * fast.norm() / expected.norm())


def test_the_gate_closes_when_gradients_turn_and_opens_again():
    memory = MultiScale(slow_chunk=5, ramp=0, alpha=1.0, gate=True)
    signal, noise = stream(1, seed=1)[0], stream(220)
    grads = [(1 if step < 80 else -1) * signal + 0.3 * g for step, g in enumerate(noise)]
    weights = [float(memory.weight(s, grads[0])) for s in states(memory, grads)]
    assert min(weights[20:80]) > 0.9
    assert max(weights[86:95]) == 0.0
    assert weights[-1] > 0.9


@pytest.mark.parametrize("gate", [False, True])
def test_matrices_of_different_age_are_each_at_their_own_place_in_the_chunk(gate):
    memory, grads = MultiScale(slow_chunk=3, ramp=4, gate=gate), stream(9, size=2)
    alone = [
        list(states(memory, [grad[:1] for grad in grads])),
        list(states(memory, [grad[1:] for grad in grads[2:]])),
    ]
    state = memory.init(grads[0])
    for key, value in alone[0][1].items():
        if key != "step":
            state[key] = torch.cat([value, torch.zeros_like(value)])
    for step, grad in enumerate(grads[2:], 3):
        state["step"] = torch.tensor([step, step - 2.0])
        memory.write(state, grad, RETENTION)
    read = memory.read(state, grads[-1], RETENTION)
    for row, own in enumerate(alone):
        expected = memory.read(own[-1], grads[-1][row : row + 1], RETENTION)
        torch.testing.assert_close(read[row : row + 1], expected)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e34])
def test_the_scale_of_the_gradients_does_not_matter(gate, scale):
    memory = MultiScale(slow_chunk=2, ramp=0, gate=gate)
    grads = [grad.float() for grad in stream(6)]

    def read(grads):
        return memory.read(list(states(memory, grads))[-1], grads[-1], RETENTION)

    found = read([grad * scale for grad in grads]) / scale
    torch.testing.assert_close(found, read(grads), rtol=1e-3, atol=1e-5)


def test_zero_gradients_read_as_zero():
    memory, grads = MultiScale(slow_chunk=2, ramp=0, gate=True), [torch.zeros(2, 4, 6)] * 5
    state = list(states(memory, grads))[-1]
    assert torch.equal(memory.read(state, grads[0], RETENTION), grads[0])


def test_the_printed_sums_forget_nothing():
    grads = stream(5)
    state = list(states(MultiScaleSums(beta2=0.5, beta3=0.25), grads))[-1]
    torch.testing.assert_close(state["momentum"], RETENTION * sum(grads))
    torch.testing.assert_close(state["squares"], 0.5 * sum(g.square() for g in grads))
    torch.testing.assert_close(state["slow"], 0.25 * sum(grads))


@pytest.mark.parametrize(
    "arguments",
    [
        {"slow_chunk": 0},
        {"slow_chunk": 2.5},
        {"beta3": 1.0},
        {"alpha": -0.1},
        {"alpha": float("inf")},
        {"ramp": -1},
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"Invalid {next(iter(arguments))}"):
        MultiScale(**arguments)
