import io
import math

import pytest
import torch
from torch import nn

import deepopt
from deepopt.memory import EntrywiseMLP, Linear

RETENTION = 0.9


def with_readout(memory, like, value=1.0):
    """A state whose MLP says something."""
    state = memory.init(like)
    phi = state["phi"].clone()
    phi[..., -1] = value * torch.randn(phi.shape[:-1])
    return {**state, "phi": phi, "phi0": phi.clone()}


def train(params, optimizer, grads):
    for grad in grads:
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_zero_readout_makes_it_exactly_the_linear_memory(dtype):
    start, grads = torch.randn(3, 16, 24).to(dtype), torch.randn(6, 3, 16, 24).to(dtype)
    ends = []
    for memory in ("linear", EntrywiseMLP(time_scales=(0.5, 0.99, 0.999))):
        params = [nn.Parameter(w.clone()) for w in start]
        train(params, deepopt.DeepMomentum(params, 0.1, memory=memory), grads)
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


def test_averages_and_correction_follow_the_formula():
    memory = EntrywiseMLP(time_scales=(0.5, 0.99), authority=0.4)
    grads = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    state = with_readout(memory, grads[0])
    for grad in grads:
        memory.write(state, grad, RETENTION)
    ages = torch.arange(4, -1, -1, dtype=torch.float64)[:, None, None, None]
    averages = [((1 - b) * b**ages * grads).sum(0) for b in (RETENTION, 0.5, 0.99)]
    linear = RETENTION * averages[0] + (1 - RETENTION) * grads[-1]
    rms = [x.square().mean((1, 2), keepdim=True).sqrt() for x in (linear, *averages)]
    keys = torch.stack([x / r for x, r in zip(averages, rms[1:], strict=True)], -1)
    hidden = torch.einsum("bmnf,bkf->bmnk", keys, state["phi"][..., :-1]).tanh()
    value = torch.einsum("bmnk,bk->bmn", hidden, state["phi"][..., -1])
    torch.testing.assert_close(
        memory.read(state, grads[-1], RETENTION), linear + 0.4 * rms[0] * value.tanh()
    )


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_no_entry_is_moved_beyond_the_authority(scale):
    memory = EntrywiseMLP(authority=0.25, inner_lr=50.0)
    grads = torch.randn(10, 2, 5, 7) * scale
    state = with_readout(memory, grads[0], 1000.0)
    for grad in grads:
        memory.write(state, grad, RETENTION)
        linear = Linear().read(state, grad, RETENTION)
        moved = (memory.read(state, grad, RETENTION) - linear).abs().amax((1, 2))
        rms = (linear / scale).square().mean((1, 2)).sqrt() * scale
        assert (moved <= 0.2501 * rms).all()
        assert moved.isfinite().all()


def test_learning_is_a_gradient_step_on_the_error_of_the_prediction():
    memory = EntrywiseMLP(inner_lr=0.7, inner_retention=0.8)
    grads = torch.randn(4, 2, 3, 4, dtype=torch.float64)
    state = with_readout(memory, grads[0])
    for grad in grads[:-1]:
        memory.write(state, grad, RETENTION)
    before = {key: tensor.clone() for key, tensor in state.items()}
    phi = before["phi"].clone().requires_grad_()
    correction = memory.read({**before, "phi": phi}, before["momentum"], RETENTION)
    # With the momentum for a gradient there is no look-ahead: this is what the keys predict.
    unit = torch.maximum(before["momentum"].square().mean((1, 2)), grads[-1].square().mean((1, 2)))
    errors = (correction - grads[-1]).square().mean((1, 2)) / unit / 2
    (slope,) = torch.autograd.grad(errors.sum(), phi)
    memory.write(state, grads[-1], RETENTION)
    expected = before["phi0"] + 0.8 * (before["phi"] - before["phi0"]) - 0.7 * slope
    torch.testing.assert_close(state["phi"], expected)
    assert torch.equal(state["phi0"], before["phi0"])


def test_it_learns_what_the_linear_momentum_gets_wrong():
    """A gradient that turns slowly: the fast average is ahead of the momentum."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(1, 16, 16, generator=generator)
    errors = {}
    for inner_lr in (0.0, 1.0):
        memory = EntrywiseMLP((0.5,), authority=1.0, inner_lr=inner_lr, inner_retention=1.0)
        state, total = memory.init(pattern), 0.0
        for step in range(400):
            grad = math.cos(step / 12) * pattern
            if step >= 200:
                predicted = memory.read(state, state["momentum"], RETENTION)
                total += (predicted - grad).square().mean().item()
            memory.write(state, grad, RETENTION)
        errors[inner_lr] = total
    assert errors[1.0] < 0.8 * errors[0.0]


def test_without_new_evidence_what_was_learned_decays_towards_phi0():
    memory = EntrywiseMLP(inner_lr=1.0, inner_retention=0.9)
    state = with_readout(memory, torch.zeros(1, 4, 4))
    learned = state["phi"] + torch.randn_like(state["phi"])
    state["phi"] = learned
    for _ in range(100):
        memory.write(state, torch.zeros(1, 4, 4), RETENTION)
    torch.testing.assert_close(state["phi"], state["phi0"], rtol=0, atol=1e-3)


def test_without_a_phi_it_starts_as_the_linear_memory():
    for scales in ((), (0.99,), (0.5, 0.9)):
        phi = EntrywiseMLP(scales).init(torch.empty(5, 3, 4))["phi"]
        assert phi.shape == (5, 8, len(scales) + 2)
        assert (phi[..., -1] == 0).all()
        assert phi[..., :-1].abs().min() > 0


def test_a_phi_of_ones_own_is_where_every_matrix_starts():
    phi = [[0.5, -0.25, 0.125], [1.0, 2.0, 3.0]]
    state = EntrywiseMLP(phi=phi).init(torch.empty(3, 4, 4))
    assert torch.equal(state["phi"], torch.tensor(phi).expand(3, 2, 3))
    assert torch.equal(state["phi0"], state["phi"])
    with pytest.raises(ValueError, match=r"Invalid phi: units of \[3, 3\] numbers.* need 4"):
        EntrywiseMLP((0.5, 0.9), phi=phi)


def test_what_was_learned_is_saved_and_goes_on_bit_for_bit():
    memory = EntrywiseMLP(inner_lr=1.0)
    grads = torch.randn(8, 1, 16, 16)
    params = [nn.Parameter(torch.zeros(16, 16))]
    optimizer = deepopt.DeepMomentum(params, memory=memory)
    start = memory.init(grads[:1, 0])["phi"]
    train(params, optimizer, grads[:4])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = [nn.Parameter(params[0].detach().clone())]
    resumed = deepopt.DeepMomentum(again, memory=EntrywiseMLP(inner_lr=1.0))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for p, o in ((params, optimizer), (again, resumed)):
        train(p, o, grads[4:])
    assert torch.equal(*params, *again)
    assert not torch.equal(optimizer.state[params[0]]["phi"], start)


def test_a_checkpoint_goes_on_with_its_own_phi():
    phi = torch.randn(8, 3)
    params = [nn.Parameter(torch.zeros(16, 16))]
    first = deepopt.DeepMomentum(params, memory=EntrywiseMLP(phi=phi.tolist()))
    train(params, first, torch.randn(2, 1, 16, 16))
    resumed = deepopt.DeepMomentum(params, memory=EntrywiseMLP())
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed.state[params[0]]["phi0"], phi[None])


def test_the_state_is_as_small_as_documented():
    for scales, floats in (((0.99,), 2 * 60 + 2 * 8 * 3), ((0.5, 0.99), 3 * 60 + 2 * 8 * 4)):
        state = EntrywiseMLP(time_scales=scales).init(torch.empty(1, 6, 10, device="meta"))
        assert sum(tensor.numel() for tensor in state.values()) == floats
        assert all(tensor.is_meta for tensor in state.values())


def test_write_and_read_are_differentiable():
    memory = EntrywiseMLP(inner_lr=0.5)
    grads = [torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    start = with_readout(memory, grads[0])

    def read(*grads):
        state = dict(start)
        for grad in grads:
            memory.write(state, grad, RETENTION)
        return memory.read(state, grads[-1], RETENTION)

    assert torch.autograd.gradcheck(read, grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_scales": (1.0,)}, r"Invalid time_scales: \(1.0,\)"),
        ({"authority": 1.5}, "Invalid authority: 1.5"),
        ({"inner_retention": -0.1}, "Invalid inner_retention: -0.1"),
        ({"inner_lr": -1.0}, "Invalid inner_lr: -1.0"),
        ({"inner_lr": float("inf")}, "Invalid inner_lr: inf"),
        ({"phi": ()}, "Invalid phi: it has no units"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        EntrywiseMLP(**options)
