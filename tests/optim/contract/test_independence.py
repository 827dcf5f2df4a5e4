"""No parameter depends on which others are stepped beside it, nor on their group."""

import pytest
import torch
from torch import nn

from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    backward,
    every,
    every_class,
    feed,
    gradient_stream,
    make_model,
    moved,
    run,
    start_values,
    values,
)

pytestmark = EXPECTED_WARNINGS


@every
def test_parameters_without_gradient_get_no_state_and_do_not_move(cls, options):
    model = make_model()
    optimizer = cls(model.parameters(), **{**options, "weight_decay": 0.5})
    frozen = model[2].weight.requires_grad_(False)
    before = frozen.clone()
    run(model, optimizer, 2)
    assert torch.equal(frozen, before)
    assert not optimizer.state.get(frozen)
    frozen.requires_grad_(True)
    run(model, optimizer, 2)
    assert optimizer.state[frozen]["step"] == 2
    assert optimizer.state[model[0].weight]["step"] == 4


@every
def test_a_parameter_that_skips_steps_is_as_if_stepped_alone(cls, options):
    shapes = [(20, 24), (20, 24), (20, 24), (7,), (7,)]
    params = [nn.Parameter(value) for value in start_values(shapes)]
    alone = [nn.Parameter(value) for value in start_values(shapes)]
    together = cls(params, **options)
    apart = [cls([param], **options) for param in alone]
    for step, grads in enumerate(gradient_stream(shapes, 9)):
        for index, (p, q, grad) in enumerate(zip(params, alone, grads, strict=True)):
            p.grad = q.grad = None if (step + index) % 3 == 0 else grad
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert_near(values(params), values(alone))


@every
def test_one_optimizer_per_parameter_in_the_backward_pass_equals_one_for_all(cls, options):
    joint, split = make_model(), make_model()
    expected = run(joint, cls(joint.named_parameters(), **options), 4)
    inner = {p: cls([(n, p)], **options) for n, p in split.named_parameters()}

    def step(param):
        inner[param].step()
        inner[param].zero_grad()

    for param in split.parameters():
        param.register_post_accumulate_grad_hook(step)
    for index in range(4):
        backward(split, index)
    assert_near(values(split.parameters()), expected)


@every_class
def test_groups_have_their_own_values(cls):
    slow, fast, up = (nn.Parameter(torch.zeros(32, 32)) for _ in range(3))
    groups = [
        {"params": [slow], "lr": 1e-5},
        {"params": [fast], "lr": 1e-2},
        {"params": [up], "maximize": True},
    ]
    optimizer = cls(groups, weight_decay=0)
    feed(optimizer, [slow, fast, up], [[torch.eye(32) + 0.1] * 3])
    assert fast.norm() > 50 * slow.norm() > 0
    assert up.trace() > 0 > fast.trace()


@every
def test_groups_can_be_added_in_mid_run(cls, options):
    model = make_model()
    optimizer = cls(model[0].parameters(), **options)
    run(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
    before = values(model[2].parameters())
    run(model, optimizer, 2)
    assert moved(model[2].parameters(), before)
    assert optimizer.state[model[2].weight]["step"] == 2


@every_class
@pytest.mark.parametrize(("key", "value"), [("lr", 1e-1), ("betas", (0.5, 0.9))])
def test_a_value_that_changes_in_mid_run_counts_from_then_on(cls, key, value):
    def final(change):
        param = nn.Parameter(torch.zeros(24, 32))
        optimizer = cls([param])
        for step, grads in enumerate(gradient_stream([(24, 32)], 4)):
            if step == 2 and change:
                optimizer.param_groups[0][key] = value
            feed(optimizer, [param], [grads])
        if key == "betas" and set(optimizer.state[param]) == {"step"}:
            pytest.skip("an optimizer that keeps no averages has no use for betas")
        return param.detach()

    assert (final(True) - final(False)).norm() > 0.02 * final(False).norm()
