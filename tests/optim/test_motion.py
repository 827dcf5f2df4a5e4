import copy
import re

import pytest
import torch
from torch import nn

import deepopt
from deepopt import Motion

OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "DeepMomentum": lambda params: deepopt.DeepMomentum(params, lr=1e-2),
    "M3": lambda params: deepopt.M3(params, lr=1e-2),
}


def made(make=OPTIMIZERS["DeepMomentum"], **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 20)).double()
    optimizer = make(model.parameters())
    return model, optimizer, Motion(optimizer, **options)


def loss(model, step):
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x.flip(-1)).square().mean()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def parameters(model):
    return [param.detach().clone() for param in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_taken_ahead_and_the_average_is_behind_as_the_formulas_say(name):
    """The same loop with weights, motion and average kept apart."""
    gamma, ahead, steps, rates = 0.9, 3.0, 7, [1e-2, 2e-2, 2e-2, 1e-2, 1e-2, 5e-3, 4e-3]
    model, optimizer, motion = made(OPTIMIZERS[name], retention=gamma, ahead=ahead)
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        train(model, optimizer, 1, step)
    found = parameters(model)
    motion.eval()
    averaged = parameters(model)

    model = made(OPTIMIZERS[name])[0]
    plain = OPTIMIZERS[name](model.parameters())
    params = list(model.parameters())
    weights, average = parameters(model), parameters(model)
    memory = [torch.zeros_like(weight) for weight in weights]
    offset = 0.0
    for step in range(steps):
        for param, weight, moved in zip(params, weights, memory, strict=True):
            param.data = weight + offset * moved
        plain.zero_grad()
        loss(model, step).backward()
        for param, weight in zip(params, weights, strict=True):
            param.data = weight.clone()
        plain.param_groups[0]["lr"] = rates[step]
        plain.step()
        for i, param in enumerate(params):
            memory[i] = gamma * memory[i] + (1 - gamma) * (param.detach() - weights[i])
            weights[i] = param.detach().clone()
            average[i] = gamma * average[i] + (1 - gamma) * weights[i]
        offset = ahead * rates[step] / max(rates[: step + 1])
    expected = [weight + offset * moved for weight, moved in zip(weights, memory, strict=True)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(averaged, average)


def test_evaluation_and_training_can_be_switched_at_any_time_and_in_any_order():
    model, optimizer, motion = made()
    motion.eval()
    motion.train()
    train(model, optimizer, 3)
    before = parameters(model)
    optimizer.param_groups[0]["lr"] *= 0.5  # as a scheduler does
    for switch in (motion.eval, motion.eval, motion.train, motion.train):
        switch()
    torch.testing.assert_close(parameters(model), before)
    motion.eval()
    assert not torch.allclose(parameters(model)[0], before[0])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_from_what_was_saved_in_either_mode(name, mode, tmp_path):
    model, optimizer, motion = made(OPTIMIZERS[name])
    train(model, optimizer, 4)
    getattr(motion, mode)()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    other, resumed, again = made(OPTIMIZERS[name])
    for part, saved in zip((other, resumed), torch.load(tmp_path / "saved.pt"), strict=True):
        part.load_state_dict(saved)
    motion.train()
    again.train()
    for each, its in ((model, optimizer), (other, resumed)):
        train(each, its, 4, 4)
    assert all(map(torch.equal, parameters(model), parameters(other)))


@pytest.mark.parametrize("average", [0.0, 1.0])
def test_a_step_after_eval_is_refused_and_moves_nothing(average):
    model, optimizer, motion = made(average=average)
    train(model, optimizer, 2)
    motion.eval()
    before = parameters(model)
    with pytest.raises(RuntimeError, match=r"call Motion.train\(\)"):
        train(model, optimizer, 1)
    assert all(map(torch.equal, parameters(model), before))


def test_a_closure_is_evaluated_ahead_of_the_weights():
    def with_closure(model, optimizer, step):
        def closure():
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            return value

        return optimizer.step(closure)

    model, optimizer, _ = made(retention=0.5)
    other, again, _ = made(retention=0.5)
    for step in range(4):
        expected = loss(other, step).item()
        train(other, again, 1, step)
        assert with_closure(model, optimizer, step).item() == pytest.approx(expected)
    torch.testing.assert_close(parameters(model), parameters(other))


def test_without_a_look_ahead_the_steps_are_those_of_the_optimizer_alone():
    model, optimizer, motion = made(ahead=0)
    train(model, optimizer, 5)
    alone = made()[0]
    train(alone, OPTIMIZERS["DeepMomentum"](alone.parameters()), 5)
    assert all(map(torch.equal, parameters(model), parameters(alone)))
    motion.eval()
    assert not torch.equal(parameters(model)[0], parameters(alone)[0])


def test_a_parameter_that_stops_getting_gradients_comes_to_rest_like_one_with_zero_gradients():
    def run(freeze):
        torch.manual_seed(0)
        param = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([param], lr=0.1)
        motion = Motion(optimizer, retention=0.9)
        for step in range(40):
            param.grad = torch.ones_like(param) if step < 5 else freeze(param)
            optimizer.step()
        found = param.detach().clone()
        motion.eval()
        return found, param.detach()

    frozen, zero = run(lambda param: None), run(torch.zeros_like)
    torch.testing.assert_close(frozen, zero)
    torch.testing.assert_close(zero[0], torch.full_like(zero[0], 0.5), atol=0.1, rtol=0)


def test_an_optimizer_that_evaluates_its_closure_while_it_moves_steps_as_it_does_alone():
    def run(join):
        param = nn.Parameter(torch.arange(1.0, 6.0, dtype=torch.float64))
        optimizer = torch.optim.LBFGS([param], lr=0.5, max_iter=20)
        if join:
            Motion(optimizer, ahead=0)

        def closure():
            optimizer.zero_grad()
            value = (torch.arange(1.0, 6.0) * param.square() - param).sum()
            value.backward()
            return value

        for _ in range(2):
            optimizer.step(closure)
        return param.detach()

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_a_subclass_whose_step_calls_its_parents_is_joined_once():
    class Wrapped(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)  # from here on torch hooks both steps
    param = nn.Parameter(torch.ones(1))
    optimizer = Wrapped([param], lr=0.1)
    Motion(optimizer, retention=0.5, ahead=2)
    for _ in range(2):
        param.grad = torch.ones(1)
        optimizer.step()
    memory = 0.5 * 0.5 * -0.1 + 0.5 * -0.1
    torch.testing.assert_close(param.detach(), torch.tensor([0.8 + 2 * memory]))


def test_training_goes_on_after_a_step_that_raised():
    model, optimizer, _ = made()
    train(model, optimizer, 3)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    train(model, optimizer, 1, 3)
    assert all(param.isfinite().all() for param in parameters(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("memory", "found"),
    [
        (torch.ones(3, dtype=torch.float64), r"\(3,\), torch\.float64 on cpu"),
        (torch.ones(24), r"\(24,\), torch\.float32 on cpu"),
        (torch.ones(24, dtype=torch.float64, device="meta"), "on meta"),
        (torch.eye(24, dtype=torch.float64)[0].to_sparse(), "on cpu as torch.sparse_coo"),
        (None, "None"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_before_anything_moves(name, memory, found):
    model, optimizer, motion = made(OPTIMIZERS[name])
    train(model, optimizer, 3)
    kept, before = optimizer.state[model[0].bias]["motion"], parameters(model)
    optimizer.state[model[0].bias]["motion"] = memory
    for act in (optimizer.step, motion.eval, motion.train, lambda: optimizer.step(lambda: 1.0)):
        with pytest.raises(
            RuntimeError, match=rf"state 'motion' of .*1.* must be .*\(24,\).*{found}"
        ):
            act()
        assert all(map(torch.equal, parameters(model), before))
    optimizer.state[model[0].bias]["motion"] = kept
    train(model, optimizer, 2, 3)
    other, plain, _ = made(OPTIMIZERS[name])
    train(other, plain, 5)
    assert all(map(torch.equal, parameters(model), parameters(other)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_with_several_entries_in_one_place_is_refused_before_anything_moves(name):
    model, optimizer, motion = made(OPTIMIZERS[name])
    train(model, optimizer, 3)
    weight = model[2].weight
    kept, weight.data = weight.data, weight.data[:, :1].expand(20, 24)
    before = parameters(model)
    for act in (optimizer.step, motion.eval, motion.train, lambda: optimizer.step(lambda: 1.0)):
        with pytest.raises(RuntimeError, match=r"number 2 cannot be moved: its strides \(24, 0\)"):
            act()
        assert all(map(torch.equal, parameters(model), before))
    weight.data = kept
    train(model, optimizer, 2, 3)
    other, plain, _ = made(OPTIMIZERS[name])
    train(other, plain, 5)
    assert all(map(torch.equal, parameters(model), parameters(other)))


def test_a_parameter_without_a_gradient_gets_no_memory_and_stays():
    model, optimizer, motion = made()
    model[2].requires_grad_(False)
    before = parameters(model)
    train(model, optimizer, 3)
    motion.eval()
    assert all(map(torch.equal, parameters(model)[2:], before[2:]))
    assert model[2].weight not in optimizer.state


def test_a_step_that_a_scaler_skips_leaves_the_memory_alone():
    torch.manual_seed(0)
    model = nn.Linear(20, 20)
    optimizer = deepopt.DeepMomentum(model.parameters(), lr=1e-2, fused=True)
    Motion(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(2, 20)) * factor).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        return copy.deepcopy(optimizer.state[model.weight]["motion"])

    kept = step(1.0)
    assert kept.any()
    before = parameters(model)
    assert torch.equal(step(float("inf")), kept)
    torch.testing.assert_close(parameters(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": 1.0}, "Invalid retention: 1.0"),
        ({"ahead": -1.0}, "Invalid ahead: -1.0"),
        ({"ahead": float("inf")}, "Invalid ahead: inf"),
        ({"average": 1.5}, "Invalid average: 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


@pytest.mark.parametrize("name", ["retention", "ahead", "average"])
@pytest.mark.parametrize("value", ["0.5", None, True, [0.5]])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=re.escape(f"Invalid {name}: {value!r} is not a number")):
        made(**{name: value})


def test_what_it_cannot_serve_is_refused():
    param = nn.Parameter(torch.zeros(20, 20))
    with pytest.raises(TypeError, match=r"is not a torch\.optim\.Optimizer"):
        Motion([param])
    with pytest.raises(TypeError, match="the optimizer inside of it"):
        Motion(deepopt.Continuum(torch.optim.SGD([param], lr=0.1)))
    with pytest.raises(RuntimeError, match="has a Motion already"):
        Motion(Motion(torch.optim.SGD([param], lr=0.1)).optimizer)
    with pytest.raises(RuntimeError, match="does not support capturable=True"):
        Motion(torch.optim.AdamW([param], capturable=True))
    with pytest.raises(ValueError, match=r"one is torch\.bfloat16"):
        Motion(torch.optim.AdamW([nn.Parameter(param.bfloat16())]))
    optimizer = torch.optim.AdamW([param])
    Motion(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(param.bfloat16())]})
    with pytest.raises(ValueError, match=r"one is torch\.bfloat16"):
        optimizer.step()
