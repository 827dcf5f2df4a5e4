"""Shape and name decide where no module is known."""

import pytest
import torch
from torch import nn

import deepopt
from deepopt.routing import rules
from deepopt.routing.rules import route
from tests.routing.models import Layers, table


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


def test_names_are_read_without_their_wrappers():
    model = Layers(body=nn.Linear(64, 64), fc=nn.Linear(64, 64))
    for wrapped in (Layers(module=model), Layers(_orig_mod=Layers(module=model))):
        (matrix, rest) = deepopt.param_groups(wrapped, {"body.bias": "elementwise"})
        assert [name.split(".")[-2:] for name, _ in matrix["params"]] == [["body", "weight"]]
        assert "named like a head" in rest["reasons"]
    peft = Layers(base_model=Layers(model=Layers(score=nn.Linear(64, 64), up=nn.Linear(64, 64))))
    assert table(peft)["base_model.model.score.weight"].reason == "named like a head"


def test_routing_by_shape_and_name_is_computed_once_per_parameter():
    group = {"params": [nn.Parameter(torch.randn(16, 16))], "path": "auto", "split": 1}
    first = list(rules.routed(group))
    misses = rules._route_shape.cache_info().misses
    assert list(rules.routed(group)) == first
    assert rules._route_shape.cache_info().misses == misses
