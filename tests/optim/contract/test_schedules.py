"""Learning rate schedules and averages of weights."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import deepopt
from tests.optim.contract.helpers import (
    EXPECTED_WARNINGS,
    assert_near,
    assert_same,
    every_class,
    make_model,
    run,
    values,
)

pytestmark = EXPECTED_WARNINGS


@every_class
@pytest.mark.parametrize(
    "make",
    [
        lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=6),
        lambda o: CosineAnnealingLR(o, 6),
        lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: SWALR(o, swa_lr=1e-4, anneal_epochs=3),
    ],
    ids=["OneCycleLR", "CosineAnnealingLR", "LambdaLR", "SWALR"],
)
def test_schedulers_drive_the_rate_and_the_momentum(cls, make):
    model, twin = make_model(), make_model()
    optimizer = cls(deepopt.param_groups(model))
    manual = cls(deepopt.param_groups(twin))
    scheduler = make(optimizer)
    for step in range(5):
        for theirs, ours in zip(optimizer.param_groups, manual.param_groups, strict=True):
            ours.update(lr=theirs["lr"], betas=theirs["betas"])
        expected = run(twin, manual, 1, first=step)
        assert_same(run(model, optimizer, 1, first=step, scheduler=scheduler), expected)
    assert optimizer.param_groups[0]["lr"] != optimizer.defaults["lr"]


@every_class
def test_a_scheduler_fills_a_tensor_rate_in_place(cls):
    model, lr = make_model(), torch.tensor(1e-2)
    optimizer = cls(model.parameters(), lr=lr)
    run(model, optimizer, 2, scheduler=LambdaLR(optimizer, lambda step: 0.5**step))
    assert optimizer.param_groups[0]["lr"] is lr or lr == 1e-2
    torch.testing.assert_close(optimizer.param_groups[0]["lr"], torch.tensor(2.5e-3))


@every_class
def test_averages_of_weights_follow_the_run(cls):
    model = make_model()
    optimizer = cls(model.parameters())
    mean = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    snapshots = []
    for step in range(3):
        snapshots.append(run(model, optimizer, 1, first=step))
        mean.update_parameters(model)
        ema.update_parameters(model)
    assert_near(
        values(mean.module.parameters()),
        [torch.stack(each).mean(0) for each in zip(*snapshots, strict=True)],
    )
    assert_near(
        values(ema.module.parameters()),
        [0.25 * a + 0.25 * b + 0.5 * c for a, b, c in zip(*snapshots, strict=True)],
    )
