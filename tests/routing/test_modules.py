"""The module that owns a parameter decides: hidden layers are matrices, tables and heads not."""

import copy
import warnings

import pytest
import torch
from torch import nn

import deepopt
from deepopt.routing.rules import route
from tests.routing.models import Conv1D, LanguageModel, Layers, LoraLinear, paths, sequence, table


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


class Packed(nn.Linear):
    """A layer whose weight has another name."""

    def __init__(self):
        super().__init__(64, 64, bias=False)
        del self.weight
        self.packed = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.packed


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
