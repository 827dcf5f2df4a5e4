"""What an optimizer accepts as arguments and what it refuses."""

import inspect
import re

import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim.registry import REGISTRY
from tests.optim.contract.helpers import (
    ENTRIES,
    EXPECTED_WARNINGS,
    Wrapped,
    every,
    every_class,
    label,
    make_model,
    moved,
    run,
    values,
)
from tests.optim.contract.inputs import INPUTS

pytestmark = EXPECTED_WARNINGS


def test_every_class_of_the_registry_has_inputs_and_nothing_else_has():
    assert INPUTS.keys() == REGISTRY.keys()
    assert all(inputs.options for inputs in INPUTS.values())


@pytest.mark.parametrize("cls", [entry.cls for entry in REGISTRY.values()], ids=label)
def test_the_docstring_describes_every_argument_of_the_signature(cls):
    described = re.findall(r"^        (\w+): ", cls.__doc__.partition("Args:\n")[2], re.MULTILINE)
    assert set(inspect.signature(cls).parameters) <= set(described)


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


def options_of(cls):
    """Every number and flag of a class, by what its default or annotation is."""
    for name, parameter in inspect.signature(cls).parameters.items():
        kinds = set(re.findall(r"\w+", str(parameter.annotation).replace("<class 'bool'>", "bool")))
        if name in ("params", "memory", "feature_map", "optimizer"):
            continue
        if "bool" in kinds:
            yield name, "flag", ("no", 1, 0.0, [True])
        elif kinds & {"tuple", "Sequence"}:
            yield name, "numbers", ("x", 3, ("0.9", "0.99", "1"))
        elif kinds & {"float", "int"}:
            yield name, "number", ("x", True, [0.1], torch.ones(2) if name != "lr" else 1j)


OPTIONS = [
    (cls, name, of, value)
    for cls in (entry.cls for entry in REGISTRY.values() if not entry.wraps)
    for name, of, wrong in options_of(cls)
    for value in wrong
]


@pytest.mark.parametrize(("cls", "name", "of", "value"), OPTIONS)
def test_every_number_and_flag_of_another_type_is_refused_by_name(cls, name, of, value):
    message = re.escape(f"Invalid {name}: {value!r} is not a ") + ".*; give "
    with pytest.raises(TypeError, match=message):
        cls([nn.Parameter(torch.randn(3))], **{name: value})
    param = nn.Parameter(torch.randn(20, 24))
    optimizer = cls([param])
    param.grad = torch.ones_like(param)
    optimizer.param_groups[0][name] = value
    before = param.detach().clone()
    with pytest.raises(TypeError, match=message):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state


def test_the_table_of_numbers_and_flags_has_all_but_names_and_objects():
    found = {(cls.__name__, name) for cls, name, _, _ in OPTIONS}
    for cls in {cls for cls, *_ in OPTIONS}:
        for name, parameter in list(inspect.signature(cls).parameters.items())[1:]:
            if isinstance(parameter.default, bool | int | float | tuple):
                assert (cls.__name__, name) in found


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
