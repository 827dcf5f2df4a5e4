import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import deepopt
from deepopt.memory import Horizons, Linear, resolve
from deepopt.memory.horizons import HAND_MADE, PHI0, width
from deepopt.ops.horizons_write import mixing_weights

RETENTION = 0.9


def fed(memory, grads, phi=None):
    """The state after these gradients and what was read last, with the given MLP if any."""
    state = memory.init(grads[0])
    if phi is not None:
        state["phi"] = phi
    for step, grad in enumerate(grads, 1):
        state["step"] = torch.full((len(grad),), float(step))
        read = memory.write_and_read(state, grad, RETENTION)
    return state, read


def drawn(scales, rows, units=3, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(rows, units, width(scales), dtype=dtype)


def descend(params, memory, grads):
    optimizer = deepopt.DeepMomentum(params, 0.1, memory=memory)
    for grad in grads:
        for param, g in zip(params, grad, strict=True):
            param.grad = g.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("scales", "phi"), [((0.5,), ()), ((0.5, 0.99), [[1.0] * 9 + [0.0, 0.0]])])
def test_a_readout_of_zeros_makes_it_exactly_the_linear_memory(dtype, scales, phi):
    start, grads = torch.randn(3, 16, 24).to(dtype), torch.randn(6, 3, 16, 24).to(dtype)
    ends = []
    for memory in ("linear", Horizons(scales, phi)):
        params = [nn.Parameter(w.clone()) for w in start]
        descend(params, memory, grads)
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


def test_averages_features_and_mixture_follow_the_formula():
    scales, dtype = (0.5, 0.99), torch.float64
    memory, grads = Horizons(scales, ()), torch.randn(5, 2, 3, 4, dtype=dtype)
    grads += 0.5 * grads[0]
    phi = drawn(3, 2, scale=0.5, dtype=dtype)
    _, read = fed(memory, grads, phi)
    kept = torch.tensor([RETENTION, *scales], dtype=dtype)
    for row in range(2):
        averages = torch.zeros(3, 3, 4, dtype=dtype)
        foresight, square = torch.zeros(3, dtype=dtype), 0.0
        for grad in grads[:, row]:
            sizes = averages.flatten(1).norm(dim=1)
            cosines = (averages * grad).sum((1, 2)) / (sizes * grad.norm())
            foresight = 0.7 * foresight + 0.3 * cosines.nan_to_num(0.0)
            square = RETENTION * square + (1 - RETENTION) * grad.square().sum()
            before = averages
            averages = kept[:, None, None] * before + (1 - kept)[:, None, None] * grad
        trust = (foresight.clamp_min(0) + 0.01) / (foresight.max().clamp_min(0) + 0.01)
        time = torch.tensor([5.0], dtype=dtype).log10() / 3
        x = torch.cat([trust, foresight.max()[None], sizes / square.sqrt(), time])
        hidden = (phi[row, :, :8] @ x + phi[row, :, 8]).relu()
        weights = (hidden @ phi[row, :, 9:]).clamp(0, 1)
        weights = weights / weights.sum().clamp_min(1.0)
        ahead = [b * m + (1 - b) * grad for b, m in zip(kept, averages, strict=True)]
        unbiased = [n * (1 - RETENTION**5) / (1 - b**5) for b, n in zip(kept, ahead, strict=True)]
        expected = unbiased[0] + sum(
            w * (n - unbiased[0]) for w, n in zip(weights, unbiased[1:], strict=True)
        )
        torch.testing.assert_close(read[row], expected)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_whatever_the_mlp_says_the_read_lies_between_the_averages(size):
    for scale in (1.0, 1e6):
        grads = size * torch.randn(8, 4, 5, 7)
        memory = Horizons((0.5, 0.99), ())
        state, read = fed(memory, grads, drawn(3, 4, scale=scale))
        weights = state["weights"]
        assert (weights >= 0).all()
        assert (weights.sum(1) <= 1 + 1e-6).all()
        own = Linear().read(state, grads[-1], RETENTION)
        every = [own]
        for key, kept in (("average_0", 0.5), ("average_1", 0.99)):
            ahead = kept * state[key] + (1 - kept) * grads[-1]
            every.append(ahead * (1 - RETENTION**8) / (1 - kept**8))
        low, high = torch.stack(every).amin(0), torch.stack(every).amax(0)
        slack = 1e-5 * size
        assert ((read >= low - slack) & (read <= high + slack)).all()


def test_weights_that_ask_for_more_than_all_are_shared_out():
    phi = torch.zeros(1, 1, width(3))
    phi[0, 0, 8], phi[0, 0, 9:] = 1.0, torch.tensor([3.0, 0.5])
    weights = mixing_weights(phi, torch.randn(1, 8))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5]]) / 1.5)


def test_the_closed_form_trusts_the_long_average_until_the_gradient_turns():
    """Below the noise the gradient turns round: the short average is read, for a while."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 32, 32, generator=generator)
    memory, weights = Horizons(phi=HAND_MADE), []
    state = memory.init(before)
    for step in range(80):
        noise = torch.randn(1, 32, 32, generator=generator)
        state["step"] = torch.tensor([step + 1.0])
        memory.write_and_read(state, (before if step < 40 else -before) + 0.5 * noise, RETENTION)
        weights.append(state["weights"].item())
    assert max(weights[20:40]) == 0.0
    assert max(weights[41:46]) > 0.5
    assert max(weights[60:]) == 0.0


def test_a_run_goes_on_with_the_mlp_that_it_began_with():
    grads = torch.randn(8, 1, 16, 16)
    params = [nn.Parameter(torch.zeros(16, 16))]
    first = descend(params, Horizons(phi=HAND_MADE), grads[:4])
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    again = [nn.Parameter(params[0].detach().clone())]
    resumed = deepopt.DeepMomentum(again, 0.1, memory=Horizons(phi=HAND_MADE))
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for p, o in ((params, first), (again, resumed)):
        for grad in grads[4:]:
            p[0].grad = grad[0].clone()
            o.step()
    assert torch.equal(*params, *again)
    assert torch.equal(resumed.state[again[0]]["phi"], torch.tensor([HAND_MADE]))


def test_the_state_is_as_small_as_documented():
    state = Horizons().init(torch.empty(1, 6, 10, device="meta"))
    assert sum(tensor.numel() for tensor in state.values()) == 2 * 60 + 20
    assert all(tensor.is_meta for tensor in state.values())


def test_the_memory_called_mlp_has_what_the_logged_search_found():
    folder = Path(__file__).parents[2] / "docs/results/mlp-memory/0.7"
    found = json.loads((folder / "phi.json").read_text())
    assert found["phi"] == PHI0
    assert found["time_scales"] == list(Horizons().time_scales)
    assert hashlib.sha256((folder / "log.jsonl").read_bytes()).hexdigest() == found["log_sha256"]
    state = resolve("mlp").init(torch.empty(3, 4, 4))
    assert torch.equal(state["phi"], torch.tensor(PHI0).expand(3, 2, 8))


def test_write_and_read_are_differentiable():
    memory = Horizons((0.5,), ())
    phi = drawn(2, 1, dtype=torch.float64)
    grads = [torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def read(*grads):
        return fed(memory, grads, phi)[1]

    assert torch.autograd.gradcheck(read, grads)


def test_the_report_names_the_weight_of_every_further_average():
    memory = Horizons((0.5, 0.99), ())
    state, _ = fed(memory, torch.randn(3, 2, 16, 16), drawn(3, 2))
    report = memory.report(state)
    assert list(report) == ["weight of 0.5", "weight of 0.99"]
    assert torch.equal(torch.stack(list(report.values()), 1), state["weights"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_scales": (1.0,)}, r"Invalid time_scales: \(1.0,\)"),
        ({"time_scales": ()}, r"Invalid time_scales: \(\)"),
        ({"time_scales": (0.5, 0.99)}, "Invalid phi: units of .8, 8. numbers"),
        ({"phi": ((1.0, 2.0),)}, "Invalid phi: units of .2. numbers"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Horizons(**options)
