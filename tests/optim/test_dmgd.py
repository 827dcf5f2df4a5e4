"""DMGD: the printed rule, which is no descent method, and the settled one, which is."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from deepopt.memory.module import Module, TanhMLP
from deepopt.optim.dmgd import DMGD
from tests import literal_dmgd as reference

SPREAD = np.array([[1.0, 0.5, 2.0], [0.3, 1.5, 1.0]])  # curvatures of a small quadratic


class Diagonal(nn.Module):
    """The linear memory m(u) = a * u, entry by entry."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(in_features))

    def forward(self, keys):
        return self.a * keys


def plain_mlp(in_features, out_features):
    return TanhMLP(in_features, out_features, hidden=4)


def warm_mlp(in_features, out_features):
    """One that recalls something from the start."""
    module = plain_mlp(in_features, out_features)
    nn.init.normal_(module.last)
    return module


def weights_of(factory, *widths):
    torch.default_generator.manual_seed(0)
    module = factory(*widths)
    return [p.detach().double().numpy() for p in (module.first, module.last)]


def descend(start, steps, curvature=1.0, **options):
    """Minimise ½ Σ c w², all in float64, and return w."""
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = DMGD([w], weight_decay=0.0, **options)
    for _ in range(steps):
        w.grad = (torch.as_tensor(curvature) * w).detach()
        optimizer.step()
    return w.detach().numpy()


# -- the printed rule ----------------------------------------------------------------------------


def test_the_printed_rule_with_a_linear_memory_is_the_transcription_and_does_not_descend():
    """The tenth derived fact, first half: value 1."""
    start = np.array([[-2.0, 1.0, 0.5]])
    found = descend(
        start,
        400,
        lr=1.0,
        betas=(0.9, 0.999),
        memory=Diagonal,
        granularity="row",
        inner_lr=1.2e-4,
        objective="literal",
    )
    expected = reference.printed_linear(start, lambda w: w, 0.9, 1.2e-4, 400)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    assert found[0, 0] < 9 * start[0, 0]  # the negative coordinate runs away, faster and faster


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_with_the_gradient_as_value_the_same_linear_memory_descends(objective):
    """The tenth derived fact, second half: value u."""
    start = np.array([[-2.0, 1.0, 0.5]])
    options = {"lr": 0.1, "memory": Diagonal, "granularity": "row", "inner_lr": 0.5}
    distances = [
        np.linalg.norm(descend(start, n, objective=objective, output_map="identity", **options))
        for n in (0, 1, 10, 100, 200)
    ]
    assert all(np.diff(distances) < 0)
    assert distances[-1] < 0.05 * distances[0]


@pytest.mark.parametrize("granularity", ["coordinate", "row"])
def test_the_printed_rule_with_an_mlp_is_the_transcription(granularity):
    start = np.array([[-2.0, 1.0, 0.5], [1.0, 0.2, -0.7]])
    widths = (3, 3) if granularity == "row" else (1, 1)
    found = descend(
        start,
        12,
        SPREAD,
        lr=1.0,
        betas=(0.8, 0.999),
        memory=warm_mlp,
        granularity=granularity,
        inner_lr=0.05,
        objective="literal",
    )
    expected, *_ = reference.printed_mlp(
        start, lambda w: SPREAD * w, 0.8, 0.05, 12, *weights_of(warm_mlp, *widths)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_printed_rule_with_a_shared_mlp_diverges_where_the_settled_one_descends():
    start, curvature = np.array([-2.0, 1.0, 0.5, 3.0]), np.array([1.0, 0.5, 2.0, 1.0])

    def ordinary_mlp(in_features, out_features):
        return nn.Sequential(nn.Linear(in_features, 8), nn.Tanh(), nn.Linear(8, out_features))

    options = {"memory": ordinary_mlp, "inner_lr": 0.05}
    printed = descend(start, 200, curvature, lr=1.0, objective="literal", **options)
    assert printed.max() < -30.0  # all coordinates are pushed the same way, wherever they began
    for objective in ("dot", "l2"):
        found = descend(
            start, 200, curvature, lr=0.1, objective=objective, output_map="identity", **options
        )
        assert np.abs(found).max() < 0.1, objective


def test_newton_schulz_of_the_printed_rule_is_taken_without_a_size():
    w = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = DMGD(
        [w],
        1.0,
        memory=warm_mlp,
        granularity="row",
        objective="literal",
        output_map="newton_schulz",
        weight_decay=0.0,
    )
    before, w.grad = w.detach().clone(), torch.randn_like(w)
    optimizer.step()
    values = torch.linalg.svdvals(w.detach() - before)
    assert 0.5 < values.min()
    assert values.max() < 1.3


# -- the settled rule ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("form", ["coordinate", "row"])
def test_the_settled_rule_is_the_transcription(form, objective):
    start = np.array([[-2.0, 1.0, 0.5], [1.0, 0.2, -0.7]])
    found = descend(
        start,
        15,
        SPREAD,
        lr=0.05,
        betas=(0.8, 0.95),
        memory=plain_mlp,
        granularity=form,
        objective=objective,
        inner_lr=0.3,
    )
    widths = (3, 3) if form == "row" else (3, 1)
    expected = reference.settled(
        start, lambda w: SPREAD * w, 0.05, (0.8, 0.95), 0.3, 15,
        *weights_of(plain_mlp, *widths), objective, form,
    )  # fmt: skip
    # Step counts, and with them the corrections of averages, are float32.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_without_inner_learning_it_is_momentum():
    start = np.array([[-2.0, 1.0, 0.5]])
    found = descend(start, 5, lr=0.1, betas=(0.7, 0.999), inner_lr=0.0, output_map="identity")
    w, mean = start, 0.0
    for step in range(1, 6):
        mean = 0.7 * mean + 0.3 * w
        w = w - 0.1 * mean / (1 - 0.7**step)
    np.testing.assert_allclose(found, w, rtol=1e-12)


def test_the_step_does_not_depend_on_the_scale_of_the_loss():
    start = np.array([[-2.0, 1.0, 0.5]])
    for granularity in ("coordinate", "row"):
        small, large = (
            descend(start, 6, scale, lr=0.1, granularity=granularity) for scale in (1e-6, 1e6)
        )
        np.testing.assert_allclose(small, large, rtol=1e-6)


def test_the_row_form_recalls_what_similar_rows_were_taught():
    """A rank-one stream is recalled, noise it never saw is not."""
    direction = torch.randn(1, 1, 32, dtype=torch.float64)
    memory = Module(plain_mlp, inner_lr=0.3)
    state = memory.init(direction.expand(1, 8, 32))
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)[None, :, None]
    for _ in range(50):
        memory.write(state, signs * direction, 0.95)
    recalled = memory.read(state, signs * direction, 0.95)
    other = torch.randn(1, 8, 32, dtype=torch.float64)
    other = other - (other * direction).sum(-1, True) * direction / direction.square().sum()
    assert (recalled * signs * direction).sum() > 0.7 * (8 * direction.square()).sum()
    assert memory.read(state, other, 0.95).norm() < 0.5 * other.norm()


def test_same_shaped_parameters_are_trained_apart():
    torch.manual_seed(0)
    start, grads = torch.randn(3, 4, 5), torch.randn(6, 3, 4, 5)
    for granularity in ("coordinate", "row"):
        together = [nn.Parameter(w.clone()) for w in start]
        alone = [nn.Parameter(w.clone()) for w in start]
        optimizers = [DMGD(together, granularity=granularity, inner_lr=0.5)]
        optimizers += [DMGD([w], granularity=granularity, inner_lr=0.5) for w in alone]
        for grad in grads:
            for params in (together, alone):
                for param, g in zip(params, grad, strict=True):
                    param.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(together, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_matrices_beyond_the_bound_are_trained_one_after_the_other(monkeypatch):
    def train():
        params = [nn.Parameter(torch.ones(3, 4) * k) for k in range(1, 5)]
        optimizer = DMGD(params, inner_lr=0.5)
        for step in range(3):
            for param in params:
                param.grad = torch.sin(param.detach() * (step + 1))
            optimizer.step()
        return torch.stack([p.detach() for p in params])

    expected = train()
    monkeypatch.setattr("deepopt.memory.module.TRAINED_AT_ONCE", 24)
    torch.testing.assert_close(train(), expected)


def test_inner_steps_descend_on_the_inner_objective():
    memory = Module(plain_mlp, inner_lr=0.3)
    grad = torch.randn(1, 8, 6, dtype=torch.float64)
    errors = []
    for steps in (1, 4, 16):
        memory = Module(plain_mlp, inner_lr=0.3, inner_steps=steps)
        state = memory.init(grad)
        memory.write(state, grad, 0.9)
        errors.append((memory.read(state, grad, 0.9) - grad).norm().item())
    assert errors[0] > errors[1] > errors[2]


def test_a_named_objective_is_the_callable_that_it_stands_for():
    start = np.array([[-2.0, 1.0, 0.5], [1.0, 0.2, -0.7]])

    def double(g):
        return 2 * g

    pairs = [
        ({"objective": "dot"}, {"objective": lambda y, g: (y * g).mean()}),
        ({"objective": "l2"}, {"objective": lambda y, g: (y + g).square().mean() / 2}),
        (
            {"preconditioner": double},
            {"objective": lambda y, g: (y + 2 * g).square().mean() / 2},
        ),
        ({"feature_map": (1.0, 0.5)}, {"feature_map": lambda u: u + 0.5 * u**3}),
        ({"output_map": "identity"}, {"output_map": lambda y: y}),
    ]
    plain = descend(start, 4, SPREAD, lr=0.1)
    for named, called in pairs:
        found = [descend(start, 4, SPREAD, lr=0.1, **options) for options in (named, called)]
        np.testing.assert_allclose(*found, rtol=1e-12)
        assert named == {"objective": "l2"} or not np.allclose(found[0], plain)


@pytest.mark.parametrize("memory", [nn.Linear, plain_mlp])
@pytest.mark.parametrize("granularity", ["coordinate", "row"])
def test_any_module_trains_parameters_of_any_number_of_dimensions(memory, granularity):
    torch.manual_seed(0)
    shapes = [(), (5,), (4, 6), (3, 4, 2), (2, 3, 2, 2)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = DMGD(params, 0.05, memory=memory, granularity=granularity, inner_lr=0.3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("output_map", ["rms", "newton_schulz"])
def test_the_first_step_has_the_size_of_adamws(output_map):
    w = nn.Parameter(torch.zeros(16, 12))
    optimizer = DMGD([w], lr=1e-2, output_map=output_map)
    w.grad = torch.randn(16, 12)
    optimizer.step()
    rms = w.detach().square().mean().sqrt()
    assert 0.7e-2 < rms < 1.1e-2


def test_modules_with_fixed_parameters_keep_them():
    class Fixed(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.constant = nn.Parameter(torch.eye(i), requires_grad=False)
            self.out = nn.Linear(i, o, bias=False)

        def forward(self, x):
            return self.out(x @ self.constant)

    w = nn.Parameter(torch.randn(3, 4))
    optimizer = DMGD([w], memory=Fixed, granularity="row")
    w.grad = torch.randn(3, 4)
    optimizer.step()
    state = optimizer.state[w]
    assert torch.equal(state["weight.constant"], torch.eye(4)[None])
    assert not torch.equal(state["weight.out.weight"], state["origin.out.weight"])


def test_the_state_is_as_small_as_documented():
    w = nn.Parameter(torch.randn(64, 32))
    for options, floats in (
        ({}, 2 * 64 * 32 + 2 * 4 * 8 + 1),
        ({"granularity": "row", "hidden": 4}, 2 * 2 * 4 * 32 + 1),
        ({"granularity": "row", "hidden": 4, "objective": "literal"}, 2 * 4 * 32),
        ({"objective": "literal", "hidden": 4}, 2 * 4),
    ):
        optimizer = DMGD([w], **options)
        w.grad = torch.randn(64, 32)
        optimizer.step()
        kept = [v.numel() for k, v in optimizer.state[w].items() if k != "step"]
        assert sum(kept) == floats


def test_making_the_state_leaves_the_random_generator_alone():
    w = nn.Parameter(torch.randn(4, 5))
    before = torch.get_rng_state()
    w.grad = torch.ones(4, 5)
    DMGD([w]).step()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("granularity", ["coordinate", "row"])
def test_a_gradient_that_stops_stops_the_parameter(granularity):
    w = nn.Parameter(torch.randn(4, 5))
    optimizer = DMGD([w], 0.1, granularity=granularity, weight_decay=0.0, inner_lr=0.5)
    for grad in torch.randn(5, 4, 5):
        w.grad = grad
        optimizer.step()
    assert w.isfinite().all()
    w.grad = torch.zeros(4, 5)
    for _ in range(300):
        optimizer.step()
    before = w.detach().clone()
    optimizer.step()
    assert (w - before).abs().max() < 1e-6


# -- what is refused -----------------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(i), nn.Linear(i, o)

    def forward(self, x):
        return self.out(self.norm(x))


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (WithBuffers, ValueError, "BatchNorm1d|WithBuffers has buffers .norm.running_mean"),
        (lambda i, o: nn.Linear(i, o + 1), ValueError, r"must map \(2, 5\) to \(2, 5\)"),
        (lambda i, o: nn.Tanh(), ValueError, "no parameters to train"),
        (lambda i, o: torch.tanh, TypeError, "must return an nn.Module"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_before_anything_moves(memory, error, message):
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 5))]
    before = [p.detach().clone() for p in params]
    optimizer = DMGD(
        [{"params": params[:1]}, {"params": params[1:], "memory": memory}], granularity="row"
    )
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": lambda y, g: y * g}, "Invalid objective: .* must return a scalar"),
        ({"output_map": lambda y: y.sum()}, "Invalid output_map: it returned"),
    ],
)
def test_a_callable_with_a_wrong_result_is_named(options, message):
    w = nn.Parameter(torch.randn(4, 5))
    w.grad = torch.ones(4, 5)
    with pytest.raises(ValueError, match=message):
        DMGD([w], **options).step()


def test_optimizers_in_two_threads_leave_each_other_alone():
    def run(results=None, index=0):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(24, 20, generator=generator))
        optimizer = DMGD([param], lr=1e-2)
        for _ in range(6):
            param.grad = torch.randn(24, 20, generator=generator)
            optimizer.step()
        if results is not None:
            results[index] = param.detach()
        return param.detach()

    expected, results = run(), {}
    threads = [threading.Thread(target=run, args=(results, index)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected) for index in range(3))
