"""Groups follow overrides, name what they refuse, and print every route with its reason."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import deepopt
from deepopt.routing import groups
from tests.routing.models import LanguageModel, sequence, table


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


def test_a_tied_weight_answers_to_both_of_its_names():
    groups = deepopt.param_groups(LanguageModel(tied=True), {"unembedding.weight": "elementwise"})
    assert table(groups)["tokens.weight"].reason == "override 'unembedding.weight'"


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


def test_what_is_no_module_or_has_no_parameters_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but is list"):
        deepopt.param_groups([])
    with pytest.raises(ValueError, match="no parameters"):
        deepopt.param_groups(nn.ReLU())


def test_lazy_modules_are_asked_to_run_first():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(32))
    message = r"Invalid params: 1\.weight of a lazy module has no shape yet; run the model once"
    with pytest.raises(ValueError, match=message):
        deepopt.param_groups(model)
    with pytest.raises(ValueError, match=message):
        deepopt.DeepMomentum(model.named_parameters())
    model(torch.randn(2, 16))
    deepopt.DeepMomentum(deepopt.param_groups(model))


def test_other_optimizers_take_the_groups():
    model = LanguageModel(tied=False)
    groups = deepopt.param_groups(model)
    assert all(type(group) is dict for group in groups)
    optimizer = torch.optim.AdamW(groups)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def test_labels_are_plain_words_that_tell_path_and_split():
    model = LanguageModel(tied=False)
    labels = [groups.labels(g) for g in deepopt.DeepMomentum(
        deepopt.param_groups(model)).param_groups]  # fmt: skip
    assert labels == [["matrix"] * 3, ["matrix/3"], ["stack"], ["elementwise"] * 9]
    auto = deepopt.DeepMomentum(model.named_parameters()).param_groups[0]
    assert groups.labels(auto).count("stack") == 1


def test_printing_an_optimizer_shows_where_every_parameter_goes():
    model = LanguageModel(tied=True)
    text = repr(deepopt.DeepMomentum(deepopt.param_groups(model)))
    assert "matrix          1 of 128 x 32            up.weight" in text
    assert "stack           1 of 4 x 32 x 64         experts" in text
    assert "elementwise     1 of 100 x 32            tokens.weight" in text
    unnamed = repr(deepopt.DeepMomentum(nn.Linear(32, 64).parameters()))
    assert "matrix          1 of 64 x 32" in unnamed


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
