"""What torch and its users ask of an optimizer, over every class of the registry.

An entry of ``deepopt/optim/registry.py``, with its arguments in ``inputs.py``, brings a class under
all of these.
"""

import copy
import inspect
import io
import itertools
import multiprocessing
import pickle
import re
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import deepopt
from deepopt.optim import base
from deepopt.optim.registry import REGISTRY
from tests.optim.contract.inputs import INPUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*(captured|element-wise).*:UserWarning")


class Wrapped(deepopt.Continuum):
    """A wrapper of optimizers under the contract of what it wraps."""

    def __init__(self, params, chunk=1, reduce="mean", **options):
        super().__init__(deepopt.DeepMomentum(params, **options), chunk, reduce=reduce)


ENTRIES = [(Wrapped if e.wraps else e.cls, INPUTS[name]) for name, e in REGISTRY.items()]
SETTLED = [(cls, options) for cls, inputs in ENTRIES for options in inputs.options]
LITERAL = [(cls, options) for cls, inputs in ENTRIES for options in inputs.literal]
DEFAULT = [cls for cls, _ in ENTRIES]


def label(value):
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return ",".join(f"{key}={_short(value[key])}" for key in value) or "default"
    return None


def _short(value):
    return getattr(value, "__name__", None) or re.sub(" at 0x[0-9a-f]+", "", str(value)[:40])


every = pytest.mark.parametrize(("cls", "options"), SETTLED + LITERAL, ids=label)
every_settled = pytest.mark.parametrize(("cls", "options"), SETTLED, ids=label)
every_class = pytest.mark.parametrize("cls", DEFAULT, ids=label)


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = (nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    return nn.Sequential(*layers).to(dtype)


def backward(model, step=0, size=8):
    inputs = torch.randn(size, 16, generator=torch.Generator().manual_seed(step))
    weight = next(model.parameters())
    loss = (model(inputs.to(weight.dtype)) - 1).square().mean()
    loss.backward()
    return loss


def run(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return values(model.parameters())


def values(params):
    return [param.detach().clone() for param in params]


def moved(params, before):
    return all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def assert_near(found, expected, atol=2e-6, rtol=2e-4):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


def states(optimizer):
    """All state tensors, in a fixed order."""
    found = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            found += [state[key].clone() for key in sorted(state)]
    return found


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def gradient_stream(shapes, steps, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    kind = dtype if dtype in (torch.float64, torch.complex64) else torch.float32
    for _ in range(steps):
        yield [torch.randn(s, generator=generator, dtype=kind).to(dtype) for s in shapes]


def start_values(shapes, dtype=torch.float32, seed=0):
    return next(gradient_stream(shapes, 1, dtype, seed))


def feed(optimizer, params, stream):
    for grads in stream:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()


# -- arguments --------------------------------------------------------------------------------


def test_every_class_of_the_registry_has_inputs_and_nothing_else_has():
    assert INPUTS.keys() == REGISTRY.keys()
    assert all(inputs.options for inputs in INPUTS.values())


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [(cls, *case) for cls, inputs in ENTRIES for case in inputs.all_errors],
    ids=label,
)
def test_bad_arguments_are_refused_by_name_before_anything_else(cls, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        cls([torch.zeros(1)] if cls is Wrapped else None, **arguments)
    optimizer = cls([nn.Parameter(torch.randn(3))])
    with pytest.raises(error, match=re.escape(message)):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3))], **arguments})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error, match=re.escape(message)):
        cls([{"params": [nn.Parameter(torch.randn(3))], **arguments}])


@every_class
def test_an_empty_list_and_a_bare_tensor_are_refused_as_torch_refuses_them(cls):
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([])
    with pytest.raises(TypeError, match="params argument"):
        cls(torch.zeros(3))


@every
def test_it_takes_whatever_torch_takes_for_parameters(cls, options):
    model = make_model()
    for params in (
        model.parameters(),
        list(model.named_parameters()),
        [
            {"params": model[:3].parameters(), "weight_decay": 0.0},
            {"params": list(model[3:].parameters())},
        ],
        deepopt.param_groups(model),
    ):
        before = values(model.parameters())
        run(model, cls(params, **options), 1)
        assert moved(model.parameters(), before)


@every_class
def test_every_argument_is_a_value_of_the_group_and_shows_in_the_repr(cls):
    optimizer = cls(make_model().parameters())
    inner = deepopt.DeepMomentum if cls is Wrapped else cls
    names = inspect.signature(inner).parameters.keys() - {"params"}
    assert {"lr", "betas", "weight_decay", "maximize", "foreach", "fused"} <= names
    assert names <= optimizer.param_groups[0].keys()
    for name in names:
        assert f"    {name}: " in repr(optimizer)


# -- the step ---------------------------------------------------------------------------------


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


SHAPES = [(), (1,), (7,), (0,), (0, 40), (40, 0), (20, 24), (3, 20, 24), (20, 4, 3, 3)]
SHAPES += [(18, 2, 2, 2, 3)]


@every
def test_parameters_of_any_shape_are_stepped(cls, options):
    params = [nn.Parameter(value) for value in start_values(SHAPES)]
    optimizer = cls(params, **options)
    before = values(params)
    feed(optimizer, params, gradient_stream(SHAPES, 3))
    for param, old in zip(params, before, strict=True):
        assert param.isfinite().all()
        assert not param.numel() or not torch.equal(param, old), param.shape


def transposed(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


@every
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=label)
def test_memory_layout_changes_no_value_and_is_kept(cls, options, flags):
    shapes = [(7,), (20, 24), (20, 18, 3, 3)]
    start = start_values(shapes)

    def final(param_layout, grad_layout):
        params = [nn.Parameter(param_layout(value.clone())) for value in start]
        strides = [param.stride() for param in params]
        stream = ([grad_layout(g) for g in grads] for grads in gradient_stream(shapes, 3))
        feed(cls(params, **{**options, **flags}), params, stream)
        assert [param.stride() for param in params] == strides
        return values(params)

    expected = final(torch.clone, torch.clone)
    layouts = (torch.clone, transposed, strided, channels_last)
    for param_layout, grad_layout in itertools.product(layouts, layouts[1:]):
        assert_near(final(param_layout, grad_layout), expected)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_follow_the_float32_run(cls, options, dtype):
    shapes = [(20, 24), (7,)]
    start = [value.bfloat16().float() for value in start_values(shapes)]

    def travelled(kind):
        params = [nn.Parameter(value.to(kind, copy=True)) for value in start]
        stream = ([g.bfloat16().to(kind) for g in grads] for grads in gradient_stream(shapes, 3))
        feed(cls(params, **{**options, "lr": 0.1}), params, stream)
        assert {param.dtype for param in params} == {kind}
        return [p.detach().float() - q for p, q in zip(params, start, strict=True)]

    for ours, theirs in zip(travelled(dtype), travelled(torch.float32), strict=True):
        # Parameters are rounded at every step, bfloat16 to 1 in 256 of a value of up to about 4.
        share = {torch.float64: 0.02, torch.float16: 0.05, torch.bfloat16: 0.35}[dtype]
        assert (ours - theirs).norm() < share * theirs.norm()


@every
def test_state_is_float32_under_narrow_parameters_also_after_loading(cls, options):
    model = make_model(torch.bfloat16)
    optimizer = cls(model.parameters(), **options)
    run(model, optimizer, 2)
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    run(model, optimizer, 1)
    for state in optimizer.state.values():
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


@every
def test_dtypes_share_a_group_as_if_each_were_alone(cls, options):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    start = start_values([(20, 24), (7,)])

    def final(kinds):
        params = [nn.Parameter(v.to(kind, copy=True)) for kind in kinds for v in start]
        optimizer = cls(params, **options)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            grads = [torch.randn(p.shape, generator=generator) for p in start]
            for index, param in enumerate(params):
                param.grad = grads[index % 2].to(param.dtype)
            optimizer.step()
        return values(params)

    alone = [value for dtype in dtypes for value in final([dtype])]
    assert_same(final(dtypes), alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every
def test_devices_share_a_group_as_if_each_were_alone(cls, options):
    start = start_values([(20, 24), (7,)])
    params = [nn.Parameter(v.to(d, copy=True)) for d in ("cpu", "cuda") for v in start]
    stream = (
        [g.to(d) for d in ("cpu", "cuda") for g in gs]
        for gs in gradient_stream([(20, 24), (7,)], 3)
    )
    feed(cls(params, **options), params, stream)
    assert_near([p.detach().cpu() for p in params[2:]], values(params[:2]), 1e-4, 1e-3)


@every
def test_complex_parameters_are_refused_or_stepped_as_two_real_ones(cls, options):
    start = start_values([(6, 5)], torch.complex64)[0]
    param, twin = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start.clone()))
    if options.get("path", cls([torch.zeros(1)]).defaults["path"]) not in ("auto", "elementwise"):
        with pytest.raises(ValueError, match="complex"):
            cls([param], **options)
        return
    optimizer = cls([param], **options)
    reference = cls([twin], **{**options, "path": "elementwise"})
    for (grad,) in gradient_stream([(6, 5)], 3, torch.complex64):
        feed(optimizer, [param], [[grad]])
        feed(reference, [twin], [[torch.view_as_real(grad)]])
    torch.testing.assert_close(torch.view_as_real(param.detach()), twin.detach())


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


# -- independence -----------------------------------------------------------------------------


@every
def test_parameters_without_gradient_get_no_state_and_do_not_move(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **{**options, "weight_decay": 0.5})
    frozen = model[2].weight.requires_grad_(False)
    before = frozen.clone()
    run(model, optimizer, 2)
    assert torch.equal(frozen, before)
    assert not optimizer.state.get(frozen)
    frozen.requires_grad_(True)
    run(model, optimizer, 2)
    assert optimizer.state[frozen]["step"] == 2
    assert optimizer.state[model[0].weight]["step"] == 4


@every
def test_a_parameter_that_skips_steps_is_as_if_stepped_alone(cls, options):
    shapes = [(20, 24), (20, 24), (20, 24), (7,), (7,)]
    params = [nn.Parameter(value) for value in start_values(shapes)]
    alone = [nn.Parameter(value) for value in start_values(shapes)]
    together = cls(params, **options)
    apart = [cls([param], **options) for param in alone]
    for step, grads in enumerate(gradient_stream(shapes, 9)):
        for index, (p, q, grad) in enumerate(zip(params, alone, grads, strict=True)):
            p.grad = q.grad = None if (step + index) % 3 == 0 else grad
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_near(values(params), values(alone))


@every
def test_one_optimizer_per_parameter_in_the_backward_pass_equals_one_for_all(cls, options):
    joint, split = make_model(), make_model()
    expected = run(joint, cls(joint.named_parameters(), **options), 4)
    inner = {p: cls([(n, p)], **options) for n, p in split.named_parameters()}

    def step(param):
        inner[param].step()
        inner[param].zero_grad()

    for param in split.parameters():
        param.register_post_accumulate_grad_hook(step)
    for index in range(4):
        backward(split, index)
    assert_near(values(split.parameters()), expected)


@every_class
def test_groups_have_their_own_values(cls):
    slow, fast, up = (nn.Parameter(torch.zeros(32, 32)) for _ in range(3))
    groups = [
        {"params": [slow], "lr": 1e-5},
        {"params": [fast], "lr": 1e-2},
        {"params": [up], "maximize": True},
    ]
    optimizer = cls(groups, weight_decay=0)
    feed(optimizer, [slow, fast, up], [[torch.eye(32) + 0.1] * 3])
    assert fast.norm() > 50 * slow.norm() > 0
    assert up.trace() > 0 > fast.trace()


@every
def test_groups_can_be_added_in_mid_run(cls, options):
    model = make_model()
    optimizer = cls(model[0].parameters(), **options)
    run(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
    before = values(model[2].parameters())
    run(model, optimizer, 2)
    assert moved(model[2].parameters(), before)
    assert optimizer.state[model[2].weight]["step"] == 2


@every_class
@pytest.mark.parametrize(("key", "value"), [("lr", 1e-1), ("betas", (0.5, 0.9))])
def test_a_value_that_changes_in_mid_run_counts_from_then_on(cls, key, value):
    def final(change):
        param = nn.Parameter(torch.zeros(24, 32))
        optimizer = cls([param])
        for step, grads in enumerate(gradient_stream([(24, 32)], 4)):
            if step == 2 and change:
                optimizer.param_groups[0][key] = value
            feed(optimizer, [param], [grads])
        if key == "betas" and set(optimizer.state[param]) == {"step"}:
            pytest.skip("an optimizer that keeps no averages has no use for betas")
        return param.detach()

    assert (final(True) - final(False)).norm() > 0.02 * final(False).norm()


# -- schedules and averages -------------------------------------------------------------------


@every_class
@pytest.mark.parametrize(
    "make",
    [
        lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=6),
        lambda o: CosineAnnealingLR(o, 6),
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=3),
    ],
    ids=["OneCycleLR", "CosineAnnealingLR", "LambdaLR", "SWALR"],
)
def test_schedulers_drive_the_rate_and_the_momentum(cls, make):
    model, twin = make_model(), make_model()
    optimizer = cls(deepopt.param_groups(model))
    manual = cls(deepopt.param_groups(twin))
    scheduler = make(optimizer)
    for step in range(5):
        for theirs, ours in zip(optimizer.param_groups, manual.param_groups, strict=True):
            ours.update(lr=theirs["lr"], betas=theirs["betas"])
        expected = run(twin, manual, 1, first=step)
        assert_same(run(model, optimizer, 1, first=step, scheduler=scheduler), expected)
    assert optimizer.param_groups[0]["lr"] != optimizer.defaults["lr"]


@every_class
def test_a_scheduler_fills_a_tensor_rate_in_place(cls):
    model, lr = make_model(), torch.tensor(1e-2)
    optimizer = cls(model.parameters(), lr=lr)
    run(model, optimizer, 2, scheduler=LambdaLR(optimizer, lambda step: 0.5**step))
    assert optimizer.param_groups[0]["lr"] is lr or lr == 1e-2
    torch.testing.assert_close(optimizer.param_groups[0]["lr"], torch.tensor(2.5e-3))


@every_class
def test_averages_of_weights_follow_the_run(cls):
    model = make_model()
    optimizer = cls(model.parameters())
    mean = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    snapshots = []
    for step in range(3):
        snapshots.append(run(model, optimizer, 1, first=step))
        mean.update_parameters(model)
        ema.update_parameters(model)
    assert_near(
        values(mean.module.parameters()),
        [torch.stack(each).mean(0) for each in zip(*snapshots, strict=True)],
    )
    assert_near(
        values(ema.module.parameters()),
        [0.25 * a + 0.25 * b + 0.5 * c for a, b, c in zip(*snapshots, strict=True)],
    )


# -- checkpoints and copies -------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seen", [1, 3])
def test_training_resumes_from_disk_bit_for_bit(cls, options, dtype, seen):
    model = make_model(dtype)
    optimizer = cls(model.parameters(), **options)
    run(model, optimizer, seen)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run(model, optimizer, 5, first=seen)

    fresh = make_model(dtype, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed = cls(fresh.parameters(), **{**options, "lr": 1.0})
    resumed.load_state_dict(saved["optimizer"])
    assert_same(run(fresh, resumed, 5, first=seen), expected)


@every
def test_a_run_resumes_bit_for_bit_where_parameters_first_moved_at_different_steps(cls, options):
    """Their state then lies in different storages before saving and in one after loading."""
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    model[2].weight.requires_grad_(False)
    run(model, optimizer, 2)
    model[2].weight.requires_grad_(True)
    run(model, optimizer, 2, first=2)
    saved = through_disk(optimizer.state_dict())
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    resumed = cls(twin.parameters(), **options)
    resumed.load_state_dict(saved)
    assert_same(run(twin, resumed, 3, first=4), run(model, optimizer, 3, first=4))


@every
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_as_the_original_does(cls, options, copier):
    model = make_model()
    optimizer = cls(model.named_parameters(), **{**options, "maximize": True})
    run(model, optimizer, 3)
    model2, optimizer2 = copier((model, optimizer))
    assert repr(optimizer2) == repr(optimizer)
    assert_same(run(model2, optimizer2, 4, first=3), run(model, optimizer, 4, first=3))


def _continue_elsewhere(pairs, queue):
    torch.set_num_threads(1)
    queue.put([[v.tolist() for v in run(model, opt, 2, first=2)] for model, opt in pairs])


def test_optimizers_travel_to_another_process_and_continue_there():
    pairs = []
    for cls in DEFAULT:
        model = make_model()
        optimizer = cls(model.parameters())
        run(model, optimizer, 2)
        pairs.append((model, optimizer))
    here = copy.deepcopy(pairs)  # torch shares the storage of what it sends
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_continue_elsewhere, args=(pairs, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(timeout=60)
    for (model, optimizer), ours in zip(here, found, strict=True):
        expected = run(model, optimizer, 2, first=2)
        assert_near([torch.tensor(value) for value in ours], expected, 1e-7, 1e-6)


@every
def test_a_saved_state_holds_plain_data_and_tensors_alone(cls, options):
    model = make_model()
    optimizer = cls(model.named_parameters(), **options)
    run(model, optimizer, 1)
    saved = through_disk(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"][0] == "0.weight"
    assert [len(paths) for paths in saved["routing"]] == [6]
    assert set(saved["routing"][0]) <= {"matrix", "elementwise"}
    for state in saved["state"].values():
        assert {type(value) for value in state.values()} == {torch.Tensor}


@every
def test_loading_shares_no_storage_with_what_was_loaded(cls, options):
    model, other = make_model(), make_model()
    optimizer, loaded = (cls(m.parameters(), **options) for m in (model, other))
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    loaded.load_state_dict(saved)
    run(other, loaded, 2)
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value)


@every_class
def test_foreign_checkpoints_are_refused_and_change_nothing(cls):
    model = make_model()
    optimizer = cls(model.parameters())
    run(model, optimizer, 1)
    other = make_model()
    adagrad = torch.optim.Adagrad(other.parameters())
    run(other, adagrad, 1)
    own = optimizer.state_dict()
    halved = {i: {"step": state["step"]} for i, state in own["state"].items()}
    groups = own["param_groups"]
    fewer = [{**groups[0], "params": [0]}]
    reasons = "expected step|doesn.t match|different number|of Other|neither state|Invalid|is -5"
    incomplete = any(len(state) > 1 for state in own["state"].values())  # or steps are all
    for given in (
        {**own, "state": adagrad.state_dict()["state"]},
        *([{**own, "state": halved}] if incomplete else []),
        {**own, "param_groups": fewer},
        {**own, "param_groups": groups * 2},
        {**own, "optimizer": "Other"},
        {
            "state": {},
            "param_groups": torch.optim.SGD(other.parameters()).state_dict()["param_groups"],
        },
        {**own, "param_groups": [{**groups[0], "lr": -1.0}]},
        {**own, "param_groups": [{**groups[0], "path": "rows"}]},
        {**own, "state": {**own["state"], 0: {**own["state"][0], "step": torch.tensor(-5.0)}}},
        other.state_dict(),
        [],
    ):
        before = states(optimizer)
        with pytest.raises(ValueError, match=reasons):
            optimizer.load_state_dict(given)
        assert_same(states(optimizer), before)
        assert optimizer.state_dict()["param_groups"] == groups


@every_class
def test_a_checkpoint_of_the_same_parameters_in_another_order_is_refused(cls):
    params = [(name, nn.Parameter(torch.ones(20, 24))) for name in ("a", "b")]
    optimizer, other = cls(params), cls(params[::-1])
    feed(optimizer, [param for _, param in params], gradient_stream([(20, 24)] * 2, 1))
    with pytest.raises(ValueError, match="same parameters in another order"):
        other.load_state_dict(optimizer.state_dict())


@every
def test_checkpoints_without_a_newer_argument_load(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    run(model, optimizer, 1)
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("foreach", "fused", "capturable", "differentiable", "maximize", "path"):
        old["param_groups"][0].pop(key)
    for state in old["state"].values():
        state["step"] = 1.0  # a number, as in torch's older checkpoints
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    loaded = cls(twin.parameters(), **options)
    loaded.load_state_dict(old)
    assert_same(run(twin, loaded, 2, first=1), run(model, optimizer, 2, first=1))


@every_class
def test_an_unstepped_optimizer_saves_and_loads(cls):
    optimizer = cls(make_model().parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(optimizer.state.values())


@every_class
def test_hooks_of_the_user_take_part(cls):
    model, seen = make_model(), []
    optimizer = cls(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(model, optimizer, 1)
    assert seen == ["before", "after"]

    def later(_, given):
        given = copy.deepcopy(given)
        for state in given["state"].values():
            state["step"] += 1
        return given

    optimizer.register_state_dict_post_hook(later)
    optimizer.register_load_state_dict_pre_hook(later)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model[0].weight]["step"].item())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[2:] == [3.0]


# -- the four flags ---------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=label
)
def test_implementations_agree_in_parameters_and_state_after_every_step(cls, options, flags):
    model, twin = make_model(), make_model()
    plain, other = cls(model.parameters(), **options), cls(twin.parameters(), **options, **flags)
    for step in range(5):
        if step == 2:
            model[0].bias.requires_grad_(False), twin[0].bias.requires_grad_(False)
        assert_near(run(model, plain, 1, first=step), run(twin, other, 1, first=step))
        assert_near(states(plain), states(other), 2e-5, 2e-3)
        with torch.no_grad():  # a memory may enlarge differences in the last place of gradients
            for param, same in zip(twin.parameters(), model.parameters(), strict=True):
                param.copy_(same)


def pretend_that_cpus_capture(monkeypatch):
    monkeypatch.setattr(base, "capturable_devices", lambda: ["cpu"])
    adam = sys.modules["torch.optim.adam"]
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])


def refuses_capturable(cls, options):
    try:
        cls([torch.zeros(1)], **options, capturable=True)
    except RuntimeError as error:
        return "does not support capturable=True" in str(error)
    return False


@every
def test_capturable_is_the_same_step_with_counts_on_the_device(cls, options, monkeypatch):
    params = [nn.Parameter(torch.randn(24, 32)), nn.Parameter(torch.randn(7))]
    if refuses_capturable(cls, options):
        pytest.skip("this memory decides on the host, and says so: nothing to capture")
    optimizer = cls(params, **options, capturable=True)
    with pytest.raises(AssertionError, match="must be on supported devices"):
        feed(optimizer, params, gradient_stream([(24, 32), (7,)], 1))
    pretend_that_cpus_capture(monkeypatch)
    model, twin = make_model(), make_model()
    found = run(model, cls(model.parameters(), **options, capturable=True), 4)
    assert_near(found, run(twin, cls(twin.parameters(), **options), 4))


@every
def test_a_capturable_step_asks_the_device_for_no_value(cls, options, monkeypatch):
    """A fake tensor has no values: whatever the host wants to know of it raises."""
    if refuses_capturable(cls, options):
        pytest.skip("this memory decides on the host, and says so: nothing to capture")
    model = make_model()
    run(model, cls(model.parameters(), **options), 1)  # constants are computed once, on the host
    pretend_that_cpus_capture(monkeypatch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = [(16, 32), (16, 32), (32, 32), (32,)]
        params = [nn.Parameter(torch.empty(shape)) for shape in shapes]
        optimizer = cls(params, **options, capturable=True)
        feed(optimizer, params, ([torch.empty(s) for s in shapes] for _ in range(3)))
        assert {type(v) for v in states(optimizer)} == {type(params[0].detach())}


def differentiable_outcome(cls, options, start, lr, grads):
    params = [start.clone(), start[0].clone()]
    optimizer = cls(params, **{**options, "lr": lr, "differentiable": True})
    for grad in grads:
        params[0].grad, params[1].grad = grad, grad[0]
        optimizer.step()
    return params[0].sum() + params[1].square().sum()


@every
def test_the_step_is_differentiable_in_parameters_gradients_and_rate(cls, options):
    generator = torch.Generator().manual_seed(0)
    inputs = list(torch.randn(3, 16, 17, dtype=torch.float64, generator=generator))
    inputs.append(torch.tensor(0.01, dtype=torch.float64))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(
        lambda start, first, second, lr: differentiable_outcome(
            cls, options, start, lr, (first, second)
        ),
        inputs,
        fast_mode=True,
    )


@every_settled
def test_a_learning_rate_is_learned_through_ten_steps(cls, options):
    """Optimizing the optimizer: from a rate far too small, by gradient descent on the outcome."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    sign = -1 if options.get("maximize") else 1
    log_lr = torch.tensor(-7.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([log_lr], lr=0.5)
    losses = []
    for _ in range(15):
        weight = torch.zeros_like(target).requires_grad_().clone()
        flags = {"lr": log_lr.exp(), "weight_decay": 0, "differentiable": True}
        inner = cls([weight], **{**options, **flags})
        for _ in range(10):
            weight.grad = sign * (weight - target)
            inner.step()
        loss = (weight - target).square().mean()
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


# -- gradient scaling, compilation, functions -------------------------------------------------


@every
@pytest.mark.parametrize("fused", [None, True], ids=["unfused", "fused"])
def test_grad_scaler_unscales_and_skips_a_step_with_infinite_gradients(cls, options, fused):
    model, twin = make_model(), make_model()
    optimizer = cls(model.parameters(), **options, fused=fused)
    plain = cls(twin.parameters(), **options, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled_step(step, poison=False):
        optimizer.zero_grad()
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(inputs) - 1).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = torch.inf
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            assert_same([p.grad for p in model.parameters()], grads)

    for step in range(3):
        scaled_step(step)
        assert_near(values(model.parameters()), run(twin, plain, 1, first=step))
        before = values(model.parameters()), states(optimizer)
        scaled_step(step, poison=True)
        assert_same(values(model.parameters()), before[0])
        assert_same(states(optimizer), before[1])


@every_class
def test_narrow_gradients_are_unscaled_in_float32(cls):
    """The fused protocol hands over scaled gradients, whose true values float16 does not hold."""
    narrow = nn.Parameter(torch.zeros(20, 24, dtype=torch.float16))
    wide = nn.Parameter(torch.zeros(20, 24))
    optimizer, reference = cls([narrow], fused=True), cls([wide])
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        pytest.skip("the scaler unscales for it")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    ((true,),) = gradient_stream([(20, 24)], 1)
    narrow.grad = (true * 1e-7 * 2**16).half()
    wide.grad = narrow.grad.float() / 2**16
    optimizer.step()
    reference.step()
    assert_near(states(optimizer), states(reference), atol=0.0, rtol=1e-5)
    torch.testing.assert_close(narrow.detach(), wide.detach().half())


@every_class
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_compiled_training_step_does_not_recompile_when_the_rate_changes(cls, tensor_lr):
    torch._dynamo.reset()
    model, twin = make_model(), make_model()
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    optimizer, plain = cls(model.parameters(), lr=lr), cls(twin.parameters(), lr=1e-2)
    backend = CompileCounterWithBackend("aot_eager")
    inputs = torch.randn(8, 16)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss = (model(inputs) - 1).square().mean()
        loss.backward()
        optimizer.step()

    compiled = torch.compile(step, backend=backend)
    schedules = [LambdaLR(o, lambda step: 0.9**step) for o in (optimizer, plain)]
    counts = []
    for _ in range(5):
        compiled(model, optimizer)
        step(twin, plain)
        for schedule in schedules:
            schedule.step()
        counts.append(backend.frame_count)
    assert counts[0] >= 1
    assert counts[1:] == counts[1:2] * 4
    assert_near(values(model.parameters()), values(twin.parameters()), 1e-5, 1e-3)


@every
def test_functional_use_is_the_same_run_and_writes_into_nothing(cls, options):
    if not issubclass(cls, base.MemoryOptimizer):
        pytest.skip("a wrapper is no rule of its own")
    model, twin = make_model(), make_model()
    optimizer = cls(model.named_parameters(), **options)
    init, update = deepopt.functional(cls, **options)
    params = {name: param.detach() for name, param in twin.named_parameters()}
    state = init(params)
    for step in range(4):
        run(model, optimizer, 1, first=step)
        twin.load_state_dict(params)
        twin.zero_grad()
        backward(twin, step)
        grads = {name: param.grad for name, param in twin.named_parameters()}
        before = copy.deepcopy((grads, state, params))
        new_params, new_state = update(grads, state, params)
        for given, kept in zip((grads, params), before[::2], strict=True):
            assert_same(given.values(), kept.values())
        for name in state:
            assert_same(state[name].values(), before[1][name].values())
        params, state = new_params, new_state
    assert_near(params.values(), values(model.parameters()), 1e-5, 1e-3)
