import dataclasses

import pytest
import torch

from deepopt.memory import Horizons, Linear
from deepopt.memory.horizons import width
from deepopt.meta import tasks
from deepopt.meta.tasks import KINDS, draw
from deepopt.meta.training import train


def candidates(count):
    generator = torch.Generator().manual_seed(0)
    phis = torch.randn(count, 3, width(2), generator=generator).abs()
    phis[0] = 0.0
    return phis


def small(task):
    return dataclasses.replace(task, dim=16, batch_size=min(task.batch_size, 64), layers=1)


MEMORY = Horizons((0.5,), torch.zeros(3, width(2)).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_do_not_see_one_another(kind):
    tasks._hope_of.cache_clear()  # the model must be made outside of vmap
    task, phis = small(draw(KINDS.index(kind), (12, 12), (kind,))), candidates(3)
    together = train(task, MEMORY, 0.02, phis=phis)
    alone = torch.cat([train(task, MEMORY, 0.02, phis=phi[None]) for phi in phis])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.unique().numel() > 1


@pytest.mark.parametrize("seed", [1, 2, 5])
def test_the_candidate_of_zeros_is_the_linear_memory(seed):
    task = draw(seed, (12, 12))
    ours, theirs = train(task, MEMORY, 0.02, phis=candidates(1)), train(task, Linear(), 0.02)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_is_learned(kind):
    task = small(draw(1, (40, 40), (kind,)))
    batch = task.batch(0)
    first = task.loss(task.weights(), batch).log().item()
    assert train(task, Linear(), 0.03).item() < first - 0.01


def test_a_run_that_is_not_finite_is_the_worst():
    task = draw(0, (10, 10))
    assert train(task, Linear(), float("inf")).item() == pytest.approx(6.9, abs=0.1)
