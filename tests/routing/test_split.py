"""A matrix that holds several is cut along its rows, and trains as separate layers do."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepopt
from deepopt.routing import groups, rules
from tests.routing.models import Conv1D, Layers, table


@given(st.sampled_from(["matrix", "stack"]), st.integers(1, 4), st.integers(1, 5), st.data())
def test_a_split_cuts_rows_and_nothing_else(path, split, rows, data):
    shape = [split * rows, data.draw(st.integers(1, 4))]
    batch = 1 if path == "matrix" else data.draw(st.integers(1, 3))
    tensor = torch.randn([batch, *shape] if path == "stack" else shape)
    cut = rules.matrices(tensor, path, split)
    assert cut.shape[1:] == rules.sides(tensor, path, split) == (rows, shape[1])
    whole = tensor if path == "stack" else tensor[None]
    parts = [part for matrix in whole for part in matrix.chunk(split)]
    assert torch.equal(cut, torch.stack(parts))
    assert torch.equal(cut.view(tensor.shape), tensor)


@pytest.mark.parametrize(
    ("layer", "name", "split"),
    [
        (nn.MultiheadAttention(32, 2), "in_proj_weight", 3),
        (nn.MultiheadAttention(32, 2), "out_proj.weight", 1),
        (nn.MultiheadAttention(32, 2, kdim=16), "q_proj_weight", 1),
        (nn.LSTM(32, 48, proj_size=16), "weight_ih_l0", 4),
        (nn.LSTM(32, 48, proj_size=16), "weight_hh_l0", 4),
        (nn.LSTM(32, 48, proj_size=16), "weight_hr_l0", 1),
        (nn.LSTMCell(32, 48), "weight_hh", 4),
        (nn.GRU(32, 48, bidirectional=True), "weight_ih_l0_reverse", 3),
        (nn.GRUCell(32, 48), "weight_ih", 3),
        (nn.RNN(32, 48), "weight_ih_l0", 1),
        (nn.Linear(32, 96), "weight", 1),
    ],
)
def test_only_torchs_own_fused_layers_are_split_by_themselves(layer, name, split):
    row = table(layer)[name]
    assert (row.path, row.split) == ("matrix", split)
    assert row.matrices[0] == split


def test_a_parametrized_gate_matrix_is_split_too():
    layer = nn.LSTM(32, 48)
    nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
    assert table(layer)["parametrizations.weight_hh_l0.original1"].split == 4


@pytest.mark.parametrize(
    ("name", "rows", "asks"),
    [
        ("attn.qkv", 96, 3),
        ("mixer.Wqkv", 96, 3),
        ("to_qkv", 96, 3),
        ("c_attn", 96, 3),
        ("query_key_value", 96, 3),
        ("mlp.gate_up_proj", 96, 2),
        ("attn.qkv", 64, None),
        ("attn.query", 96, None),
    ],
)
def test_a_layer_named_like_a_fused_one_is_asked_about_but_left_whole(name, rows, asks):
    model = Layers(last=nn.Linear(48, 48))
    owner = model
    *parents, last = name.split(".")
    for parent in parents:
        setattr(owner, parent, Layers())
        owner = getattr(owner, parent)
    setattr(owner, last, nn.Linear(32, rows))
    model.more = nn.Linear(48, 48)
    row = table(model)[f"{name}.weight"]
    assert row.split == 1
    assert row.reason == ("Linear" if asks is None else f"Linear; fused? see split={asks}")


def test_splits_are_named_by_pattern_and_leave_biases_whole():
    model = nn.ModuleDict({"qkv": nn.Linear(64, 192), "up": nn.Linear(64, 64)})
    model["down"] = nn.Linear(64, 64)
    groups = deepopt.param_groups(model, split={"qkv.*": 3, "qkv.weight": 6})
    assert [(g["path"], g["split"], len(g["params"])) for g in groups] == [
        ("matrix", 1, 2),
        ("matrix", 6, 1),
        ("elementwise", 1, 3),
    ]
    row = table(groups)["qkv.weight"]
    assert (row.matrices, row.reason) == ((6, 32, 64), "Linear, split 'qkv.weight'")


def test_parts_that_are_too_small_are_elementwise_as_separate_layers_would_be():
    row = table(nn.LSTM(64, 8))["weight_ih_l0"]
    assert (row.path, row.split) == ("elementwise", 1)
    assert row.reason == "side under 16 after split=4"


def test_a_split_of_one_leaves_whole_what_would_be_split():
    groups = deepopt.param_groups(nn.MultiheadAttention(32, 2), split={"in_proj_weight": 1})
    assert table(groups)["in_proj_weight"].matrices == (1, 96, 32)
    assert len(groups) == 2


def test_an_override_keeps_the_split():
    overrides = {"*in_proj_weight": "matrix"}
    for width in (8, 64):
        groups = deepopt.param_groups(nn.MultiheadAttention(width, 2), overrides)
        assert table(groups)["in_proj_weight"].split == 3


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"qkv.wieght": 3}, "'qkv.wieght': it matches no parameter"),
        ({"qkv.weight": 0}, "0; it must be a whole number of at least 1"),
        ({"qkv.weight": 1.5}, "1.5; it must be a whole number"),
        ({"qkv.weight": True}, "True; it must be a whole number"),
        (
            {"qkv.weight": 5},
            r"5 for parameter qkv.weight of shape \(192, 64\): its 192 rows cannot",
        ),
        ({"c_attn.*": 3}, "3 for parameter c_attn.weight: a Conv1D is stored as in x out"),
    ],
)
def test_a_split_that_does_nothing_or_does_not_fit_is_refused(split, message):
    model = Layers(qkv=nn.Linear(64, 192), c_attn=Conv1D(48, 144), last=nn.Linear(64, 64))
    with pytest.raises(ValueError, match=f"Invalid split: {message}"):
        deepopt.param_groups(model, split=split)


@pytest.mark.parametrize("path", ["auto", "matrix"])
def test_an_optimizer_refuses_a_group_that_its_split_does_not_fit(path):
    optimizer = deepopt.DeepMomentum([torch.nn.Parameter(torch.randn(32, 32))])
    for split, message in ((5, "its 64 rows cannot be cut into 5"), ("3", "whole number")):
        group = {"params": [nn.Parameter(torch.randn(64, 64))], "path": path, "split": split}
        with pytest.raises(ValueError, match=f"Invalid split: .*{message}"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    vectors = {"params": [nn.Parameter(torch.randn(7))], "path": "elementwise", "split": 3}
    optimizer.add_param_group(vectors)
    assert groups.labels(optimizer.param_groups[1]) == ["elementwise"]


def train(model, groups, forward, steps=6):
    optimizer = deepopt.DeepMomentum(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 32, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        forward(model, x).square().sum().backward()
        optimizer.step()
    return optimizer


def test_a_split_layer_trains_as_separate_layers_do():
    torch.manual_seed(0)
    fused = nn.Linear(32, 96, bias=False, dtype=torch.float64)
    apart = nn.ModuleList(nn.Linear(32, 32, bias=False, dtype=torch.float64) for _ in range(3))
    for layer, part in zip(apart, fused.weight.detach().chunk(3), strict=True):
        layer.weight.data.copy_(part)
    whole = copy.deepcopy(fused)
    q_k_v = {"params": list(fused.parameters()), "path": "matrix", "split": 3}

    def attend(q, k, v):
        return (q @ k.T).tanh() @ v

    optimizer = train(fused, [q_k_v], lambda m, x: attend(*m(x).chunk(3, -1)))
    train(
        apart, [{"params": list(apart.parameters()), "path": "matrix"}],
        lambda m, x: attend(*(layer(x) for layer in m)),
    )  # fmt: skip
    train(whole, whole.parameters(), lambda m, x: attend(*m(x).chunk(3, -1)))
    joined = torch.cat([layer.weight for layer in apart])
    torch.testing.assert_close(fused.weight, joined, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(whole.weight, joined, atol=1e-4)
    assert {len(t) for t in optimizer.state[fused.weight].values() if t.ndim} == {3}


def test_a_split_stack_trains_as_a_longer_stack_does():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(2, 64, 32))
    longer = nn.Parameter(stack.detach().reshape(4, 32, 32).clone())
    for param, split in ((stack, 2), (longer, 1)):
        optimizer = deepopt.DeepMomentum([{"params": [param], "path": "stack", "split": split}])
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            param.grad = torch.randn(4, 32, 32, generator=generator).view(param.shape)
            optimizer.step()
    assert torch.equal(stack.view(4, 32, 32), longer)


def test_the_parts_of_a_tall_fused_matrix_are_stepped_as_layers_of_their_own():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(120, 17, generator=generator)
    fused = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.chunk(2)]
    optimizers = [
        deepopt.DeepMomentum([{"params": [fused], "path": "matrix", "split": 2}]),
        deepopt.DeepMomentum(parts, path="matrix"),
    ]
    for _ in range(3):
        fused.grad = torch.randn(start.shape, generator=generator)
        for part, grad in zip(parts, fused.grad.chunk(2), strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in parts]))


def first_of(state):
    """The state of a parameter as if it had one matrix."""
    return {key: value[:1] if value.ndim else value for key, value in state.items()}


def test_a_checkpoint_of_another_split_is_refused_and_of_the_same_resumes():
    param = nn.Parameter(torch.randn(96, 32))

    def optimizer(split):
        return deepopt.DeepMomentum([{"params": [param], "path": "matrix", "split": split}])

    first = optimizer(3)
    param.grad = torch.randn(96, 32)
    first.step()
    saved = first.state_dict()
    second = optimizer(3)
    second.load_state_dict(saved)
    assert len(second.state[param]["grad_norm"]) == 3
    older = copy.deepcopy(saved)
    older["param_groups"][0]["split"] = 1
    with pytest.raises(ValueError, match="does not fit its matrix path"):
        optimizer(3).load_state_dict(older)
    del older["param_groups"][0]["split"]  # as before there were splits
    with pytest.raises(ValueError, match="does not fit its matrix/3 path"):
        optimizer(3).load_state_dict(older | {"state": {0: first_of(saved["state"][0])}})
    empty = optimizer(3)
    empty.load_state_dict(older | {"state": {}})
    assert empty.param_groups[0]["split"] == 3
    older["param_groups"][0]["split"] = 5
    with pytest.raises(ValueError, match="96 rows cannot be cut into 5"):
        optimizer(3).load_state_dict(older)
