import copy
import re

import pytest
import torch
from torch import nn

import deepopt
from deepopt.optim.registry import REGISTRY


class Encoder(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, 5, 32))
        self.embed = nn.Linear(24, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 4)


class TimmEncoder(Encoder):
    """timm's protocol, as its vision transformers have it."""

    def group_matcher(self, coarse=False):
        return {
            "stem": r"^position|^embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def no_weight_decay(self):
        return {"position"}


class Compiled(nn.Module):
    """Names and attributes as those of a model that went through ``torch.compile``."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model
        self.group_matcher = model.group_matcher
        self.no_weight_decay = model.no_weight_decay


def by_name(optimizer, key):
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("key", [key for key in REGISTRY if not REGISTRY[key].wraps])
def test_every_optimizer_is_made_by_its_name_in_any_case(key):
    cls = REGISTRY[key].cls
    for name in (key, key.upper(), cls.__name__, cls.__name__.lower()):
        optimizer = deepopt.create_optimizer(Encoder(), name, lr=0.5, weight_decay=0.25)
        assert type(optimizer) is cls
        assert optimizer.defaults["lr"] == 0.5
        assert optimizer.defaults["weight_decay"] == 0.25


def test_an_unknown_name_is_answered_by_those_there_are():
    with pytest.raises(ValueError, match=r"Invalid name: 'adam9'; choose from deep_mo.*, adamw,"):
        deepopt.create_optimizer(Encoder(), "adam9")
    with pytest.raises(TypeError, match="create_optimizer needs name; choose a name from deep_mo"):
        deepopt.create_optimizer(Encoder())


@pytest.mark.parametrize("name", ["adamw", "AdamW", "sgd", "rmsprop", "muon", "continuum"])
def test_an_optimizer_of_torch_and_a_wrapper_change_one_word(name):
    model = Encoder()
    optimizer = deepopt.create_optimizer(model, name, lr=0.01, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    decays = {
        param_name: group["weight_decay"]
        for group in optimizer.param_groups
        for param_name in group["param_names"]
    }
    assert decays["embed.weight"] == 0.1
    assert decays["embed.bias"] == 0.0
    assert sorted(decays) == sorted(name for name, _ in model.named_parameters())
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(param, old)


def test_muon_takes_matrices_and_adamw_the_rest_and_both_are_saved_and_scheduled():
    def made(seed):
        torch.manual_seed(seed)
        model = Encoder()
        optimizer = deepopt.create_optimizer(model, "muon", lr=0.01, momentum=0.9, betas=(0.8, 0.9))
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def advance(model, optimizer, scheduler, number):
        torch.manual_seed(number)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step(), scheduler.step()
        return [param.detach().clone() for param in model.parameters()]

    run = made(0)
    muon, adamw = run[1].parts["muon"], run[1].parts["adamw"]
    names = {name for group in muon.param_groups for name in group["param_names"]}
    expected = {row.name for row in deepopt.routing_table(run[0]) if row.path == "matrix"}
    assert names == expected
    assert {group["momentum"] for group in muon.param_groups} == {0.9}
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.9)}
    advance(*run, 1)
    assert {group["lr"] for group in run[1].param_groups} == {0.005}
    other = made(1)
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(copy.deepcopy(run[1].state_dict()))
    other[2].load_state_dict(run[2].state_dict())
    for found, wanted in zip(advance(*other, 2), advance(*run, 2), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="Invalid state_dict: its groups are not those of Muon"):
        run[1].load_state_dict(deepopt.DeepMomentum(made(0)[0].parameters()).state_dict())
    with pytest.raises(ValueError, match="muon needs groups with a path"):
        deepopt.create_optimizer(run[0].parameters(), "muon")


def test_the_state_and_the_groups_of_muon_and_adamw_are_the_users():
    def stepped(model, optimizer):
        torch.manual_seed(0)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        return [param.detach().clone() for param in model.parameters()]

    model = Encoder()
    optimizer = deepopt.create_optimizer(model, "muon")
    stepped(model, optimizer)
    twin = copy.deepcopy((model, optimizer))
    for param in model.parameters():
        kept = optimizer.state[param]
        kept["mine"] = "untouched"
        optimizer.state[param] = {key: copy.deepcopy(value) for key, value in kept.items()}
    for found, expected in zip(stepped(model, optimizer), stepped(*twin), strict=True):
        assert torch.equal(found, expected)
    assert {state["mine"] for state in optimizer.state.values()} == {"untouched"}
    optimizer.state.clear()
    assert not any(part.state for part in optimizer.parts.values())
    stepped(model, optimizer)
    assert optimizer.state.keys() == set(model.parameters())
    late = nn.Parameter(torch.ones(16, 16))
    optimizer.add_param_group({"params": [("late", late)], "path": "matrix", "lr": 0.5})
    late.grad = torch.randn_like(late)
    optimizer.step()
    assert optimizer.param_groups[-1]["lr"] == 0.5
    assert not torch.equal(late, torch.ones(16, 16))
    with pytest.raises(ValueError, match="muon needs groups with a path"):
        optimizer.add_param_group({"params": [("other", nn.Parameter(torch.ones(3)))]})
    with pytest.raises(ValueError, match="must support momentum or beta1 with `cycle_momentum`"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)


def test_overrides_and_splits_are_those_of_param_groups():
    model = Encoder()
    optimizer = deepopt.create_optimizer(
        model, "deep_momentum", overrides={"embed.weight": "elementwise"}, split={"blocks.*": 2}
    )
    assert by_name(optimizer, "path")["embed.weight"] == "elementwise"
    assert by_name(optimizer, "split")["blocks.0.1.weight"] == 2
    with pytest.raises(ValueError, match=r"Invalid overrides: .* give the module itself"):
        deepopt.create_optimizer(model.parameters(), "deep_momentum", overrides={"x": "matrix"})
    with pytest.raises(TypeError, match="Invalid split: 2 is not a dict"):
        deepopt.create_optimizer(model, "deep_momentum", split=2)


def test_parameters_without_decay_may_be_listed_in_an_attribute():
    model = Encoder()
    model.no_weight_decay = {"position"}
    optimizer = deepopt.create_optimizer(model, "deep_momentum", weight_decay=0.1)
    decays = by_name(optimizer, "weight_decay")
    assert (decays["position"], decays["embed.weight"]) == (0.0, 0.1)


def test_an_attribute_that_lists_no_parameters_is_none_or_is_named():
    model = Encoder()
    model.no_weight_decay = None
    assert by_name(deepopt.create_optimizer(model, "adamw"), "weight_decay")["position"] > 0
    for wrong in ("position", True):
        model.no_weight_decay = wrong
        with pytest.raises(TypeError, match=f"Invalid no_weight_decay of the model: {wrong!r}; it"):
            deepopt.create_optimizer(model, "adamw")


@pytest.mark.parametrize("name", ["adamw", "muon", "continuum"])
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_numbers_as_text_are_named_whoever_the_optimizer_is_of(name, key):
    with pytest.raises(TypeError, match=f"Invalid {key}: '1e-3' is not a number"):
        deepopt.create_optimizer(Encoder(), name, **{key: "1e-3"})


def test_splits_and_overrides_without_a_model_are_refused_by_name_and_remedy():
    for options in ({"split": 2}, {"split": {"*": 2}}, {"overrides": {"*": "matrix"}}):
        (key, value), *_ = options.items()
        for name in ("deep_momentum", "adamw", "continuum"):
            message = re.escape(f"Invalid {key}: {value!r}; it needs the names")
            with pytest.raises(ValueError, match=f"{message}.*give the module itself"):
                deepopt.create_optimizer(Encoder().parameters(), name, **options)


@pytest.mark.parametrize("name", [*deepopt.optimizers(), "muon", "adamw", "rprop", "adafactor"])
def test_an_option_that_a_class_lacks_is_refused_by_name_and_with_those_there_are(name):
    options = {"weight_decay": 0.1} if name == "rprop" else {"gain": 2.0}
    (key, value), *_ = options.items()
    for given in (Encoder(), [{"params": list(Encoder().parameters()), "path": "auto"}]):
        with pytest.raises(
            TypeError, match=rf"Invalid {key}: {value}, which \w+ does not take.* lr"
        ):
            deepopt.create_optimizer(given, name, **options)
    with pytest.raises(TypeError, match="Invalid filter_bias_and_bn: 'no' is not a flag"):
        deepopt.create_optimizer(Encoder(), name, filter_bias_and_bn="no")


def test_without_arguments_it_is_its_own_factory():
    model = Encoder()
    made = deepopt.create_optimizer()(model, name="deep_momentum", lr=0.25)
    assert type(made) is deepopt.DeepMomentum


def test_what_is_not_given_is_the_defaults_and_unknown_options_are_refused():
    optimizer = deepopt.create_optimizer(Encoder(), "deep_momentum", memory="linear")
    expected = deepopt.DeepMomentum(Encoder().parameters(), memory="linear").defaults
    assert optimizer.defaults == expected
    with pytest.raises(TypeError, match="nesterov"):
        deepopt.create_optimizer(Encoder(), "deep_momentum", nesterov=True)


def test_a_module_is_routed_as_param_groups_does():
    model = Encoder()
    model.embed.weight.requires_grad_(False)
    optimizer = deepopt.create_optimizer(model, "deep_momentum", layer_decay=0.5)
    expected = {
        name: group["path"] for group in deepopt.param_groups(model) for name, _ in group["params"]
    }
    assert by_name(optimizer, "path") == expected


def test_a_path_among_the_options_replaces_the_routing():
    optimizer = deepopt.create_optimizer(Encoder(), "deep_momentum", path="elementwise")
    assert set(by_name(optimizer, "path").values()) == {"elementwise"}


def test_everything_but_a_module_goes_to_the_optimizer_as_it_is():
    model = Encoder()
    given = [
        {"params": [model.head.bias], "lr": 0.1},
        {"params": [model.norm.weight], "path": "elementwise"},
    ]
    for params, lengths in (
        (model.parameters(), [len(list(model.parameters()))]),
        (model.named_parameters(), [len(list(model.parameters()))]),
        (given, [1, 1]),
    ):
        optimizer = deepopt.create_optimizer(params, "deep_momentum", lr=0.5, weight_decay=0.1)
        assert [len(group["params"]) for group in optimizer.param_groups] == lengths
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


@pytest.mark.parametrize("cls", [Encoder, TimmEncoder])
def test_vectors_and_biases_and_what_the_model_names_do_not_decay(cls):
    model = cls()
    decay = by_name(
        deepopt.create_optimizer(model, "deep_momentum", weight_decay=0.1), "weight_decay"
    )
    for name, param in model.named_parameters():
        exempt = param.ndim <= 1 or (cls is TimmEncoder and name == "position")
        assert decay[name] == (0.0 if exempt else 0.1), name
    everything = deepopt.create_optimizer(
        model, "deep_momentum", weight_decay=0.1, filter_bias_and_bn=False
    )
    assert set(by_name(everything, "weight_decay").values()) == {0.1}


def test_a_bias_of_more_dimensions_does_not_decay():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3, 20, 20))
    model.bias = nn.Parameter(torch.zeros(3, 20))
    optimizer = deepopt.create_optimizer(model, "deep_momentum", weight_decay=0.1)
    assert by_name(optimizer, "weight_decay") == {"weight": 0.1, "bias": 0.0}


def test_rates_fall_by_layer_from_the_head_to_the_embeddings():
    rates = by_name(
        deepopt.create_optimizer(Encoder(), "deep_momentum", lr=1.0, layer_decay=0.5), "lr"
    )
    assert rates["head.weight"] == rates["head.bias"] == rates["norm.weight"] == 1.0
    assert rates["blocks.1.1.weight"] == rates["blocks.1.0.bias"] == 0.5
    assert rates["blocks.0.1.weight"] == 0.25
    assert rates["position"] == rates["embed.bias"] == 0.125


def test_a_models_own_layers_come_first():
    rates = by_name(
        deepopt.create_optimizer(TimmEncoder(), "deep_momentum", lr=1.0, layer_decay=0.5), "lr"
    )
    assert rates["head.weight"] == 1.0
    assert rates["norm.weight"] == rates["blocks.1.1.weight"] == 0.5
    assert rates["blocks.0.1.weight"] == 0.25
    assert rates["position"] == rates["embed.weight"] == 0.125


def test_a_matcher_can_be_a_function_and_a_model_can_be_wrapped():
    model = TimmEncoder()
    expected = by_name(deepopt.create_optimizer(model, "deep_momentum", layer_decay=0.5), "lr")
    wrapped = Compiled(model)
    rates = by_name(deepopt.create_optimizer(wrapped, "deep_momentum", layer_decay=0.5), "lr")
    assert {name.removeprefix("_orig_mod."): rate for name, rate in rates.items()} == expected

    def place(name):
        return (1, int(name.split(".")[1])) if "blocks" in name else 2 * name.startswith("head")

    model.group_matcher = lambda coarse=False: place
    rates = by_name(deepopt.create_optimizer(model, "deep_momentum", lr=1.0, layer_decay=0.5), "lr")
    assert rates["head.weight"] == 1.0
    assert rates["blocks.1.1.weight"] == 0.5
    assert rates["blocks.0.1.weight"] == 0.25
    assert rates["embed.weight"] == rates["norm.weight"] == 0.125


def test_the_stacks_of_a_model_with_several_are_counted_in_order():
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleList([nn.Linear(20, 20), nn.Linear(20, 20)]),
            "bridge": nn.Linear(20, 20),
            "decoder": nn.ModuleList([nn.Linear(20, 20)]),
        }
    )
    rates = by_name(deepopt.create_optimizer(model, "deep_momentum", lr=1.0, layer_decay=0.5), "lr")
    assert rates["decoder.0.weight"] == 1.0
    assert rates["encoder.1.weight"] == rates["bridge.weight"] == 0.5
    assert rates["encoder.0.weight"] == 0.25


def test_schedulers_keep_the_ratios_and_a_factor_of_one_keeps_the_rate():
    optimizer = deepopt.create_optimizer(Encoder(), "deep_momentum", lr=1.0, layer_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    before = by_name(optimizer, "lr")
    optimizer.step()
    scheduler.step()
    assert by_name(optimizer, "lr") == {name: rate / 2 for name, rate in before.items()}
    optimizer = deepopt.create_optimizer(
        Encoder(), "deep_momentum", lr=torch.tensor(0.5), layer_decay=1.0
    )
    assert {float(rate) for rate in by_name(optimizer, "lr").values()} == {0.5}


@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
def test_a_layer_decay_out_of_range_is_refused(value):
    message = re.escape(f"Invalid layer_decay: {value}; it must be above 0 and at most 1")
    with pytest.raises(ValueError, match=message):
        deepopt.create_optimizer(Encoder(), "deep_momentum", layer_decay=value)


def test_layers_that_cannot_be_found_are_named():
    with pytest.raises(ValueError, match="layer_decay finds no layers"):
        deepopt.create_optimizer(nn.Linear(20, 20), "deep_momentum", layer_decay=0.5)
    with pytest.raises(ValueError, match="give the module itself"):
        deepopt.create_optimizer(Encoder().parameters(), "deep_momentum", layer_decay=0.5)


def test_muon_shows_the_states_of_both_and_a_look_makes_none():
    model = Encoder()
    optimizer = deepopt.create_optimizer(model, "muon")
    assert not optimizer.state
    params = list(model.parameters())
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(len(optimizer.state[param]) > 0 for param in params)
    assert set(optimizer.state) == set(params)
