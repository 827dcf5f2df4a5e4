"""What torch asks of an optimizer, over every memory."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import deepopt
from deepopt import memory as memories
from deepopt.memory import BUILT_IN, Covariance


@pytest.fixture(params=BUILT_IN)
def memory(request):
    return request.param


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)
    )
    return model.to(dtype)


def run(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [param.detach().clone() for param in model.parameters()]


def moved(model, before):
    return all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seen", [1, 3])
def test_training_resumes_from_disk_bit_for_bit(memory, dtype, seen):
    model = make_model(dtype)
    optimizer = deepopt.DeepMomentum(model.parameters(), memory=memory)
    before = [p.detach().clone() for p in model.parameters()]
    run(model, optimizer, seen)
    assert moved(model, before)
    saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    expected = run(model, optimizer, 12, first=seen)

    fresh = make_model(dtype, seed=1)
    fresh.load_state_dict(saved["model"])
    resumed = deepopt.DeepMomentum(fresh.parameters(), memory=memory, lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    assert_same(run(fresh, resumed, 12, first=seen), expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_continues_as_the_original_does(memory, copier):
    model = make_model()
    optimizer = deepopt.DeepMomentum(
        model.named_parameters(), memory=memory, maximize=True, ns_steps=3
    )
    run(model, optimizer, 3)
    model2, optimizer2 = copier((model, optimizer))
    assert repr(optimizer2) == repr(optimizer)
    assert_same(run(model2, optimizer2, 8, first=3), run(model, optimizer, 8, first=3))


def test_loading_shares_no_storage_with_what_was_loaded():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters())
    run(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = make_model()
    loaded = deepopt.DeepMomentum(other.parameters())
    loaded.load_state_dict(saved)
    run(other, loaded, 2)
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(saved["state"][index][key], value)


def test_state_is_float32_under_bfloat16_parameters_also_after_loading(memory):
    model = make_model(torch.bfloat16)
    optimizer = deepopt.DeepMomentum(model.parameters(), memory=memory)
    run(model, optimizer, 2)
    optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    run(model, optimizer, 1)
    for state in optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_small_updates_of_bfloat16_parameters_are_not_lost_in_the_state():
    param = nn.Parameter(torch.zeros(32, 32, dtype=torch.bfloat16))
    optimizer = deepopt.DeepMomentum([param], memory="linear")
    param.grad = torch.ones(32, 32, dtype=torch.bfloat16)
    for _ in range(300):
        optimizer.step()
    assert optimizer.state[param]["step"] == 300
    torch.testing.assert_close(optimizer.state[param]["momentum"], torch.ones(1, 32, 32))


def test_a_saved_state_holds_plain_data_and_tensors_alone(memory):
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.named_parameters(), memory=memory)
    run(model, optimizer, 1)
    saved = through_disk(optimizer.state_dict())
    assert saved["param_groups"][0]["memory"].lower().startswith(memory)
    assert saved["param_groups"][0]["param_names"][0] == "0.weight"


def refuses(optimizer, given, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(given)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][index][key], value)


def test_foreign_checkpoints_are_refused_and_change_nothing():
    def trained(make, model):
        optimizer = make(model.parameters())
        run(model, optimizer, 1)
        return optimizer

    optimizer = trained(lambda p: deepopt.DeepMomentum(p, memory="covariance"), make_model())
    refuses(optimizer, trained(torch.optim.AdamW, make_model()).state_dict(), "expected step")
    delta = trained(lambda p: deepopt.DeepMomentum(p, memory="delta"), make_model())
    refuses(optimizer, delta.state_dict(), r"memory is Delta\(rate=0.3\).*make the optimizer with")
    other = trained(lambda p: deepopt.DeepMomentum(p, memory=Covariance(power=0.3)), make_model())
    refuses(optimizer, other.state_dict(), "power=0.3")
    missing = optimizer.state_dict()
    missing["state"] = {0: {"step": torch.tensor(1.0)}}
    refuses(optimizer, missing, "parameter number 0 does not fit its matrix path")
    fewer = optimizer.state_dict()
    fewer["param_groups"] = [{**fewer["param_groups"][0], "params": [0]}]
    refuses(optimizer, fewer, "doesn't match the size of optimizer's group")
    two = optimizer.state_dict()
    two["param_groups"] *= 2
    refuses(optimizer, two, "different number of parameter groups")


def test_checkpoints_without_a_newer_flag_load():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters())
    run(model, optimizer, 1)
    old = optimizer.state_dict()
    for key in ("rms_cap", "fused", "path"):
        del old["param_groups"][0][key]
    optimizer.load_state_dict(old)
    run(model, optimizer, 1)
    assert optimizer.param_groups[0]["rms_cap"] == 1.5


def test_an_unstepped_optimizer_saves_and_loads():
    optimizer = deepopt.DeepMomentum(make_model().parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer.state


def test_load_hooks_of_the_user_take_part():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters())
    run(model, optimizer, 1)
    seen = []

    def double(_, state_dict):
        state = {i: {**s, "step": s["step"] + 1} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[model[0].weight]["step"].item())
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [2.0]


def test_parameters_without_gradient_get_no_state_and_do_not_move(memory):
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters(), memory=memory, weight_decay=0.5)
    frozen = model[2].weight.requires_grad_(False)
    before = frozen.clone()
    run(model, optimizer, 2)
    assert torch.equal(frozen, before)
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    run(model, optimizer, 2)
    assert optimizer.state[frozen]["step"] == 2
    assert optimizer.state[model[0].weight]["step"] == 4


def test_a_parameter_that_skips_a_step_is_as_if_stepped_alone(memory):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.zeros(32, 32)) for _ in range(3)]
    alone = [nn.Parameter(torch.zeros(32, 32)) for _ in range(3)]
    together = deepopt.DeepMomentum(params, memory=memory)
    apart = [deepopt.DeepMomentum([p], memory=memory) for p in alone]
    for step in range(9):
        for index, (p, q) in enumerate(zip(params, alone, strict=True)):
            grad = torch.randn(32, 32, generator=generator)
            skip = (step + index) % 3 == 0
            p.grad, q.grad = (None, None) if skip else (grad, grad.clone())
        together.step()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-6, rtol=1e-4)


def test_groups_have_their_own_values():
    slow, fast, up = (nn.Parameter(torch.zeros(32, 32)) for _ in range(3))
    optimizer = deepopt.DeepMomentum(
        [
            {"params": [slow], "lr": 1e-4, "memory": "linear"},
            {"params": [fast], "lr": 1e-2, "memory": "delta"},
            {"params": [up], "maximize": True, "path": "elementwise"},
        ]
    )
    for param in (slow, fast, up):
        param.grad = torch.eye(32) + 0.1
    optimizer.step()
    assert "norm" in optimizer.state[fast]
    assert "norm" not in optimizer.state[slow]
    assert "exp_avg" in optimizer.state[up]
    assert fast.norm() > 50 * slow.norm() > 0
    assert up.min() > 0
    assert slow.trace() < 0


def test_maximize_is_descent_on_the_negative_gradient(memory):
    def final(sign, **arguments):
        param = nn.Parameter(torch.zeros(24, 32))
        optimizer = deepopt.DeepMomentum([param], memory=memory, **arguments)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            param.grad = sign * torch.randn(24, 32, generator=generator)
            optimizer.step()
        return param.detach()

    assert torch.equal(final(-1.0), final(1.0, maximize=True))


def test_groups_can_be_added_in_mid_run():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model[0].parameters())
    run(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
    before = model[2].weight.detach().clone()
    run(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_rate_of_zero_moves_nothing_and_makes_all_state(memory, lr):
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters(), lr=lr, memory=memory)
    before = [p.detach().clone() for p in model.parameters()]
    assert_same(run(model, optimizer, 2), before)
    assert len(optimizer.state) == len(before)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_rate_is_the_same_as_a_float(memory, shape):
    model, other = make_model(), make_model()
    tensor, number = torch.full(shape, 3e-3), 3e-3
    before = [p.detach().clone() for p in model.parameters()]
    found = run(model, deepopt.DeepMomentum(model.parameters(), tensor, memory=memory), 4)
    expected = run(other, deepopt.DeepMomentum(other.parameters(), number, memory=memory), 4)
    assert moved(model, before)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_never_written_to(memory):
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters(), memory=memory, maximize=True)
    model(torch.randn(8, 16)).square().mean().backward()
    versions = [p.grad._version for p in model.parameters()]
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert versions == [p.grad._version for p in model.parameters()]
    assert_same([p.grad for p in model.parameters()], before)


def test_closures_are_run_with_gradients_and_their_loss_is_returned():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 16)).square().mean()
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    assert isinstance(optimizer.step(closure), torch.Tensor)
    assert moved(model, before)
    assert optimizer.step() is None


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=6),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ],
)
def test_schedulers_drive_the_rate_and_the_momentum(make):
    model = make_model()
    optimizer = deepopt.DeepMomentum(deepopt.param_groups(model))
    scheduler = make(optimizer)
    twin = make_model()
    manual = deepopt.DeepMomentum(deepopt.param_groups(twin))
    for step in range(5):
        for theirs, ours in zip(optimizer.param_groups, manual.param_groups, strict=True):
            ours.update(lr=theirs["lr"], betas=theirs["betas"])
        expected = run(twin, manual, 1, first=step)
        assert_same(run(model, optimizer, 1, first=step, scheduler=scheduler), expected)
    assert optimizer.param_groups[0]["lr"] != optimizer.defaults["lr"]


@pytest.mark.parametrize(("key", "value"), [("lr", 1e-2), ("betas", (0.5, 0.9))])
def test_a_value_that_changes_in_mid_run_counts_from_then_on(memory, key, value):
    def final(change):
        param = nn.Parameter(torch.zeros(24, 32))
        optimizer = deepopt.DeepMomentum([param], memory=memory)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            if step == 2 and change:
                optimizer.param_groups[0][key] = value
            param.grad = torch.randn(24, 32, generator=generator)
            optimizer.step()
        return param.detach()

    assert (final(True) - final(False)).norm() > 0.05 * final(False).norm()


def test_a_sparse_gradient_is_refused_before_any_parameter_moves():
    dense, sparse = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(4, 3))
    optimizer = deepopt.DeepMomentum([{"params": [dense]}, {"params": [sparse]}])
    dense.grad = torch.randn(32, 32)
    sparse.grad = torch.eye(4, 3).to_sparse()
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match="DeepMomentum does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, before)


def test_distributed_matrices_are_refused_and_their_elements_stepped(tmp_path):
    distributed = pytest.importorskip("torch.distributed.tensor")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))

        def sharded(tensor):
            return distributed.distribute_tensor(tensor, mesh, [distributed.Shard(0)])

        plain = nn.Parameter(torch.randn(32, 32))
        param = nn.Parameter(sharded(plain.detach().clone()))
        plain.grad = torch.randn(32, 32)
        param.grad = sharded(plain.grad)
        with pytest.raises(RuntimeError, match=r"DTensor .* path='elementwise'"):
            deepopt.DeepMomentum([param]).step()
        for each in (plain, param):
            deepopt.DeepMomentum([each], path="elementwise").step()
        torch.testing.assert_close(param.full_tensor(), plain)
    finally:
        torch.distributed.destroy_process_group()


def test_grad_scaler_skips_a_step_with_infinite_gradients():
    model = make_model()
    optimizer = deepopt.DeepMomentum(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(2, 16)).mean()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same([p.detach() for p in model.parameters()], before)
    assert not optimizer.state
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(2, 16)).mean()).backward()
    scaler.step(optimizer)
    assert moved(model, before)


def test_empty_and_scalar_parameters_are_stepped():
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(0, 40), (40, 0), (), (1,)]]
    optimizer = deepopt.DeepMomentum(
        [{"params": params[:2], "path": "matrix"}, {"params": params[2:]}]
    )
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert params[2] < 0
    assert params[3] < 0


def test_one_optimizer_per_parameter_equals_one_for_all(memory):
    """As when the optimizer runs inside the backward pass."""
    joint, split = make_model(), make_model()
    expected = run(joint, deepopt.DeepMomentum(joint.named_parameters(), memory=memory), 4)
    optimizers = {
        p: deepopt.DeepMomentum([(n, p)], memory=memory) for n, p in split.named_parameters()
    }
    for step in range(4):
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        split.zero_grad()
        split(inputs).square().mean().backward()
        for optimizer in optimizers.values():
            optimizer.step()
    for ours, theirs in zip(split.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, atol=1e-6, rtol=1e-4)


def test_a_memory_that_fails_leaves_the_optimizer_as_it_was():
    class Failing(Covariance):
        def write(self, state, grad, retention):
            super().write(state, grad, retention)
            if state["step"][0] == 2:
                raise ArithmeticError("on purpose")

    param = nn.Parameter(torch.zeros(24, 32))
    optimizer = deepopt.DeepMomentum([param], memory=Failing())
    param.grad = torch.randn(24, 32)
    optimizer.step()
    before = copy.deepcopy((param.detach(), dict(optimizer.state[param])))
    with pytest.raises(ArithmeticError, match="on purpose"):
        optimizer.step()
    assert torch.equal(param, before[0])
    for key, value in before[1].items():
        assert torch.equal(optimizer.state[param][key], value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"init": lambda self, like: {"momentum": torch.zeros_like(like), "n": 0}},
            "state 'n' must",
        ),
        ({"init": lambda self, like: {"momentum": torch.zeros(5)}}, "leading size 1"),
        ({"read": lambda self, state, grad, retention: grad.mT}, r"read \(1, 32, 24\)"),
        (
            {"write": lambda self, state, grad, retention: state.update(momentum=grad[:, :1])},
            "cannot become one of",
        ),
        (
            {"write": lambda self, state, grad, retention: state.update(more=grad)},
            "not made by init",
        ),
    ],
)
def test_a_memory_that_breaks_its_promises_is_named_and_can_be_replaced(broken, message):
    bad = type("Bad", (type(memories.resolve("linear")),), broken)()
    param = nn.Parameter(torch.zeros(24, 32))
    optimizer = deepopt.DeepMomentum([param], memory=bad)
    param.grad = torch.randn(24, 32)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not param.any()
    optimizer.param_groups[0]["memory"] = "linear"
    optimizer.step()
    assert param.all()
