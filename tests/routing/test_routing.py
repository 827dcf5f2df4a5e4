import contextlib
import copy
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepopt
from deepopt.hope import Hope
from deepopt.routing import groups
from deepopt.routing import rules as routing
from deepopt.routing.rules import route


def paths(model):
    return {
        name: group["path"] for group in deepopt.param_groups(model) for name, _ in group["params"]
    }


def table(source):
    return {row.name: row for row in deepopt.routing_table(source)}


class LanguageModel(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(100, 32)
        self.attention = nn.MultiheadAttention(32, 2)
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 128)
        self.down = nn.Linear(128, 32)
        self.experts = nn.Parameter(torch.randn(4, 32, 64))
        self.pos_embed = nn.Parameter(torch.randn(1, 50, 32))
        self.unembedding = nn.Linear(32, 100, bias=False)
        if tied:
            self.unembedding.weight = self.tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_is_routed_by_the_types_of_its_modules(tied):
    found = paths(LanguageModel(tied))
    matrix = {n for n, path in found.items() if path == "matrix"}
    assert matrix == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
        "down.weight",
    }
    assert {n for n, path in found.items() if path == "stack"} == {"experts"}
    assert ("unembedding.weight" in found) is not tied
    assert len(found) == len(list(LanguageModel(tied).parameters()))


def test_convolutions_are_matrices_and_depthwise_ones_are_not():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, groups=32), nn.Flatten()
    )
    assert paths(model) == {
        "0.weight": "matrix",
        "0.bias": "elementwise",
        "1.weight": "elementwise",
        "1.bias": "elementwise",
        "2.weight": "elementwise",
        "2.bias": "elementwise",
    }


def test_the_last_linear_layer_of_a_classifier_is_its_head():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 100))
    assert paths(model)["2.weight"] == "elementwise"
    assert paths(model)["1.weight"] == "matrix"


def test_an_encoder_without_a_head_has_none():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64), 2, enable_nested_tensor=False
    )
    assert paths(model)["layers.1.linear2.weight"] == "matrix"


def test_norms_of_several_dimensions_and_heads_of_convolutions_are_elementwise():
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm((4, 32, 32))
            self.body = nn.Conv2d(64, 64, 3)
            self.head = nn.Conv2d(64, 21, 1)

    found = paths(Segmenter())
    assert found["norm.weight"] == found["norm.bias"] == found["head.weight"] == "elementwise"
    assert found["body.weight"] == "matrix"


def test_a_parametrized_weight_is_routed_like_a_plain_one():
    model = nn.Sequential(nn.Conv1d(64, 64, 17), nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        nn.utils.parametrizations.weight_norm(layer)
    found = paths(model)
    for index in range(3):
        assert found[f"{index}.parametrizations.weight.original1"] == "matrix"
        assert found[f"{index}.parametrizations.weight.original0"] == "elementwise"


@pytest.mark.parametrize("model", [nn.MultiheadAttention(64, 4), nn.Linear(64, 64)])
def test_a_layer_alone_has_no_head(model):
    assert {path for name, path in paths(model).items() if "weight" in name} == {"matrix"}


def test_recurrent_weights_are_matrices():
    found = paths(nn.LSTM(32, 32))
    assert found["weight_ih_l0"] == found["weight_hh_l0"] == "matrix"
    assert found["bias_ih_l0"] == "elementwise"


@pytest.mark.parametrize(
    ("shape", "name", "path"),
    [
        ((64, 64), "", "matrix"),
        ((64, 15), "", "elementwise"),
        ((5000, 64), "", "elementwise"),
        ((64,), "", "elementwise"),
        ((), "", "elementwise"),
        ((64, 32, 3, 3), "", "matrix"),
        ((768, 3, 16, 16), "", "matrix"),
        ((64, 64, 5), "", "matrix"),
        ((8, 64, 64), "", "stack"),
        ((1, 64, 64), "", "elementwise"),
        ((512, 64), "transformer.wte.weight", "elementwise"),
        ((64, 64), "pos_embedding", "elementwise"),
        ((512, 64), "lm_head.weight", "elementwise"),
        ((512, 64), "fc.weight", "elementwise"),
        ((512, 64), "blocks.0.mlp.fc.weight", "matrix"),
        ((64, 64), "multihead.attention.weight", "matrix"),
        ((512, 64), "module._orig_mod.fc.weight", "elementwise"),
        ((64, 64), "module.blocks.0.fc.weight", "matrix"),
    ],
)
def test_without_a_module_shape_and_name_decide(shape, name, path):
    assert route(torch.empty(shape), name).path == path


def test_complex_parameters_are_never_matrices():
    assert route(torch.empty(64, 64, dtype=torch.complex64)).path == "elementwise"


def test_overrides_by_name_and_by_pattern_come_before_the_rules():
    model = LanguageModel(tied=False)
    overrides = {"*.weight": "elementwise", "up.weight": "matrix", "norm.bias": "matrix"}
    found = {
        name: group["path"]
        for group in deepopt.param_groups(model, overrides)
        for name, _ in group["params"]
    }
    assert found["up.weight"] == found["norm.bias"] == "matrix"
    assert found["down.weight"] == "elementwise"
    assert found["experts"] == "stack"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"dwon.weight": "matrix"}, "matches no parameter"),
        ({"down.weight": "auto"}, "is none of"),
        ({"down.weight": "stack"}, "three dimensions or more.*use 'matrix'"),
    ],
)
def test_overrides_that_do_nothing_or_are_no_path_are_refused(overrides, message):
    with pytest.raises(ValueError, match=f"Invalid overrides: .*{message}"):
        deepopt.param_groups(LanguageModel(tied=False), overrides)


def test_what_is_no_module_or_has_no_parameters_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but is list"):
        deepopt.param_groups([])
    with pytest.raises(ValueError, match="no parameters"):
        deepopt.param_groups(nn.ReLU())


def test_printing_an_optimizer_shows_where_every_parameter_goes():
    model = LanguageModel(tied=True)
    text = repr(deepopt.DeepMomentum(deepopt.param_groups(model)))
    assert "matrix          1 of 128 x 32            up.weight" in text
    assert "stack           1 of 4 x 32 x 64         experts" in text
    assert "elementwise     1 of 100 x 32            tokens.weight" in text
    unnamed = repr(deepopt.DeepMomentum(nn.Linear(32, 64).parameters()))
    assert "matrix          1 of 64 x 32" in unnamed


# -- what modules tell -----------------------------------------------------------------------


class Conv1D(nn.Module):
    """Like Hugging Face's: a linear layer that is stored as in x out."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class LoraLinear(nn.Module):
    """Like PEFT's: a frozen layer and factors in dicts by adapter."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})


class Layers(nn.Module):
    """A module with any children."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(32, 64), (1, 64, 32)),
        (nn.Conv1d(32, 64, 3), (1, 64, 96)),
        (nn.Conv2d(32, 64, 3), (1, 64, 288)),
        (nn.Conv3d(16, 32, 3), (1, 32, 432)),
        (nn.ConvTranspose2d(32, 64, 3), (1, 32, 576)),
        (nn.Conv2d(32, 64, 3, groups=2), (1, 64, 144)),
        (nn.Bilinear(16, 16, 32), (1, 32, 256)),
        (nn.Linear(16, 1600), (1, 1600, 16)),
        (nn.RNN(32, 48), (1, 48, 32)),
        (Conv1D(32, 3200), (1, 32, 3200)),
    ],
)
def test_a_hidden_layer_is_a_matrix_whatever_its_aspect(layer, rows):
    row = deepopt.routing_table(layer)[0]
    assert (row.path, row.matrices) == ("matrix", rows)
    assert row.reason == type(layer).__name__


def test_a_small_network_behind_convolutions_ends_in_a_head():
    body = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 100))
    assert table(body)["2.weight"].reason == "last linear layer, of its own shape"
    assert paths(nn.Sequential(nn.Linear(64, 64), nn.LSTM(64, 64)))["0.weight"] == "matrix"
    language = Layers(encoder=nn.Embedding(90, 32), rnn=nn.GRU(32, 48), decoder=nn.Linear(48, 90))
    assert "as tall as an embedding" in table(language)["decoder.weight"].reason


def test_one_transformer_layer_alone_has_no_head():
    layer = nn.TransformerEncoderLayer(32, 2, 64)
    assert paths(layer)["linear2.weight"] == paths(layer)["linear1.weight"] == "matrix"


def test_tensors_of_experts_and_heads_are_stacks_of_their_matrices():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 32, 64))
            self.heads = nn.Parameter(torch.randn(2, 3, 16, 32))
            self.narrow = nn.Parameter(torch.randn(4, 8, 64))
            self.token = nn.Parameter(torch.randn(1, 1, 64))
            self.rel_pos = nn.Parameter(torch.randn(4, 32, 32))

    rows = table(Mixture())
    assert rows["experts"].matrices == (4, 32, 64)
    assert rows["heads"].matrices == (6, 16, 32)
    assert {name for name, row in rows.items() if row.path == "elementwise"} == {
        "narrow",
        "token",
        "rel_pos",
    }


@pytest.mark.parametrize(("rank", "path"), [(8, "elementwise"), (16, "matrix")])
def test_factors_of_low_rank_are_matrices_from_rank_16_on_and_never_heads(rank, path):
    model = Layers(
        query=LoraLinear(400, 400, rank), value=LoraLinear(400, 300, rank), head=nn.Linear(400, 50)
    )
    for rows in (table(model), table([{"params": list(model.named_parameters())}])):
        for name in ("query.lora_A", "query.lora_B", "value.lora_A", "value.lora_B"):
            assert rows[f"{name}.default.weight"].path == path
        assert rows["query.base_layer.weight"].path == "matrix"
        assert rows["query.base_layer.weight"].frozen
        assert rows["head.weight"].path == "elementwise"


def test_factors_of_an_embedding_or_a_head_are_elementwise_as_these_are():
    tokens = Layers(
        lora_embedding_A=nn.ParameterDict({"default": torch.randn(32, 100)}),
        lora_embedding_B=nn.ParameterDict({"default": torch.randn(64, 32)}),
    )
    model = Layers(tok=tokens, body=nn.Linear(64, 64), lm_head=LoraLinear(64, 100, 16))
    found = paths(model)
    assert {name for name, path in found.items() if path == "matrix"} == {"body.weight"}
    assert route(torch.empty(16, 64), "lm_head.lora_A.default.weight").path == "elementwise"


def test_names_are_read_without_their_wrappers():
    model = Layers(body=nn.Linear(64, 64), fc=nn.Linear(64, 64))
    for wrapped in (Layers(module=model), Layers(_orig_mod=Layers(module=model))):
        (matrix, rest) = deepopt.param_groups(wrapped, {"body.bias": "elementwise"})
        assert [name.split(".")[-2:] for name, _ in matrix["params"]] == [["body", "weight"]]
        assert "named like a head" in rest["reasons"]
    peft = Layers(base_model=Layers(model=Layers(score=nn.Linear(64, 64), up=nn.Linear(64, 64))))
    assert table(peft)["base_model.model.score.weight"].reason == "named like a head"


def test_a_tied_weight_answers_to_both_of_its_names():
    groups = deepopt.param_groups(LanguageModel(tied=True), {"unembedding.weight": "elementwise"})
    assert table(groups)["tokens.weight"].reason == "override 'unembedding.weight'"


def test_lazy_modules_are_asked_to_run_first():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(32))
    message = r"Invalid params: 1\.weight of a lazy module has no shape yet; run the model once"
    with pytest.raises(ValueError, match=message):
        deepopt.param_groups(model)
    with pytest.raises(ValueError, match=message):
        deepopt.DeepMomentum(model.named_parameters())
    model(torch.randn(2, 16))
    deepopt.DeepMomentum(deepopt.param_groups(model))


# -- split -----------------------------------------------------------------------------------


@given(st.sampled_from(["matrix", "stack"]), st.integers(1, 4), st.integers(1, 5), st.data())
def test_a_split_cuts_rows_and_nothing_else(path, split, rows, data):
    shape = [split * rows, data.draw(st.integers(1, 4))]
    batch = 1 if path == "matrix" else data.draw(st.integers(1, 3))
    tensor = torch.randn([batch, *shape] if path == "stack" else shape)
    cut = routing.matrices(tensor, path, split)
    assert cut.shape[1:] == routing.sides(tensor, path, split) == (rows, shape[1])
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


# -- the table -------------------------------------------------------------------------------


def test_the_table_is_the_same_for_groups_and_for_the_optimizer_made_of_them():
    groups = deepopt.param_groups(LanguageModel(tied=True), {"up.weight": "elementwise"})
    before = deepopt.routing_table(groups)
    optimizer = deepopt.DeepMomentum(groups)
    assert str(deepopt.routing_table(optimizer)) == str(before) == repr(before)
    rows = table(optimizer)
    assert len(rows) == len(list(LanguageModel(tied=True).parameters()))
    assert rows["tokens.weight"].reason == "embedding; tied head"
    assert rows["up.weight"].reason == "override 'up.weight'"
    assert rows["attention.in_proj_weight"].reason == "q, k, v of MultiheadAttention"
    assert rows["attention.in_proj_weight"].matrices == (3, 32, 32)
    assert rows["experts"].reason == "matrices of LanguageModel"
    assert rows["pos_embed"].reason == "named like a table"
    assert rows["norm.weight"].reason == "vector"


def test_the_table_tells_of_groups_of_ones_own_too():
    matrix, thin = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(32, 8))
    frozen = nn.Parameter(torch.randn(()), requires_grad=False)
    rows = deepopt.routing_table(
        [{"params": [thin, frozen]}, {"params": [("w", matrix)], "path": "matrix", "split": 2}]
    )
    assert [row.reason for row in rows] == ["side under 16", "scalar", "path of the group"]
    lines = str(rows).splitlines()
    assert lines[0] == "name       shape    path         split  matrices     reason"
    assert lines[2] == "(unnamed)  scalar   elementwise                      scalar (frozen)"
    assert lines[3] == "w          32 x 64  matrix       2      2 x 16 x 64  path of the group"
    assert lines[4].startswith("as matrices: 1 parameters, 2,048 floats; element-wise: 2 para")


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


def test_labels_are_plain_words_that_tell_path_and_split():
    model = LanguageModel(tied=False)
    labels = [groups.labels(g) for g in deepopt.DeepMomentum(
        deepopt.param_groups(model)).param_groups]  # fmt: skip
    assert labels == [["matrix"] * 3, ["matrix/3"], ["stack"], ["elementwise"] * 9]
    auto = deepopt.DeepMomentum(model.named_parameters()).param_groups[0]
    assert groups.labels(auto).count("stack") == 1


def test_other_optimizers_take_the_groups():
    model = LanguageModel(tied=False)
    groups = deepopt.param_groups(model)
    assert all(type(group) is dict for group in groups)
    optimizer = torch.optim.AdamW(groups)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_routing_by_shape_and_name_is_computed_once_per_parameter():
    group = {"params": [nn.Parameter(torch.randn(16, 16))], "path": "auto", "split": 1}
    first = list(routing.routed(group))
    misses = routing._route_shape.cache_info().misses
    assert list(routing.routed(group)) == first
    assert routing._route_shape.cache_info().misses == misses


# -- warnings --------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def small_gpt(tied):
    model = Layers(wte=nn.Embedding(3000, 32), wpe=nn.Embedding(64, 32), h=Block(32))
    model.lm_head = nn.Linear(32, 3000, bias=False)
    if tied:
        model.lm_head.weight = model.wte.weight
    return model


def vision_transformer():
    model = Layers(patch_embed=Layers(proj=nn.Conv2d(3, 48, 8, 8)), blocks=Block(48))
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 48))
    model.pos_embed = nn.Parameter(torch.zeros(1, 197, 48))
    model.head = nn.Linear(48, 500)
    return model


def resnet():
    body = [nn.Conv2d(3, 32, 7), nn.BatchNorm2d(32), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3)]
    return Layers(body=nn.Sequential(*body), fc=nn.Linear(64, 1000))


def mobile():
    body = [nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 256, 1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(256, 1000))


def lstm_model():
    return Layers(tok=nn.Embedding(2000, 32), rnn=nn.LSTM(32, 48, 2), decoder=nn.Linear(48, 2000))


def mixture():
    return Layers(tok=nn.Embedding(2000, 32), moe=LanguageModel(True), head=nn.Linear(32, 2000))


def tuned_with_rank_16():
    return Layers(query=LoraLinear(512, 512, 16), value=LoraLinear(512, 512, 16))


@pytest.mark.parametrize(
    "build",
    [lambda: small_gpt(True), lambda: small_gpt(False), vision_transformer, resnet, mobile,
     lstm_model, mixture, tuned_with_rank_16, Hope],
)  # fmt: skip
def test_ordinary_models_raise_no_warning(build):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepopt.DeepMomentum(deepopt.param_groups(model))
        deepopt.DeepMomentum(model.named_parameters())
        deepopt.DeepMomentum(model.parameters())


class Odd(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(rows, 20))


def narrow():
    return nn.Sequential(nn.Linear(2000, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (narrow, r"100% of the floats.*0.weight 8 x 2000 \(side under 16\) \(and \d more\)"),
        (
            lambda: nn.Sequential(*(Odd(400 + i) for i in range(5))),
            "theta 400 x 20 .aspect over 16",
        ),
        (lambda: Layers(q=LoraLinear(1024, 1024, 8)), "q.lora_A.default.weight 8 x 1024"),
    ],
)
def test_a_model_that_is_mostly_elementwise_gives_one_warning_with_the_remedy(build, message):
    model = build()
    for make in (
        lambda: deepopt.param_groups(model),
        lambda: deepopt.DeepMomentum(model.named_parameters()),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            make()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "name a path in overrides of deepopt.param_groups" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = deepopt.param_groups(model)
    deepopt.DeepMomentum(groups)  # a second warning would be an error here


def test_choices_toys_and_frozen_parameters_raise_no_warning():
    deepopt.param_groups(narrow(), {"*": "elementwise"})
    deepopt.param_groups(nn.Sequential(nn.Linear(200, 8), nn.Linear(8, 8)))
    deepopt.param_groups(narrow().requires_grad_(False))


def test_an_embedding_on_the_matrix_path_gives_one_warning_with_the_remedy():
    model = LanguageModel(tied=False)
    with pytest.warns(UserWarning, match=r"tokens\.weight looks like an embedding") as caught:
        groups = deepopt.param_groups(model, {"tokens.weight": "matrix"})
    assert len(caught) == 1
    assert "Use 'elementwise' for it" in str(caught[0].message)
    assert caught[0].filename == __file__
    deepopt.DeepMomentum(groups)  # a second warning would be an error here
    forced = [{"params": [("wte.weight", nn.Parameter(torch.randn(100, 32)))], "path": "matrix"}]
    with pytest.warns(UserWarning, match=r"wte\.weight looks like an embedding") as caught:
        deepopt.DeepMomentum(forced)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"wte\.weight looks like an embedding") as caught:
        deepopt.create_optimizer(forced, "deepmomentum")
    assert caught[0].filename == __file__


# -- the page --------------------------------------------------------------------------------


def test_the_code_of_the_routing_page_runs_and_prints_what_the_page_shows():
    page = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names, printed = {"__name__": "page"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    assert printed.getvalue() == shown
    assert table(names["optimizer"])["extra"].matrices == (3, 32, 32)


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


class Packed(nn.Linear):
    """A layer whose weight has another name."""

    def __init__(self):
        super().__init__(64, 64, bias=False)
        del self.weight
        self.packed = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.packed


def sequence():
    return nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 100))


def test_a_layer_without_a_weight_is_routed_by_its_type():
    model = nn.Sequential(nn.Embedding(100, 64), Packed(), nn.Linear(64, 100))
    assert paths(model) == {
        "1.packed": "matrix", "0.weight": "elementwise", "2.weight": "elementwise",
        "2.bias": "elementwise",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_routed_as_the_one_that_it_was_made_from():
    layers = [nn.LSTM(64, 32), nn.MultiheadAttention(32, 4), nn.LayerNorm(32)]
    for model in (sequence(), *layers):
        assert paths(torch.jit.script(model)) == paths(model)


def extended(kind):
    """A class of a user's that extends one of torch's layers."""
    return type(f"My{kind.__name__}", (kind,), {})


def of_subclasses():
    embedding, linear = extended(nn.Embedding), extended(nn.Linear)
    return nn.Sequential(embedding(100, 64), linear(64, 64), linear(64, 100))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_subclass_of_a_layer_is_known_by_its_sizes():
    others = [
        extended(nn.Bilinear)(17, 18, 19), extended(nn.Conv1d)(32, 32, 3),
        extended(nn.Conv2d)(32, 32, 3), extended(nn.ConvTranspose2d)(32, 64, 3),
        extended(nn.LSTMCell)(32, 32), extended(nn.GRUCell)(32, 32), extended(nn.RNNCell)(32, 32),
        extended(nn.MultiheadAttention)(32, 4), extended(nn.EmbeddingBag)(64, 32),
    ]  # fmt: skip
    for model in (of_subclasses(), *others):
        scripted = torch.jit.script(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert paths(scripted) == paths(model)
        found, expected = table(scripted), table(model)
        assert {n: r.split for n, r in found.items()} == {n: r.split for n, r in expected.items()}


class Own(nn.Module):
    """A layer of which nothing but its name says what it is."""

    def __init__(self, *shape):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 32, 3, 3)])
@pytest.mark.parametrize("traced", [False, True])
def test_a_scripted_layer_of_an_unknown_type_gives_one_warning_with_the_remedy(shape, traced):
    model = nn.Sequential(nn.Linear(64, 64), Own(*shape))
    model = torch.jit.trace(model, torch.zeros(1, 64)) if traced else torch.jit.script(model)
    with pytest.warns(
        UserWarning, match=r"1\.kernel has lost its type.*before its .*scripting"
    ) as told:
        assert paths(model)["1.kernel"] == "matrix"
    assert len(told) == 1
    assert table(model)["1.kernel"].reason.endswith("; type lost")


class Refusing(nn.Linear):
    """A layer that keeps its weight packed and refuses to show it."""

    def __init__(self):
        nn.Module.__init__(self)
        self.packed = nn.Parameter(torch.zeros(64, 64))

    @property
    def weight(self):
        raise RuntimeError("the weight is packed")


def test_a_weight_that_cannot_be_read_is_passed_over():
    model = nn.Sequential(nn.Embedding(100, 64), Refusing(), nn.Linear(64, 100))
    assert paths(model) == {
        "1.packed": "matrix", "0.weight": "elementwise", "2.weight": "elementwise",
        "2.bias": "elementwise",
    }  # fmt: skip
    deepopt.capture_inputs(model).remove()


def test_routing_changes_nothing_of_the_model():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))
    model = nn.Sequential(nn.Embedding(100, 64), layer, nn.Linear(64, 100))
    before = copy.deepcopy(model.state_dict())
    deepopt.param_groups(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("unflattened", [False, True])
def test_an_exported_program_gives_one_warning_that_types_are_lost(unflattened):
    program = torch.export.export(sequence(), (torch.zeros(2, 3, dtype=torch.long),))
    model = torch.export.unflatten(program) if unflattened else program.module()
    with pytest.warns(UserWarning, match="has lost its type, as in an exported") as told:
        deepopt.param_groups(model)
    assert len(told) == 1
    overrides = dict.fromkeys(("0.weight", "1.weight", "3.weight"), "elementwise")
    deepopt.param_groups(model, overrides=overrides)


@pytest.mark.parametrize("flat", [True, False])
def test_flattened_matrices_give_one_warning_with_the_remedy(flat):
    size = groups.LONGEST_VECTOR + flat
    params = [nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(3))]
    if not flat:
        deepopt.DeepMomentum(params)
        return
    with pytest.warns(UserWarning, match=r"no parameter is a matrix.*fully_shard") as told:
        deepopt.DeepMomentum(params)
    assert len(told) == 1
    deepopt.DeepMomentum(params, path="elementwise")  # asked for


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore::FutureWarning")
@pytest.mark.parametrize("source", [deepopt.param_groups, lambda m: m.parameters()])
@pytest.mark.parametrize("part", ["all of it", "a part of it"])
def test_a_model_flattened_by_fsdp1_gives_one_warning_also_where_matrices_are_left(part, source):
    from torch.distributed.fsdp import FullyShardedDataParallel

    def flat(model, keeps_shapes=False):
        return FullyShardedDataParallel(
            model, use_orig_params=keeps_shapes, device_id=torch.device("cpu")
        )

    model = sequence()
    if part == "all of it":
        model = flat(model)
    else:
        model[1] = flat(model[1])
    with pytest.warns(UserWarning, match=r"of flattened modules, take .*fully_shard") as told:
        deepopt.DeepMomentum(source(model))
    assert len(told) == 1
    # Unsharded, the shapes are kept and nothing is lost.
    deepopt.DeepMomentum(source(flat(sequence(), keeps_shapes=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": 2}, r"Invalid split: 2 is not a dict.*'\*.qkv.weight': 3"),
        ({"overrides": "matrix"}, r"Invalid overrides: 'matrix' is not a dict"),
        ({"overrides": {0: "matrix"}}, r"Invalid overrides: the key 0 is not a string; give names"),
        ({"split": {None: 3}}, r"Invalid split: the key None is not a string; give names"),
    ],
)
def test_what_is_no_dict_of_names_is_refused_by_name(options, message):
    with pytest.raises(TypeError, match=message):
        deepopt.param_groups(sequence(), **options)
