"""What the base class does beyond the contract that tests/optim/contract holds every class to."""

import contextlib
import copy
import gc
import io
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import deepopt
from deepopt import memory as memories
from deepopt.memory import BUILT_IN, Covariance
from deepopt.ops import backend

PACKAGE = Path(deepopt.__file__).parent


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
    assert saved["param_groups"][0]["memory"] == repr(deepopt.memory.resolve(memory))
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
    described = r"memory is Delta\(rate=0.3, nesterov=True\).*make the optimizer with"
    refuses(optimizer, delta.state_dict(), described)
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


def test_a_sharded_parameter_in_a_world_of_one_is_stepped_like_a_plain_one(tmp_path):
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
        for path in ("matrix", "elementwise"):
            for each in (plain, param):
                deepopt.DeepMomentum([each], path=path).step()
            torch.testing.assert_close(param.full_tensor(), plain)
    finally:
        torch.distributed.destroy_process_group()


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


def test_parameters_stepped_before_a_memory_fails_have_had_a_whole_step():
    class Failing(memories.Linear):
        def write(self, state, grad, retention):
            if grad.shape[1:] == (24, 32) and state["step"][0] == 2:
                raise ArithmeticError("on purpose")
            super().write(state, grad, retention)

    def stepped(memory, sizes):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size)) for size in sizes]
        optimizer = deepopt.DeepMomentum(params, memory=memory)
        for _ in range(2):
            for param in params:
                param.grad = torch.sin(param.detach())
            before = [param.detach().clone() for param in params]
            with contextlib.suppress(ArithmeticError):
                optimizer.step()
        return params, before, [dict(optimizer.state[param]) for param in params]

    sizes = [(20, 24), (24, 32), (28, 40)]
    params, before, states = stepped(Failing(), sizes)
    expected, _, whole = stepped("linear", sizes)
    assert torch.equal(params[0], expected[0])
    assert all(torch.equal(states[0][key], value) for key, value in whole[0].items())
    assert [float(state["step"]) for state in states] == [2.0, 1.0, 1.0]
    assert all(torch.equal(params[i], before[i]) for i in (1, 2))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"init": lambda self, like: {"momentum": torch.zeros_like(like), "n": 0}},
            "state 'n' must",
        ),
        ({"init": lambda self, like: {"momentum": torch.zeros(5)}}, "leading size 1"),
        (
            {"read": lambda self, state, grad, retention: grad.mT},
            r"shape \(1, 32, 24\) and torch\.float32 for",
        ),
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


def test_state_that_has_left_the_optimizer_is_not_kept_alive():
    params = [torch.randn(20, 24, requires_grad=True) for _ in range(2)]
    params += [torch.randn(3, requires_grad=True) for _ in range(2)]
    optimizer = deepopt.DeepMomentum(params)

    def step():
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]

    old = step()
    optimizer.state.clear()
    step()
    assert [ref() for ref in old] == [None] * len(old)


class Traced:
    """The package's own Python functions that ran, with their files; comprehensions count."""

    def __enter__(self):
        self.calls, self.files = 0, set()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def _note(self, frame, event, _):
        name = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in name.parents:
            self.calls += 1
            self.files.add(name.name)


@pytest.mark.parametrize("memory", ["linear", "delta"])
def test_a_step_on_one_matrix_is_short_enough_to_be_followed(memory):
    param = nn.Parameter(torch.randn(64, 80))
    param.grad = torch.randn(64, 80)
    optimizer = deepopt.DeepMomentum([param], memory=memory, path="matrix")
    with backend("reference"):
        for _ in range(2):  # what is made once
            optimizer.step()
        with Traced() as found:
            optimizer.step()
    assert len(found.files) <= 10, sorted(found.files)
    assert found.calls <= 60


def test_arguments_that_are_changed_in_place_count_from_then_on():
    def final(changed):
        param = nn.Parameter(torch.zeros(20, 24))
        options = {"preconditioner": "diagonal", "betas": [0.9, 0.9]}
        optimizer = deepopt.PreconditionedMomentum([param], **options)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            if step == 2 and changed:
                optimizer.param_groups[0]["betas"][1] = 0.0
            param.grad = torch.randn(20, 24, generator=generator)
            optimizer.step()
        return param.detach()

    assert not torch.equal(final(changed=True), final(changed=False))


def test_a_replaced_learning_rate_of_equal_value_has_a_derivative_of_its_own():
    lrs = [torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    param = torch.eye(3, dtype=torch.float64).requires_grad_().clone()
    optimizer = deepopt.DeltaMomentum([param], lr=lrs[0], differentiable=True)
    generator = torch.Generator().manual_seed(0)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        optimizer.step()
    (found,) = torch.autograd.grad(param.sum(), lrs[1])

    def last(rate):
        other = torch.eye(3, dtype=torch.float64)
        twin = deepopt.DeltaMomentum([other], lr=0.1)
        numbers = torch.Generator().manual_seed(0)
        for value in (0.1, rate):
            twin.param_groups[0]["lr"] = value
            other.grad = torch.randn(3, 3, dtype=torch.float64, generator=numbers)
            twin.step()
        return other.sum()

    expected = (last(0.1 + 1e-6) - last(0.1 - 1e-6)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_memory_may_be_replaced_by_one_that_refuses_to_be_compared():
    class Incomparable(memories.Linear):
        def __eq__(self, other):
            raise RuntimeError("ambiguous")

        __hash__ = None

    param = nn.Parameter(torch.zeros(20, 24))
    optimizer = deepopt.DeepMomentum([param], memory=Incomparable())
    for _ in range(2):
        optimizer.param_groups[0]["memory"] = Incomparable()
        param.grad = torch.ones(20, 24)
        optimizer.step()


def test_parameters_that_have_left_the_optimizer_are_not_kept_alive():
    old, new = (nn.Parameter(torch.randn(20, 24)) for _ in range(2))
    optimizer = deepopt.DeepMomentum([old])
    old.grad, new.grad = torch.ones(20, 24), torch.ones(20, 24)
    optimizer.step()
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": [new]})
    optimizer.step()
    kept = weakref.ref(old)
    del old
    gc.collect()
    assert kept() is None


def test_a_subclass_may_make_its_memory_from_an_argument_of_its_own():
    class Own(deepopt.DeepMomentum):
        def _memory(self, group):
            return Covariance(refresh=group.get("refresh", 10))

    optimizer = Own([nn.Parameter(torch.zeros(20, 24))])
    group = optimizer.param_groups[0]
    assert optimizer._update_rule(group)[0].refresh == 10
    group["refresh"] = 3
    assert optimizer._update_rule(group)[0].refresh == 3


@pytest.mark.parametrize("cls", [deepopt.DeepMomentum, deepopt.M3, deepopt.DMGD])
def test_a_model_in_the_place_of_its_parameters_is_refused_with_the_remedy(cls):
    with pytest.raises(TypeError, match=r"a model \(Sequential\).*deepopt.param_groups\(model\)"):
        cls(make_model())
