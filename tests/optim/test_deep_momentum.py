import math

import pytest
import torch
from torch import nn

import deepopt
from deepopt.memory import BUILT_IN, Covariance, Linear, resolve
from deepopt.ops import newton_schulz, polar_express

MUON = (3.4445, -4.7750, 2.0315)


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4))
    inputs, targets = torch.randn(256, 32), torch.randint(0, 4, (256,))
    return model, lambda: nn.functional.cross_entropy(model(inputs), targets)


@pytest.mark.parametrize("memory", BUILT_IN)
@pytest.mark.parametrize("row_norm", [True, False])
def test_it_descends(memory, row_norm):
    model, loss = problem()
    optimizer = deepopt.DeepMomentum(
        deepopt.param_groups(model), lr=2e-2, memory=memory, row_norm=row_norm
    )
    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * before


@pytest.mark.parametrize("memory", BUILT_IN)
def test_one_small_step_lowers_the_loss(memory):
    model, loss = problem()
    optimizer = deepopt.DeepMomentum(model.parameters(), lr=1e-4, memory=memory)
    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_the_linear_memory_without_row_norm_is_torch_muon_to_rounding(shape, nesterov, monkeypatch):
    # torch's Muon iterates in bfloat16, of 8 bits: let it have all 24 for the comparison.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = deepopt.DeepMomentum(
        [ours],
        lr=0.02,
        betas=(0.95, 0.999),
        weight_decay=0.1,
        memory=Linear(nesterov=nesterov),
        row_norm=False,
        update_rms=0.2,
        rms_cap=1.0,
        ns_coefficients=MUON,
        path="matrix",
    )
    torchs = torch.optim.Muon(
        [theirs],
        lr=0.02,
        momentum=0.95,
        weight_decay=0.1,
        nesterov=nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(8):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        torchs.step()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_row_norm_makes_rows_move_equally_far_at_the_groups_own_retention():
    spread = torch.logspace(0, -2, 24)[:, None]

    def lengths(**arguments):
        param = nn.Parameter(torch.zeros(24, 16))
        optimizer = deepopt.DeepMomentum(
            [{"params": [param], "betas": (0.0, 0.5)}], memory="linear", weight_decay=0, **arguments
        )
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            param.grad = torch.randn(24, 16, generator=generator) * spread
            before = param.detach().clone()
            optimizer.step()
        if "row_norm" not in arguments:
            weight = optimizer.state[param]["row_weight"]
            torch.testing.assert_close(weight, torch.full_like(weight, 1 - 0.5**4))
        rows = (param.detach() - before).norm(dim=-1)
        return float(rows.max() / rows.min())

    assert lengths() < 3 < lengths(row_norm=False)


@pytest.mark.parametrize("memory", BUILT_IN)
@pytest.mark.parametrize("shape", [(40, 40), (16, 64), (64, 16)])
def test_updates_have_the_root_mean_square_that_is_asked_for(memory, shape):
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = deepopt.DeepMomentum(
        [param], lr=1.0, weight_decay=0, memory=memory, update_rms=0.2, path="matrix"
    )
    for _ in range(5):
        param.grad = torch.randn(shape, generator=generator)
        before = param.detach().clone()
        optimizer.step()
        rms = (param.detach() - before).square().mean().sqrt()
        assert 0.17 < rms < 0.23


def test_a_rank_one_gradient_is_enlarged_by_no_more_than_the_cap():
    param = nn.Parameter(torch.zeros(64, 64))
    optimizer = deepopt.DeepMomentum(
        [param], lr=1.0, weight_decay=0, memory="linear", row_norm=False, update_rms=0.2, ns_steps=8
    )
    param.grad = torch.outer(torch.randn(64), torch.randn(64))
    optimizer.step()
    spectral = torch.linalg.matrix_norm(param.detach(), ord=2)
    assert math.isclose(spectral, 1.5 * 0.2 * 64**0.5, rel_tol=0.02)


@pytest.mark.parametrize("memory", BUILT_IN)
def test_a_batched_step_is_each_matrix_stepped_alone(memory):
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(24, 32, generator=generator) for _ in range(3)]
    grads = torch.randn(6, 3, 24, 32, generator=generator)

    def run(split):
        params = [nn.Parameter(start.clone()) for start in starts]
        makers = [[p] for p in params] if split else [params]
        optimizers = [deepopt.DeepMomentum(p, memory=memory, lr=0.01) for p in makers]
        for grad in grads:
            for param, part in zip(params, grad, strict=True):
                param.grad = part.clone()
            for optimizer in optimizers:
                optimizer.step()
        return torch.stack([p.detach() for p in params])

    torch.testing.assert_close(run(split=True), run(split=False), atol=1e-5, rtol=1e-4)


def test_a_stack_is_stepped_as_its_matrices_are():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 24, 32, generator=generator)
    whole = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start]
    optimizers = [
        deepopt.DeepMomentum([whole], path="stack"),
        deepopt.DeepMomentum(parts, path="matrix"),
    ]
    for _ in range(5):
        whole.grad = torch.randn(start.shape, generator=generator)
        for part, grad in zip(parts, whole.grad, strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole.detach(), torch.stack([p.detach() for p in parts]))


def test_a_convolution_is_the_matrix_of_its_output_channels():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(32, 4, 3, 3, generator=generator)
    kernel = nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.flatten(1).clone())
    optimizers = [deepopt.DeepMomentum([p], path="matrix") for p in (kernel, matrix)]
    for _ in range(3):
        grad = torch.randn(start.shape, generator=generator)
        kernel.grad = grad.to(memory_format=torch.channels_last)
        matrix.grad = grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory", BUILT_IN)
def test_zero_gradients_move_nothing_and_leave_training_able_to_start(memory):
    """As of a network whose zero-initialized head passes nothing back at the first step."""
    param = nn.Parameter(torch.randn(32, 32))
    optimizer = deepopt.DeepMomentum([param], memory=memory, weight_decay=0)
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.zeros(32, 32)
        optimizer.step()
        assert torch.equal(param.detach(), before)
    param.grad = torch.randn(32, 32)
    optimizer.step()
    moved = (param.detach() - before).square().mean().sqrt()
    assert 0.2e-3 < moved < 1.1e-3 * getattr(resolve(memory), "gain", 1.0)


def test_a_memorys_gain_enlarges_measured_sizes_alone():
    grads = torch.randn(3, 24, 32)
    ends = {}
    for update_rms in (None, 0.2):
        for gain in (1.0, 3.0):
            param = nn.Parameter(torch.zeros(24, 32))
            memory = Covariance(gain=gain)
            optimizer = deepopt.DeepMomentum([param], memory=memory, update_rms=update_rms)
            for param.grad in grads:
                optimizer.step()
            ends[update_rms, gain] = param.detach()
    torch.testing.assert_close(ends[None, 3.0], 3 * ends[None, 1.0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ends[0.2, 3.0], ends[0.2, 1.0])


@pytest.mark.parametrize("memory", BUILT_IN)
@pytest.mark.parametrize("signal", [0.0, 0.3, 3.0])
def test_updates_have_the_root_mean_square_of_adamw_but_at_least_0_4(memory, signal):
    """That of AdamW's own updates on the same stream, from pure noise to almost none."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(24, 40)) for _ in range(2)]
    optimizers = [
        deepopt.DeepMomentum(params[:1], lr=1.0, weight_decay=0, memory=memory),
        torch.optim.AdamW(params[1:], lr=1.0, weight_decay=0),
    ]
    mean = torch.randn(24, 40, generator=generator)
    sizes = []
    for _ in range(60):
        grad = signal * mean + torch.randn(24, 40, generator=generator)
        before = [param.detach().clone() for param in params]
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad
            optimizer.step()
        steps = [p.detach() - q for p, q in zip(params, before, strict=True)]
        sizes.append([step.square().mean().sqrt().item() for step in steps])
    ours, adamws = torch.tensor(sizes[20:]).mean(0)
    # The delta memory's horizon is shorter, and the average of fewer gradients is larger.
    expected = max(adamws, min(0.4, 3 * adamws)) * getattr(resolve(memory), "gain", 1.0)
    assert 0.7 < ours / expected < (1.6 if memory == "delta" else 1.4)


@pytest.mark.parametrize("memory", BUILT_IN)
def test_a_parameter_whose_gradient_stops_comes_to_rest(memory):
    param = nn.Parameter(torch.zeros(32, 32))
    optimizer = deepopt.DeepMomentum([param], lr=1e-3, weight_decay=0, memory=memory)
    param.grad = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    param.grad.zero_()
    for _ in range(300):
        optimizer.step()
    assert param.detach().square().mean().sqrt() < 0.02
    before = param.detach().clone()
    optimizer.step()
    assert (param.detach() - before).abs().max() < 1e-9


class SignMemory:
    """A user's own memory: three methods and a tensor of state."""

    def init(self, like):
        return {"votes": torch.zeros_like(like)}

    def write(self, state, grad, retention):
        state["votes"] = retention * state["votes"] + grad.sign()

    def read(self, state, grad, retention):
        return state["votes"]


def test_any_object_with_the_three_methods_is_a_memory():
    model, loss = problem()
    optimizer = deepopt.DeepMomentum(model.parameters(), lr=3e-3, memory=SignMemory())
    before = loss().item()
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["memory"] == "SignMemory"
    memory = optimizer.param_groups[0]["memory"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["memory"] is memory


def test_a_memory_that_writes_and_reads_in_one_call_needs_no_other():
    class InOneCall:
        init = staticmethod(SignMemory().init)

        def write_and_read(self, state, grad, retention):
            memory = SignMemory()
            memory.write(state, grad, retention)
            return memory.read(state, grad, retention)

    def moved(memory):
        made = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.zeros(6, 9))
        optimizer = deepopt.DeepMomentum([param], path="matrix", memory=memory)
        for _ in range(5):
            param.grad = torch.randn(6, 9, generator=made)
            optimizer.step()
        return param.detach()

    assert torch.equal(moved(InOneCall()), moved(SignMemory()))


def test_a_memory_that_reads_in_another_dtype_is_refused_with_both():
    class Wide(SignMemory):
        def read(self, state, grad, retention):
            return super().read(state, grad, retention).double()

    param = nn.Parameter(torch.randn(32, 32))
    param.grad = torch.randn(32, 32)
    with pytest.raises(ValueError, match=r"torch\.float64 for gradients .* torch\.float32"):
        deepopt.DeepMomentum([param], memory=Wide()).step()


def test_a_memory_that_takes_the_optimizers_own_names_is_refused():
    class Greedy(SignMemory):
        def init(self, like):
            return {"step": torch.zeros(len(like))}

    param = nn.Parameter(torch.randn(32, 32))
    param.grad = torch.randn(32, 32)
    with pytest.raises(ValueError, match=r"must not use the names \{'step'\}"):
        deepopt.DeepMomentum([param], memory=Greedy()).step()


@pytest.mark.parametrize(
    ("shape", "path"), [((5,), "matrix"), ((5, 5), "stack"), ((5, 5), "complex")]
)
def test_a_path_that_does_not_fit_the_parameter_is_refused(shape, path):
    dtype = torch.complex64 if path == "complex" else torch.float32
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    with pytest.raises(ValueError, match="Invalid path"):
        deepopt.DeepMomentum([param], path="matrix" if path == "complex" else path)


def moved_by(grad, share, **options):
    """What the first step on a gradient adds to a weight of zeros."""
    weight = nn.Parameter(torch.zeros_like(grad))
    optimizer = deepopt.DeepMomentum(
        [weight], lr=1.0, memory="linear", weight_decay=0.0, momentum_share=share, **options
    )
    weight.grad = grad
    optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
@pytest.mark.parametrize("share", [0.15, 0.6])
def test_a_share_of_the_momentum_is_added_at_the_size_of_the_update(shape, share):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"row_norm": False, "update_rms": 0.2, "rms_cap": 1.0}
    orthogonal, both = (moved_by(grad, rho, **options) for rho in (0.0, share))
    # Newton-Schulz gives singular values near 1, and the momentum is added at the norm of ones.
    norm = newton_schulz(grad, polar_express(5), grad.dtype).norm()
    unit = -orthogonal / orthogonal.norm() * norm
    expected = (1 - share) * unit + share * min(shape) ** 0.5 * grad / grad.norm()
    torch.testing.assert_close(both, -expected / expected.norm() * orthogonal.norm())


def test_a_share_of_the_momentum_lengthens_the_one_large_direction():
    generator = torch.Generator().manual_seed(0)
    large = torch.outer(torch.randn(64, generator=generator), torch.randn(32, generator=generator))
    grad = large + 0.1 * torch.randn(64, 32, generator=generator)
    along = [(-(moved_by(grad, rho) * large).sum() / large.norm()).item() for rho in (0.0, 0.15)]
    assert along[1] > 1.5 * along[0]


def test_a_checkpoint_from_before_the_share_loads_without_one():
    weight = nn.Parameter(torch.ones(16, 16))
    optimizer = deepopt.DeepMomentum([weight])
    weight.grad = torch.ones(16, 16)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["momentum_share"]
    for share in (0.0, 0.3):  # what the group says, and not the default
        fresh = deepopt.DeepMomentum([{"params": [weight], "momentum_share": share}])
        fresh.load_state_dict(saved)
        assert fresh.param_groups[0]["momentum_share"] == share
        fresh.step()


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_share_of_a_momentum_that_lacks_rank_moves_along_it_alone(rank):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(32, rank, generator=generator)
    right = torch.randn(rank, 24, generator=generator)
    grad = left @ right
    moved = moved_by(grad, 0.3, row_norm=False)
    assert moved.isfinite().all()
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) == rank


def test_derivatives_reach_a_share_that_is_a_tensor():
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def after(share):
        optimizer = deepopt.functional(
            deepopt.DeepMomentum, memory="linear", path="matrix", momentum_share=share
        )
        params = {"w": torch.zeros_like(grad)}
        return optimizer.update({"w": grad}, optimizer.init(params), params)[0]["w"]

    assert torch.autograd.gradcheck(after, (share,))
