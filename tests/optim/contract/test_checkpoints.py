"""Saving, loading and copying an optimizer."""

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from tests.optim.contract.helpers import (
    DEFAULT,
    EXPECTED_WARNINGS,
    assert_near,
    assert_same,
    every,
    every_class,
    feed,
    gradient_stream,
    make_model,
    run,
    states,
    through_disk,
)

pytestmark = EXPECTED_WARNINGS


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seen", [1, 3])
def test_training_resumes_from_disk_bit_for_bit(cls, options, dtype, seen):
    model = make_model(dtype)
    optimizer = cls(model.parameters(), **options)
    run(model, optimizer, seen)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run(model, optimizer, 5, first=seen)

    fresh = make_model(dtype, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed = cls(fresh.parameters(), **{**options, "lr": 1.0})
    resumed.load_state_dict(saved["optimizer"])
    assert_same(run(fresh, resumed, 5, first=seen), expected)


@every
def test_a_run_resumes_bit_for_bit_where_parameters_first_moved_at_different_steps(cls, options):
    """Their state then lies in different storages before saving and in one after loading."""
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    model[2].weight.requires_grad_(False)
    run(model, optimizer, 2)
    model[2].weight.requires_grad_(True)
    run(model, optimizer, 2, first=2)
    saved = through_disk(optimizer.state_dict())
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    resumed = cls(twin.parameters(), **options)
    resumed.load_state_dict(saved)
    assert_same(run(twin, resumed, 3, first=4), run(model, optimizer, 3, first=4))


@every
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copy_continues_as_the_original_does(cls, options, copier):
    model = make_model()
    optimizer = cls(model.named_parameters(), **{**options, "maximize": True})
    run(model, optimizer, 3)
    model2, optimizer2 = copier((model, optimizer))
    assert repr(optimizer2) == repr(optimizer)
    assert_same(run(model2, optimizer2, 4, first=3), run(model, optimizer, 4, first=3))


def _continue_elsewhere(pairs, queue):
    torch.set_num_threads(1)
    queue.put([[v.tolist() for v in run(model, opt, 2, first=2)] for model, opt in pairs])


def test_optimizers_travel_to_another_process_and_continue_there():
    pairs = []
    for cls in DEFAULT:
        model = make_model()
        optimizer = cls(model.parameters())
        run(model, optimizer, 2)
        pairs.append((model, optimizer))
    here = copy.deepcopy(pairs)  # torch shares the storage of what it sends
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_continue_elsewhere, args=(pairs, queue))
    process.start()
    found = queue.get(timeout=120)
    process.join(timeout=60)
    for (model, optimizer), ours in zip(here, found, strict=True):
        expected = run(model, optimizer, 2, first=2)
        assert_near([torch.tensor(value) for value in ours], expected, 1e-7, 1e-6)


@every
def test_a_saved_state_holds_plain_data_and_tensors_alone(cls, options):
    model = make_model()
    optimizer = cls(model.named_parameters(), **options)
    run(model, optimizer, 1)
    saved = through_disk(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"][0] == "0.weight"
    assert [len(paths) for paths in saved["routing"]] == [6]
    assert set(saved["routing"][0]) <= {"matrix", "elementwise"}
    for state in saved["state"].values():
        assert {type(value) for value in state.values()} == {torch.Tensor}


@every
def test_loading_shares_no_storage_with_what_was_loaded(cls, options):
    model, other = make_model(), make_model()
    optimizer, loaded = (cls(m.parameters(), **options) for m in (model, other))
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    loaded.load_state_dict(saved)
    run(other, loaded, 2)
    for index, state in before.items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value)


@every_class
def test_foreign_checkpoints_are_refused_and_change_nothing(cls):
    model = make_model()
    optimizer = cls(model.parameters())
    run(model, optimizer, 1)
    other = make_model()
    adagrad = torch.optim.Adagrad(other.parameters())
    run(other, adagrad, 1)
    own = optimizer.state_dict()
    halved = {i: {"step": state["step"]} for i, state in own["state"].items()}
    groups = own["param_groups"]
    fewer = [{**groups[0], "params": [0]}]
    reasons = "expected step|doesn.t match|different number|from Other|neither state|Invalid|"
    reasons += "number of its steps|not a dict"
    incomplete = any(len(state) > 1 for state in own["state"].values())  # or steps are all
    strange = [{**own, "state": adagrad.state_dict()["state"]}, {**own, "state": halved}]
    for given in (
        *(strange if incomplete else []),
        {**own, "param_groups": fewer},
        {**own, "param_groups": groups * 2},
        {**own, "optimizer": "Other"},
        {
            "state": {},
            "param_groups": torch.optim.SGD(other.parameters()).state_dict()["param_groups"],
        },
        {**own, "param_groups": [{**groups[0], "lr": -1.0}]},
        {**own, "param_groups": [{**groups[0], "path": "rows"}]},
        *(
            {**own, "state": {**own["state"], 0: state}}
            for state in (
                *({**own["state"][0], "step": torch.tensor(step)} for step in (-5.0, [1.0])),
                *({**own["state"][0], "step": step} for step in ("5", None)),
                {k: v.tolist() if v.dim() else v for k, v in own["state"][0].items()},
                {k: v.to("meta") if v.dim() else v for k, v in own["state"][0].items()},
                None,
                "none",
            )[: 8 if incomplete else 4]
        ),
        other.state_dict(),
        [],
    ):
        before = states(optimizer)
        with pytest.raises(ValueError, match=reasons):
            optimizer.load_state_dict(given)
        assert_same(states(optimizer), before)
        assert optimizer.state_dict()["param_groups"] == groups


@every_class
def test_a_checkpoint_of_the_same_parameters_in_another_order_is_refused(cls):
    params = [(name, nn.Parameter(torch.ones(20, 24))) for name in ("a", "b")]
    optimizer, other = cls(params), cls(params[::-1])
    feed(optimizer, [param for _, param in params], gradient_stream([(20, 24)] * 2, 1))
    with pytest.raises(ValueError, match="same parameters in another order"):
        other.load_state_dict(optimizer.state_dict())


@every
def test_checkpoints_without_a_newer_argument_load(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    run(model, optimizer, 1)
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("foreach", "fused", "capturable", "differentiable", "maximize", "path"):
        old["param_groups"][0].pop(key)
    for state in old["state"].values():
        state["step"] = 1.0  # a number, as in torch's older checkpoints
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    loaded = cls(twin.parameters(), **options)
    loaded.load_state_dict(old)
    assert_same(run(twin, loaded, 2, first=1), run(model, optimizer, 2, first=1))


@every_class
def test_an_unstepped_optimizer_saves_and_loads(cls):
    optimizer = cls(make_model().parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not any(optimizer.state.values())


@every_class
def test_hooks_of_the_user_take_part(cls):
    model, seen = make_model(), []
    optimizer = cls(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(model, optimizer, 1)
    assert seen == ["before", "after"]

    def later(_, given):
        given = copy.deepcopy(given)
        for state in given["state"].values():
            state["step"] += 1
        return given

    optimizer.register_state_dict_post_hook(later)
    optimizer.register_load_state_dict_pre_hook(later)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model[0].weight]["step"].item())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[2:] == [3.0]
