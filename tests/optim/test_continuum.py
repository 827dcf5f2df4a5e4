"""Parameter groups with update frequencies of their own, over any optimizer."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.overrides import TorchFunctionMode

import deepopt
from deepopt.optim.continuum import Continuum
from deepopt.optim.m3 import M3

INNER = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "deep": lambda groups: deepopt.DeepMomentum(groups, lr=0.01),
    "m3": lambda groups: M3(groups, lr=0.01, ramp=0, slow_chunk=2),
}

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@pytest.fixture(params=INNER)
def inner(request):
    return INNER[request.param]


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16)).to(dtype)


def groups_of(model, chunk=4):
    return [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "chunk": chunk},
    ]


def backward(model, step):
    inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss = model(inputs.to(model[0].weight.dtype)).square().mean()
    loss.backward()
    return loss


def run(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return snapshot(model)


def snapshot(module):
    return [param.detach().clone() for param in module.parameters()]


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_every_chunk_at_one_it_is_the_wrapped_optimizer_bit_for_bit(inner, dtype):
    wrapped, bare = make_model(dtype), make_model(dtype)
    found = run(wrapped, Continuum(inner(wrapped.parameters())), 5)
    assert_same(found, run(bare, inner(bare.parameters()), 5))


def test_fact_8_chunks_of_one_are_plain_sgd_and_a_rate_of_zero_changes_nothing():
    model = make_model(torch.float64)
    groups = [{"params": [p], "chunk": 1} for p in model.parameters()]
    optimizer = Continuum(torch.optim.SGD(groups, lr=0.1), reduce="sum")
    for step in range(3):
        before = snapshot(model)
        model.zero_grad()
        backward(model, step)
        optimizer.step()
        for param, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(param.detach(), old - 0.1 * param.grad, rtol=0, atol=1e-15)
    frozen = Continuum(torch.optim.SGD(groups_of(model, 2), lr=0.0))
    before = snapshot(model)
    assert_same(run(model, frozen, 4), before)


@pytest.mark.parametrize(("reduce", "factor"), [("mean", 1 / 3), ("sum", 1.0)])
def test_eq_71_a_slow_group_moves_at_its_chunks_end_by_all_its_gradients(reduce, factor):
    model = make_model(torch.float64)
    slow = list(model[2].parameters())
    optimizer = Continuum(torch.optim.SGD(groups_of(model, 3), lr=0.1), reduce=reduce)
    for chunk in range(2):
        start, total = snapshot(model[2]), [torch.zeros_like(p) for p in slow]
        for step in range(3):
            assert_same(snapshot(model[2]), start)
            fast = snapshot(model[0])
            model.zero_grad()
            backward(model, 3 * chunk + step)
            for sum_, param in zip(total, slow, strict=True):
                sum_ += param.grad
            optimizer.step()
            assert not torch.equal(fast[0], model[0].weight)
        for param, old, sum_ in zip(slow, start, total, strict=True):
            torch.testing.assert_close(
                param.detach(), old - 0.1 * factor * sum_, rtol=1e-12, atol=1e-14
            )


def test_a_slow_group_is_the_wrapped_optimizer_on_the_chunks_mean_gradients(inner):
    ours, theirs = nn.Parameter(torch.zeros(24, 16)), nn.Parameter(torch.zeros(24, 16))
    optimizer, bare = Continuum(inner([ours]), chunk=4), inner([theirs])
    for seed in range(3):
        grads = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(seed))
        for grad in grads:
            ours.grad = grad
            optimizer.step()
        theirs.grad = (grads[0] + grads[1] + grads[2] + grads[3]) / 4
        bare.step()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_resumes_from_disk_bit_for_bit_in_mid_chunk(inner, dtype):
    model = make_model(dtype)
    optimizer = Continuum(inner(groups_of(model)))
    run(model, optimizer, 6)
    assert optimizer.param_groups[1]["pending_steps"] == 2
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run(model, optimizer, 8, first=6)

    fresh = make_model(dtype, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed = Continuum(inner(groups_of(fresh, chunk=2)))
    resumed.load_state_dict(saved["optimizer"])
    assert_same(run(fresh, resumed, 8, first=6), expected)


def test_a_checkpoint_from_before_the_first_update_is_resumed_bit_for_bit(inner):
    model = make_model()
    optimizer = Continuum(inner(groups_of(model)))
    run(model, optimizer, 2)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run(model, optimizer, 5, first=2)
    resumed = Continuum(inner(groups_of(model)))
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert_same(run(model, resumed, 5, first=2), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_in_mid_chunk_continues_as_the_original_does(inner, copier):
    model = make_model()
    optimizer = Continuum(inner(groups_of(model)))
    run(model, optimizer, 3)
    model2, optimizer2 = copier((model, optimizer))
    assert repr(optimizer2) == repr(optimizer)
    assert_same(run(model2, optimizer2, 4, first=3), run(model, optimizer, 4, first=3))


def test_a_checkpoint_of_the_wrapped_optimizer_alone_is_taken():
    model = make_model()
    bare = torch.optim.AdamW([{"params": g["params"]} for g in groups_of(model)])
    run(model, bare, 2)
    optimizer = Continuum(torch.optim.AdamW(groups_of(model, 3)))
    optimizer.load_state_dict(bare.state_dict())
    assert [g["chunk"] for g in optimizer.param_groups] == [1, 3]
    assert optimizer.state[model[2].weight]["step"] == 2


def test_loading_shares_no_storage_and_a_checkpoint_that_does_not_fit_changes_nothing():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = Continuum(torch.optim.AdamW(groups_of(make_model())))
    other.load_state_dict(saved)
    pending = saved["state"][2]["pending_grad"]
    assert all(mine.data_ptr() != pending.data_ptr() for mine in other.pending.values())

    broken = copy.deepcopy(saved)
    broken["state"][2]["pending_grad"] = torch.zeros(3)
    with pytest.raises(ValueError, match="number 2 has shape \\(3,\\), the parameter \\(16, 24\\)"):
        optimizer.load_state_dict(broken)
    broken = {**saved, "param_groups": saved["param_groups"][:1]}
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(broken)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert torch.equal(optimizer.state_dict()["state"][2]["pending_grad"], pending)


def test_torchs_checkpoint_helpers_keep_what_waits_or_are_refused():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))
    run(model, optimizer, 6)
    model.zero_grad()
    plain = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    flat = get_optimizer_state_dict(model, optimizer, options=FLAT)
    weights = copy.deepcopy(model.state_dict())
    expected = run(model, optimizer, 4, first=6)

    fresh = make_model(seed=1)
    fresh.load_state_dict(weights)
    resumed = Continuum(torch.optim.AdamW(groups_of(fresh)))
    set_optimizer_state_dict(fresh, resumed, plain)
    assert_same(run(fresh, resumed, 4, first=6), expected)
    with pytest.raises(ValueError, match="group number 1 has pending_steps=2 but no pending_grad"):
        set_optimizer_state_dict(fresh, resumed, flat, options=FLAT)

    optimizer.flush("step")
    fresh.load_state_dict(model.state_dict())
    flat = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FLAT))
    set_optimizer_state_dict(fresh, resumed, flat, options=FLAT)
    assert_same(run(fresh, resumed, 5, first=10), run(model, optimizer, 5, first=10))


def test_torchs_checkpoint_helpers_step_an_optimizer_without_state_which_flush_takes_back():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))
    before = snapshot(model)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.param_groups[1]["pending_steps"] == 1
    optimizer.flush("discard")
    assert_same(snapshot(model), before)
    assert [group["pending_steps"] for group in optimizer.param_groups] == [0, 0]
    assert not optimizer.pending


def test_a_group_in_mid_chunk_that_lost_what_waits_is_refused_and_changes_nothing():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))
    run(model, optimizer, 2)
    before = optimizer.state_dict()
    lost = copy.deepcopy(before)
    for index in lost["param_groups"][1]["params"]:
        del lost["state"][index]
    with pytest.raises(ValueError, match="set pending_steps to 0"):
        optimizer.load_state_dict(lost)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert len(optimizer.pending) == 2
    lost["param_groups"][1]["pending_steps"] = 0
    optimizer.load_state_dict(lost)
    assert not optimizer.pending


def test_a_frozen_group_in_mid_chunk_is_resumed():
    model = make_model()
    model[2].requires_grad_(False)
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))
    run(model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[1]["pending_steps"] == 2


def test_partial_chunks_are_stepped_or_discarded_as_asked():
    for partial in ("step", "discard"):
        model = make_model()
        optimizer = Continuum(torch.optim.SGD(groups_of(model, 4), lr=0.1))
        model.zero_grad()
        for step in range(2):
            model.zero_grad()
            backward(model, step)
            optimizer.step()
        before, grad = snapshot(model), model[2].weight.grad
        mean = optimizer.pending[model[2].weight] / 2
        optimizer.flush(partial)
        assert torch.equal(model[0].weight, before[0])
        expected = before[2] - 0.1 * mean if partial == "step" else before[2]
        torch.testing.assert_close(model[2].weight.detach(), expected)
        assert model[2].weight.grad is grad
        assert not optimizer.pending
        assert optimizer.param_groups[1]["pending_steps"] == 0
        after = snapshot(model)
        optimizer.flush(partial)
        assert_same(snapshot(model), after)
    with pytest.raises(ValueError, match="Invalid partial: 'keep'"):
        optimizer.flush("keep")


def test_decay_and_step_counts_are_those_of_real_updates():
    param = nn.Parameter(torch.ones(4))
    optimizer = Continuum(torch.optim.AdamW([param], lr=0.1, weight_decay=0.5), chunk=3)
    for _ in range(6):
        param.grad = torch.zeros(4)
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.95**2))
    assert optimizer.state[param]["step"] == 2


def test_schedulers_count_every_step_and_the_update_has_the_rate_of_its_own():
    param = nn.Parameter(torch.zeros(1))
    optimizer = Continuum(torch.optim.SGD([param], lr=1.0), chunk=2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 10.0**-step)
    positions = []
    for _ in range(4):
        param.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        positions.append(param.item())
    assert positions == pytest.approx([0, -0.1, -0.1, -0.101])


def test_parameters_without_gradient_count_as_zero_and_those_without_any_rest():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = Continuum(torch.optim.AdamW([used, unused], lr=0.1), chunk=2)
    for grad in (torch.ones(2), None):
        used.grad = grad
        optimizer.step()
    assert optimizer.state[used]["exp_avg"].tolist() == pytest.approx([0.05, 0.05])
    assert unused not in optimizer.state
    assert unused.tolist() == [1, 1]


def test_gradients_wait_in_float32_and_are_never_written_to():
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = Continuum(torch.optim.SGD([param], lr=1.0), chunk=512)
    grad = torch.ones(3, dtype=torch.bfloat16)
    for _ in range(511):
        param.grad = grad
        optimizer.step()
    assert {p.dtype for p in optimizer.pending.values()} == {torch.float32}
    assert optimizer.pending[param].tolist() == [511.0] * 3
    param.grad = grad
    optimizer.step()
    assert param.tolist() == [-1.0] * 3
    assert param.grad is grad
    assert grad._version == 0


def test_between_chunks_and_update_there_is_room_for_clipping():
    param = nn.Parameter(torch.zeros(2))
    optimizer = Continuum(torch.optim.SGD([param], lr=1.0), chunk=2)
    for grad in (torch.tensor([3.0, 0.0]), torch.tensor([3.0, 8.0])):
        param.grad = grad
        with optimizer.due() as groups:
            assert groups == (optimizer.param_groups if grad[1] else [])
            assert (param.grad is None) == (not groups)
            nn.utils.clip_grad_norm_([param], 1.0)
            optimizer.optimizer.step()
        assert param.grad is grad
    torch.testing.assert_close(param.detach(), torch.tensor([-0.6, -0.8]))


def test_a_step_that_fails_does_not_count_and_can_be_tried_again():
    param = nn.Parameter(torch.zeros(2))
    optimizer = Continuum(torch.optim.SGD([param], lr=1.0), chunk=2)
    param.grad = torch.ones(2)
    optimizer.step()

    def fail(*_):
        raise ArithmeticError("on purpose")

    handle = optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="on purpose"):
        optimizer.step()
    handle.remove()
    assert param.grad.tolist() == [1, 1]
    optimizer.step()
    assert param.tolist() == [-1, -1]


def test_closures_are_run_with_gradients_and_their_loss_is_returned():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(groups_of(model)))

    def closure():
        optimizer.zero_grad()
        return backward(model, 0)

    before = snapshot(model)
    with torch.no_grad():
        assert isinstance(optimizer.step(closure), torch.Tensor)
    assert not torch.equal(model[0].weight, before[0])
    assert optimizer.step() is None


@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_grad_scaler_skips_a_step_with_infinite_gradients(name):
    model = make_model()
    optimizer = Continuum(INNER[name](groups_of(model, 2)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = snapshot(model)
    scaler.scale(model(torch.ones(2, 16)).mean()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(snapshot(model), before)
    assert not optimizer.pending
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 16)).mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(model[2].weight, before[2])
    loss.detach()


def test_hooks_run_around_steps_and_checkpoints_and_the_inner_ones_around_updates():
    param = nn.Parameter(torch.zeros(2))
    optimizer = Continuum(torch.optim.SGD([param], lr=1.0), chunk=2)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    optimizer.optimizer.register_step_post_hook(lambda *_: seen.append("update"))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, given: seen.append(given["note"]))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    for _ in range(2):
        param.grad = torch.ones(2)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["step", "update", "step", "save", 1, "loaded"]


def test_groups_can_be_added_in_mid_chunk():
    model = make_model()
    optimizer = Continuum(torch.optim.AdamW(model[0].parameters()), chunk=3)
    run(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "chunk": 2})
    before = snapshot(model)
    run(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[2])
    run(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before[2])


def test_autograd_runs_through_a_chunk():
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    grads = [grad.requires_grad_() for grad in grads]

    def final(*grads):
        param = start.clone()
        inner = torch.optim.AdamW([param], lr=0.1, differentiable=True)
        optimizer = Continuum(inner, chunk=2)
        for grad in grads:
            param.grad = grad
            optimizer.step()
        return param

    assert torch.autograd.gradcheck(final, grads)


def test_sparse_gradients_wait_as_they_are():
    weights = [nn.Parameter(torch.zeros(5, 2)) for _ in range(2)]
    optimizers = [
        Continuum(torch.optim.SGD(weights[:1], lr=1.0), chunk=2),
        torch.optim.SGD(weights[1:], lr=1.0),
    ]
    grads = [torch.zeros(5, 2).index_fill_(0, torch.tensor(row), 1.0) for row in (1, 3)]
    for grad in grads:
        weights[0].grad = grad.to_sparse()
        optimizers[0].step()
    weights[1].grad = (grads[0] + grads[1]) / 2
    optimizers[1].step()
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "Invalid chunk: 0"),
        ({"chunk": 2.0}, ValueError, "Invalid chunk: 2.0"),
        ({"chunk": True}, ValueError, "Invalid chunk: True"),
        ({"tokens": 0}, ValueError, "Invalid tokens: 0"),
        ({"tokens": 1.5}, ValueError, "Invalid tokens: 1.5"),
        ({"lifetime": 0}, ValueError, "Invalid lifetime: 0"),
        ({"reduce": "max"}, ValueError, "Invalid reduce: 'max'"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_anything_else(arguments, error, message):
    param = nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([param], lr=0.1)
    with pytest.raises(error, match=message):
        Continuum(inner, **arguments)
    assert "chunk" not in inner.defaults
    optimizer = Continuum(inner)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], **arguments})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(error, match=message):
        Continuum(torch.optim.SGD([{"params": [param], **arguments}], lr=0.1))


def test_what_is_no_optimizer_or_needs_a_closure_is_refused():
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match=r"is not a torch.optim.Optimizer"):
        Continuum([param])
    with pytest.raises(TypeError, match="it has a Continuum already"):
        Continuum(Continuum(torch.optim.SGD([param]), 2), 3)
    with pytest.raises(TypeError, match="LBFGS evaluates the model by a closure"):
        Continuum(torch.optim.LBFGS([param]))


class AveragedSGD(torch.optim.SGD):
    """A schedule-free optimizer's interface."""

    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def zero_grad(self, set_to_none=True):
        self.zeroed = True
        super().zero_grad(set_to_none)

    def step(self, closure=None):
        if not self.training:
            raise RuntimeError("not in training mode")
        return super().step(closure)


def test_whatever_the_wrapped_optimizer_has_beside_torchs_interface_is_passed_on():
    param = nn.Parameter(torch.ones(3))
    optimizer = Continuum(AveragedSGD([param], lr=0.5))
    param.grad = torch.ones(3)
    optimizer.train()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.zeroed
    assert param.grad is None
    optimizer.eval()
    assert param.tolist() == [0.5] * 3
    assert not optimizer.training
    with pytest.raises(RuntimeError, match="not in training mode"):
        optimizer.step()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = optimizer.nothing_like_it
    assert copy.deepcopy(optimizer).training is False


class Doubled(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        doubled = isinstance(result, torch.Tensor) and result.is_floating_point() and result.ndim
        return result * 2 if doubled else result


@pytest.mark.parametrize("end", ["step", "flush"])
def test_sums_of_gradients_are_alone_in_their_world(end):
    def run(mode):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn(20, 24, generator=generator))
        optimizer = Continuum(deepopt.DeepMomentum([param]), chunk=2 if end == "step" else 3)
        for _ in range(2):
            param.grad = torch.randn(20, 24, generator=generator)
            with mode():
                optimizer.step()
        if end == "flush":
            with mode():
                optimizer.flush("step")
        return param.detach()

    assert torch.equal(run(Doubled), run(contextlib.nullcontext))


# -- tokens and lifetimes ----------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "tokens"), [(256, 100), (7, 3), (5, 5), (3, 10)])
def test_a_group_learns_once_per_chunk_of_tokens_from_the_mean_of_the_steps_since(chunk, tokens):
    model = make_model(torch.float64)
    optimizer = Continuum(torch.optim.SGD(groups_of(model, chunk), lr=0.1), tokens=tokens)
    total, steps = torch.zeros_like(model[2].weight), 0
    for step in range(20):
        before = model[2].weight.detach().clone()
        optimizer.zero_grad()
        backward(model, step)
        total, steps = total + model[2].weight.grad, steps + 1
        optimizer.step()
        if (step + 1) * tokens // chunk > step * tokens // chunk:
            expected, total, steps = before - 0.1 * total / steps, torch.zeros_like(total), 0
            torch.testing.assert_close(model[2].weight.detach(), expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(model[2].weight, before)


def test_the_tokens_of_a_step_may_change_from_step_to_step():
    model = make_model()
    optimizer = Continuum(torch.optim.SGD(groups_of(model, 100), lr=0.1))
    moved = []
    for step, tokens in enumerate((60, 30, 10, 150, 49, 1)):
        for group in optimizer.param_groups:
            group["tokens"] = tokens
        before = model[2].weight.detach().clone()
        run(model, optimizer, 1, step)
        moved.append(not torch.equal(before, model[2].weight))
    assert moved == [False, False, True, True, False, True]


def test_a_group_starts_from_zero_when_its_lifetime_is_over_and_resumes_in_between():
    def make():
        model = make_model()
        groups = [
            {"params": list(model[0].parameters()), "lifetime": 50},
            {"params": list(model[2].parameters())},
        ]
        return model, Continuum(torch.optim.AdamW(groups, lr=0.01), tokens=20)

    model, optimizer = make()
    zero = []
    for step in range(8):
        run(model, optimizer, 1, step)
        zero.append(not any(param.any() for param in model[0].parameters()))
        assert model[2].weight.any()
        if step == 3:
            middle = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert zero == [False, False, True, False, True, False, False, True]
    resumed, again = make()
    resumed.load_state_dict(middle[0])
    again.load_state_dict(middle[1])
    run(resumed, again, 4, 4)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_reset_in_the_middle_of_a_chunk_drops_the_gradients_of_the_old_weights():
    param = nn.Parameter(torch.ones(1))
    groups = [{"params": [param], "chunk": 2, "lifetime": 3}]
    optimizer = Continuum(torch.optim.SGD(groups, lr=1.0))
    values = []
    for step in range(6):
        param.grad = torch.full((1,), 10.0**step)
        optimizer.step()
        values.append(param.item())
    # The gradient of step 3 goes with the weight that is reset; chunks still end at 2, 4 and 6.
    assert values == [1.0, -4.5, 0.0, -1000.0, -1000.0, 0.0]
    assert not optimizer.pending


def test_a_checkpoint_from_before_tokens_were_counted_goes_on_in_the_middle_of_its_chunk():
    model = make_model()
    optimizer = Continuum(torch.optim.SGD(groups_of(model), lr=0.1))
    run(model, optimizer, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for key in ("tokens", "lifetime", "pending_tokens", "lived_tokens"):
            del group[key]
    other = Continuum(torch.optim.SGD(groups_of(model), lr=0.1))
    other.load_state_dict(old)
    before = model[2].weight.detach().clone()
    run(model, other, 1, 3)
    assert not torch.equal(before, model[2].weight)


def test_the_sum_of_a_chunk_must_be_finite_and_then_so_is_its_mean():
    def step(size):
        param = torch.nn.Parameter(torch.zeros(8, 8))
        optimizer = deepopt.Continuum(deepopt.DeepMomentum([param], path="matrix"), chunk=4)
        for _ in range(4):
            param.grad = torch.full((8, 8), size)
            optimizer.step()
        return param

    assert step(8e37).isfinite().all()
    assert not step(1e38).isfinite().any()  # as documented
