"""What one step, and a run of steps, promises."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    assert_same,
    backward,
    every,
    every_class,
    every_settled,
    feed,
    gradient_stream,
    make_model,
    moved,
    run,
    values,
)

pytestmark = EXPECTED_WARNINGS


@every_settled
def test_it_descends(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    sign = -1 if options.get("maximize") else 1
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 16)) - 1).square().mean()
        (sign * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@every
def test_the_same_run_gives_the_same_bits(cls, options):
    def once():
        torch.manual_seed(3)
        model = make_model()
        return run(model, cls(model.parameters(), **options), 4)

    first = once()
    torch.randn(7)  # the global generator has no say
    assert_same(once(), first)


@every
def test_gradients_are_never_written_to(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **{**options, "maximize": True})
    for step in range(3):
        model.zero_grad()
        backward(model, step)
        versions = [p.grad._version for p in model.parameters()]
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert versions == [p.grad._version for p in model.parameters()]
        assert_same([p.grad for p in model.parameters()], before)


@every
def test_maximize_of_a_group_is_descent_on_the_negative_gradient(cls, options):
    def final(sign, maximize):
        params = [nn.Parameter(torch.zeros(24, 32)), nn.Parameter(torch.zeros(5))]
        optimizer = cls([{"params": params, "maximize": maximize}], **options)
        for grads in gradient_stream([(24, 32), (5,)], 3):
            feed(optimizer, params, [[sign * grad for grad in grads]])
        return values(params)

    assert_same(final(-1.0, False), final(1.0, True))


@every
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_rate_of_zero_moves_nothing_and_makes_all_state(cls, options, lr):
    model = make_model()
    optimizer = cls(model.parameters(), **{**options, "lr": lr})
    before = values(model.parameters())
    assert_same(run(model, optimizer, 2), before)
    assert all(optimizer.state[param] for param in model.parameters())


@every
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_rate_is_the_same_as_a_float(cls, options, shape):
    model, other = make_model(), make_model()
    before = values(model.parameters())
    lr = torch.full(shape, 3e-3)
    found = run(model, cls(model.parameters(), **{**options, "lr": lr}), 4)
    expected = run(other, cls(other.parameters(), **{**options, "lr": lr.item()}), 4)
    assert moved(model.parameters(), before)
    assert_near(found, expected)


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device: copies to it or from it that block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocks and isinstance(source, torch.Tensor) and source.device != result.device:
                self.found.append(func)
        return result


@every
def test_no_step_waits_for_the_device(cls, options):
    """On the meta device there is nothing to read: a value that the host asks for is an error."""
    params = [nn.Parameter(torch.empty(s, device="meta")) for s in ((24, 32), (32, 24), (7,))]
    optimizer = cls(params, **options)
    for step in range(12):
        for param in params:
            param.grad = torch.empty_like(param)
        if step == 0:
            optimizer.step()  # makes the state
            continue
        with Waits() as waits:
            optimizer.step()
        assert not waits.found


@every
def test_zero_gradients_move_nothing_and_leave_training_able_to_start(cls, options):
    params = [nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(7))]
    optimizer = cls(params, **{**options, "weight_decay": 0})
    before = values(params)
    feed(optimizer, params, [[torch.zeros_like(p) for p in params]] * 2)
    assert_same(values(params), before)
    feed(optimizer, params, gradient_stream([(24, 32), (7,)], 2))
    assert moved(params, before)
    assert all(param.isfinite().all() for param in params)


@every_class
def test_a_sparse_gradient_is_refused_before_any_parameter_moves(cls):
    dense, sparse = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(4, 3))
    optimizer = cls([{"params": [dense]}, {"params": [sparse]}])
    dense.grad, sparse.grad = torch.randn(32, 32), torch.eye(4, 3).to_sparse()
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match=r"[A-Z]\w+ does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, before)


@every_class
def test_a_rate_that_becomes_a_tensor_under_foreach_is_refused_before_any_parameter_moves(cls):
    model = make_model()
    optimizer = cls(model.parameters(), foreach=True)
    run(model, optimizer, 1)
    before = values(model.parameters())
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2)
    with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
        run(model, optimizer, 1)
    assert_same(values(model.parameters()), before)


@every
def test_a_parameter_whose_gradient_is_not_finite_harms_no_other(cls, options):
    def final(value):
        params = [nn.Parameter(torch.ones(20, 24)) for _ in range(2)] + [
            nn.Parameter(torch.ones(7))
        ]
        optimizer = cls(params, **options)
        for step, grads in enumerate(gradient_stream([(20, 24), (20, 24), (7,)], 3)):
            if step == 1:
                grads[0][3, 5] = value
            feed(optimizer, params, [grads])
        return params

    clean = values(final(0.5))[1:]
    for value in (torch.inf, torch.nan):
        poisoned = final(value)
        assert not poisoned[0].isfinite().all()
        assert_near(values(poisoned[1:]), clean)


@every_class
def test_closures_are_run_once_with_gradients_and_their_loss_is_returned(cls):
    model, calls = make_model(), []
    optimizer = cls(model.parameters())

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        return backward(model)

    before = values(model.parameters())
    assert isinstance(optimizer.step(closure=closure), torch.Tensor)
    assert calls == [True]
    assert moved(model.parameters(), before)
    assert optimizer.step() is None
