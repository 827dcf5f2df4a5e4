"""What is recorded are the inputs that took part in a gradient, each once, within bounds."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepopt import capture_inputs
from deepopt.optim.layer_inputs import forget_inputs, seen_inputs


def take_inputs(param):
    rows = seen_inputs(param)
    forget_inputs(param)
    return rows


def second_moment(param):
    """Mean of x xT per group, as the optimizer gets it."""
    rows = take_inputs(param)
    return rows.mT @ rows


def mean_outer(rows):
    return (rows.mT @ rows / len(rows))[None]


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_a_linear_layer_sees_every_position(shape):
    layer, inputs = nn.Linear(5, 3), torch.randn(shape)
    with capture_inputs(layer):
        layer(inputs).sum().backward()
    torch.testing.assert_close(second_moment(layer.weight), mean_outer(inputs.reshape(-1, 5)))
    assert take_inputs(layer.weight) is None  # used up
    assert take_inputs(layer.bias) is None


CONVOLUTIONS = [
    (nn.Conv1d, (2, 4, 9), {"kernel_size": 3}),
    (nn.Conv1d, (4, 9), {"kernel_size": 2, "stride": 2, "padding": 1}),
    (nn.Conv2d, (2, 4, 6, 7), {"kernel_size": (3, 2), "padding": (1, 0), "stride": (1, 2)}),
    (nn.Conv2d, (2, 4, 7, 7), {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    (nn.Conv2d, (2, 4, 6, 6), {"kernel_size": 4, "padding": "same"}),
    (nn.Conv2d, (2, 4, 6, 6), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, (2, 4, 6, 6), {"kernel_size": 3, "groups": 2}),
    (nn.Conv2d, (2, 4, 5, 5), {"kernel_size": 3, "groups": 4}),
    (nn.Conv3d, (1, 4, 4, 4, 5), {"kernel_size": 2, "stride": (1, 2, 1), "groups": 2}),
]


@pytest.mark.parametrize(("kind", "shape", "options"), CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_sees_its_patches(kind, shape, options):
    """Its output is the kernel, as a matrix, times the patches: that finds them by themselves."""
    conv, inputs = kind(4, 8, **options, bias=False).double(), torch.randn(shape).double()
    with capture_inputs(conv, rows=10_000):
        outputs = conv(inputs)
        outputs.sum().backward()
    rows = take_inputs(conv.weight)
    outputs = outputs if inputs.ndim == conv.weight.ndim else outputs[None]
    outputs = outputs.transpose(0, 1).flatten(1).unflatten(0, (conv.groups, -1))
    kernels = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    again = (kernels @ rows.mT) * rows.shape[1] ** 0.5
    # A sample has no order; sorted, its products are the outputs.
    torch.testing.assert_close(again.sort(-1).values, outputs.sort(-1).values)


def test_more_rows_than_the_limit_become_a_fair_sample():
    layer, inputs = nn.Linear(3, 1), torch.randn(16, 256, 3)
    inputs[..., 0] = torch.arange(16)[:, None]  # which sequence
    inputs[..., 1] = torch.arange(256)  # which position
    with capture_inputs(layer, rows=256):
        for part in inputs.split(4):
            layer(part).sum().backward()
    rows = take_inputs(layer.weight)[0] * 16
    assert rows.shape == (256, 3)
    assert len(rows.unique(dim=0)) == 256
    sequences = rows[:, 0].round().long().bincount(minlength=16)
    assert 12 <= sequences.min() <= sequences.max() <= 20
    positions = (rows[:, 1] / 16).long().bincount(minlength=16)
    assert 8 <= positions.min() <= positions.max() <= 24


class Block(nn.Module):
    def __init__(self, width=6, mode=None):
        super().__init__()
        self.up, self.down, self.mode = nn.Linear(width, 9), nn.Linear(9, width), mode

    def inner(self, x):
        return self.down(F.relu(self.up(x), inplace=True))

    def forward(self, x):
        if self.mode is None:
            return x + self.inner(x)
        return x + checkpoint(self.inner, x, use_reentrant=self.mode)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_forward_counts_once(reentrant):
    model = nn.Sequential(Block(), Block())
    inputs = torch.randn(4, 6, requires_grad=True)
    with capture_inputs(model):
        model(inputs).square().sum().backward()
        expected = [take_inputs(block.up.weight) for block in model]
        for block in model:
            block.mode = reentrant
        model(inputs).square().sum().backward()
    for block, rows in zip(model, expected, strict=True):
        torch.testing.assert_close(take_inputs(block.up.weight), rows)


def test_accumulated_passes_are_averaged():
    layer, inputs = nn.Linear(5, 3), torch.randn(12, 5)
    with capture_inputs(layer):
        for part in inputs.split(4):
            layer(part).sum().backward()
    torch.testing.assert_close(second_moment(layer.weight), mean_outer(inputs))


def test_passes_without_a_backward_leave_no_trace():
    layer, inputs = nn.Linear(5, 3), torch.randn(12, 5)
    with capture_inputs(layer):
        with torch.no_grad():
            layer(inputs)
        with torch.inference_mode():
            layer(inputs)
        layer.eval()
        layer(inputs)
        assert take_inputs(layer.weight) is None
        layer(inputs).sum().backward()
    torch.testing.assert_close(second_moment(layer.weight), mean_outer(inputs))


def test_a_frozen_layer_is_not_recorded_and_those_before_it_are():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    model[1].requires_grad_(False)
    with capture_inputs(model):
        model(torch.randn(2, 5)).sum().backward()
    assert take_inputs(model[1].weight) is None
    assert take_inputs(model[0].weight) is not None


def test_shared_weights_put_their_inputs_together():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    inputs = torch.randn(3, 4)
    with capture_inputs(nn.Sequential(first, second)):
        hidden = first(inputs)
        (second(hidden).sum() + second(hidden).sum()).backward()
    seen = torch.cat([inputs, hidden.detach(), hidden.detach()])
    torch.testing.assert_close(second_moment(first.weight), mean_outer(seen))


def test_inputs_by_name_inputs_in_place_and_narrow_inputs():
    layer = nn.Linear(5, 3)
    inputs = torch.randn(4, 5)
    kept = inputs.clone()
    with capture_inputs(layer):
        outputs = layer(input=inputs * 1)
        outputs.relu_().sum().backward()
        inputs.zero_()
        torch.testing.assert_close(second_moment(layer.weight), mean_outer(kept))
        with torch.autocast("cpu", torch.bfloat16):
            layer(kept.bfloat16()).sum().backward()
        rows = take_inputs(layer.weight)
    torch.testing.assert_close(rows.mT @ rows, mean_outer(kept.bfloat16().float()))


@pytest.mark.parametrize("optimize", [False, True])
def test_no_rows_are_left_behind(optimize):
    layer = nn.Linear(4, 4)
    param = weakref.ref(layer.weight)
    capture = capture_inputs(layer)
    loss = layer(torch.randn(2, 4)).sum()
    loss.backward()
    if optimize:
        take_inputs(layer.weight)
    capture.remove()
    del layer, loss
    gc.collect()
    assert param() is None


def test_a_removed_capture_records_no_more_but_keeps_what_it_has():
    layer, inputs = nn.Linear(5, 3), torch.randn(4, 5)
    capture = capture_inputs(layer)
    layer(inputs).sum().backward()
    capture.remove()
    capture.remove()
    layer(torch.randn(4, 5)).sum().backward()
    assert not layer._forward_hooks
    torch.testing.assert_close(second_moment(layer.weight), mean_outer(inputs))


def test_a_recorded_model_is_saved_and_copied_without_its_inputs():
    model, inputs = nn.Sequential(nn.Linear(5, 3)), torch.randn(400, 5)
    with capture_inputs(model):
        model(inputs).sum().backward()
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert len(buffer.getvalue()) < 4 * inputs.numel()
        assert set(model.state_dict()) == {"0.weight", "0.bias"}
        assert take_inputs(copy.deepcopy(model)[0].weight) is None
        assert take_inputs(model[0].weight) is not None


# Where a graph breaks, dynamo itself asks intermediate tensors for their .grad.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute")
def test_a_compiled_model_is_recorded():
    model, inputs = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(4, 5)
    with capture_inputs(model):
        torch.compile(model, backend="eager")(inputs).sum().backward()
    torch.testing.assert_close(second_moment(model[0].weight), mean_outer(inputs))
    assert take_inputs(model[2].weight) is not None
    torch._dynamo.reset()


def test_functional_calls_are_left_alone():
    model, inputs = nn.Sequential(nn.Linear(5, 3)), torch.randn(4, 5)

    def loss(params):
        return torch.func.functional_call(model, params, (inputs,)).square().sum()

    with capture_inputs(model):
        slopes = torch.func.grad(loss)(dict(model.named_parameters()))
        torch.func.vmap(model)(inputs[:, None]).sum().backward()
        assert seen_inputs(model[0].weight) is None
        loss(
            copies := {k: p.detach().requires_grad_() for k, p in model.named_parameters()}
        ).backward()
        assert seen_inputs(model[0].weight) is None
    for name, slope in slopes.items():
        torch.testing.assert_close(copies[name].grad, slope)


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, but is list"):
        capture_inputs([])
    with pytest.raises(ValueError, match="Invalid rows: 0"):
        capture_inputs(nn.Linear(2, 2), rows=0)
    with pytest.raises(ValueError, match="no layer to record"):
        capture_inputs(nn.LayerNorm(3))


class Scaled(nn.Linear):
    """A subclass that calls its input otherwise, and takes more beside it."""

    def forward(self, scale, x):
        return super().forward(x) * scale


class Packed(nn.Linear):
    """Takes a tensor beside its input, which may be in a dict, and returns more than an output."""

    def forward(self, x, shift):
        x = x["x"] if isinstance(x, dict) else x
        return super().forward(x) + shift, "more"


@pytest.mark.parametrize("packed", [False, True])
def test_the_input_is_the_first_argument_of_forward_whatever_the_order_of_a_call(packed):
    x, layer = torch.randn(6, 20), Packed(20, 20)
    with capture_inputs(layer):
        layer(shift=torch.ones(20), x={"x": x} if packed else x)[0].sum().backward()
    rows = seen_inputs(layer.weight)[0]
    torch.testing.assert_close(rows.mT @ rows, x.mT @ x / 6)


@pytest.mark.parametrize("keyword", [False, True])
def test_layers_called_by_keyword_are_recorded(keyword):
    x = torch.randn(6, 20)
    plain, scaled = nn.Linear(20, 24), Scaled(20, 24)
    with capture_inputs(plain), capture_inputs(scaled):
        (plain(input=x) if keyword else plain(x)).sum().backward()
        (scaled(scale=2.0, x=x) if keyword else scaled(2.0, x)).sum().backward()
    for layer in (plain, scaled):
        rows = seen_inputs(layer.weight)[0]  # in any order
        torch.testing.assert_close(rows.mT @ rows, x.mT @ x / 6)
