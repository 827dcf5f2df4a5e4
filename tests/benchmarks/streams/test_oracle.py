import pytest
import torch

from benchmarks.streams import command, runs
from benchmarks.streams.oracle import Oracle
from benchmarks.streams.tasks import TASKS
from deepopt.memory import Linear

BETA = 0.8


def reads(memory, grads):
    """What the memory reads at every step."""
    state = memory.init(grads[0])
    found = []
    for step, grad in enumerate(grads, 1):
        state["step"] = torch.full((len(grad),), float(step))  # as the optimizer adds it
        memory.write(state, grad, BETA)
        found.append(memory.read(state, grad, BETA).clone())
    return found


def gradients(steps):
    return torch.randn(steps, 2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("regime", [0, 1, 2])
def test_told_the_regime_it_is_the_linear_memory_of_that_regime_alone(regime):
    grads = gradients(18)
    own = [step for step in range(18) if step // 2 % 3 == regime]
    every = reads(Oracle(period=2, regimes=3), grads)
    alone = reads(Linear(), grads[own])
    torch.testing.assert_close([every[step] for step in own], alone)


@pytest.mark.parametrize("place", range(6))
def test_told_the_step_it_is_the_linear_memory_of_that_step_of_all_visits(place):
    grads = gradients(18)
    every = reads(Oracle(period=2, regimes=3, by_step=True), grads)
    torch.testing.assert_close(every[place::6], reads(Linear(), grads[place::6]))


def test_an_oracle_is_tried_on_streams_and_not_where_nothing_switches():
    for name, task in TASKS.items():
        tried = {optimizer for optimizer, _ in command.contenders(name)}
        assert tried & set(runs.ORACLES) == (set(runs.ORACLES) if task.period else set())


def test_every_oracle_is_told_what_its_name_says():
    told = [runs.memory(runs.Run("digits", name, 0.9, 0.01, 0)) for name in runs.ORACLES]
    assert told == [Oracle(50, 5), Oracle(50, 5, by_step=True)]
