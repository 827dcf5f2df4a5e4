"""Parameters of any shape, memory layout, dtype and device."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import deepopt
from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    assert_same,
    every,
    every_settled,
    feed,
    gradient_stream,
    label,
    make_model,
    run,
    start_values,
    through_disk,
    values,
)

pytestmark = EXPECTED_WARNINGS

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


class Wrapped(torch.Tensor):
    """A tensor class of a user's, such as a quantized one: it knows torch's own operators alone."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"Wrapped does not know {function}")
        first = args[0]
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        result = function(*args, **kwargs)
        if function.overloadpacket.__name__.endswith("_"):
            return first
        return cls(result) if function is torch.ops.aten.detach.default else result


class Quantized(Wrapped):
    """A weight in coarse numbers, as a quantized one: views keep its shape, and it lacks ``mul_``.

    Whatever is written to it is rounded to multiples of its step.
    """

    STEP = 2.0**-24  # so small that a run with ordinary weights is its reference

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0]
        if function in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            return cls(first.inner)
        if function is aten._to_copy.default:
            return cls(first.inner.to(**kwargs))
        if function is aten.copy_.default:
            source = args[1].inner if isinstance(args[1], cls) else args[1]
            if not isinstance(first, cls):
                return first.copy_(source)
            first.inner.copy_((source / cls.STEP).round() * cls.STEP)
            return first
        if function is aten.add_.Tensor:
            return first.copy_(first.inner + kwargs.get("alpha", 1) * args[1])
        if function not in (aten.detach.default, aten.zeros_like.default, aten.empty_like.default):
            raise NotImplementedError(f"Quantized does not know {function}")
        return super().__torch_dispatch__(function, types, args, kwargs)


@every_settled
@pytest.mark.parametrize("kind", [Wrapped, Quantized])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_tensor_subclasses_are_stepped_by_their_own_operators(cls, options, kind, decay):
    generator = torch.Generator().manual_seed(0)
    options = {**options, "weight_decay": decay}
    plain = nn.Parameter(torch.randn(20, 24, generator=generator))
    weight = nn.Parameter(kind(plain.detach().clone()))
    optimizers = cls([plain], **options), cls([weight], **options)
    for _ in range(3):
        plain.grad = torch.randn(20, 24, generator=generator)
        weight.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(weight.inner, plain.detach(), rtol=1e-5, atol=1e-6)


def test_a_rounding_that_a_tensor_subclass_cannot_have_is_refused():
    weight = nn.Parameter(Wrapped(torch.randn(20, 24, dtype=torch.bfloat16)))
    optimizer = deepopt.DeepMomentum([weight], rounding="exact")
    weight.grad = torch.ones(20, 24, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="does not support tensor subclass parameters"):
        optimizer.step()
