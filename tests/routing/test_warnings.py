"""Ordinary models give no warning; a doubtful route gives one, which has the remedy."""

import warnings

import pytest
import torch
from torch import nn

import deepopt
from deepopt.hope import Hope
from deepopt.routing import groups
from tests.routing.models import LanguageModel, Layers, LoraLinear, paths, sequence, table


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
    size = groups.MAX_VECTOR + flat
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
