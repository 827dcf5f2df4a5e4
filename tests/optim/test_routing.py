import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim.routing import route


def paths(model):
    return {
        name: group["path"] for group in deepopt.param_groups(model) for name, _ in group["params"]
    }


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
    assert route(torch.empty(shape), name) == path


def test_complex_parameters_are_never_matrices():
    assert route(torch.empty(64, 64, dtype=torch.complex64)) == "elementwise"


def test_overrides_by_name_and_by_pattern_come_before_the_rules():
    model = LanguageModel(tied=False)
    overrides = {"*.weight": "elementwise", "up.weight": "matrix", "tokens.weight": "matrix"}
    found = {
        name: group["path"]
        for group in deepopt.param_groups(model, overrides)
        for name, _ in group["params"]
    }
    assert found["up.weight"] == found["tokens.weight"] == "matrix"
    assert found["down.weight"] == "elementwise"
    assert found["experts"] == "stack"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"dwon.weight": "matrix"}, "matches no parameter"), ({"down.weight": "auto"}, "is none of")],
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
