import dataclasses

import pytest
import torch

from deepopt.meta.tasks import KINDS, REGIMES, USUAL_KINDS, draw


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_function_of_the_seed_and_the_step(kind, seed):
    task = draw(seed, kinds=(kind,))
    for ours, theirs in zip(task.batch(3), draw(seed, kinds=(kind,)).batch(3), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(task.batch(3)[0], task.batch(4)[0])
    other = dataclasses.replace(task, seed=seed + 6)
    assert not torch.equal(task.batch(3)[0], other.batch(3)[0])


def test_streams_and_steady_tasks_of_every_kind_come_by_turns():
    tasks = [draw(seed) for seed in range(12)]
    assert [task.kind for task in tasks[::2]] == [*USUAL_KINDS, *USUAL_KINDS]
    assert {draw(seed, kinds=KINDS).kind for seed in range(12)} == {*KINDS}
    assert all(bool(task.period) == (task.seed % 2 == 0) for task in tasks)
    assert all(100 <= task.steps <= 200 for task in tasks)


def test_a_stream_switches_after_its_period_and_its_regimes_recur():
    """The answers to one question, in one regime after the other."""
    task = next(task for task in map(draw, range(0, 60, 2)) if task.kind == "regression")
    x = torch.randn(5, task.dim)

    def answers(step):
        first, second = task._teacher(step // task.period % REGIMES)
        return torch.tanh(2 * x @ first) @ second

    assert torch.equal(answers(0), answers(task.period - 1))
    assert not torch.equal(answers(0), answers(task.period))
    assert torch.equal(answers(0), answers(REGIMES * task.period))


def test_a_stream_keeps_its_rate_and_a_steady_task_ends_at_none():
    stream, steady = draw(0), draw(1)
    assert stream.rate(stream.steps - 1) == 1.0
    assert steady.rate(steady.steps - 1) < 0.02
    assert max(map(steady.rate, range(steady.steps))) <= 1.0


@pytest.mark.parametrize("kind", ["images", "hope"])
def test_the_scale_of_the_matrices_changes_their_gradients_and_not_the_function(kind):
    plain = dataclasses.replace(draw(0, kinds=(kind,)), layers=2)
    tasks = [dataclasses.replace(plain, scale=scale) for scale in (1.0, 2.0)]
    weights = [task.weights() for task in tasks]
    ratios = (weights[1]["matrices"] / weights[0]["matrices"])[:, :1, :1]
    torch.testing.assert_close(ratios.flatten()[[0, -1]], torch.tensor([0.5, 2.0]))
    found = []
    for task, params in zip(tasks, weights, strict=True):
        # Heads of zeros let no gradient through.
        heads = [name for name in params if name.startswith("head")]
        params |= {name: torch.ones_like(params[name]).cumsum(0) for name in heads}
        found.append(torch.func.grad_and_value(task.loss)(params, task.batch(0)))
    (first, loss), (second, same_loss) = found
    torch.testing.assert_close(loss, same_loss)
    scaled = ratios * second["matrices"]
    torch.testing.assert_close(first["matrices"], scaled, rtol=1e-3, atol=1e-6)
    assert first["matrices"].abs().max() > 1e-4


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_an_answer_of_zeros(kind, seed):
    task = draw(seed, kinds=(kind,))
    batch = task.batch(0)
    loss = task.loss(task.weights(), batch).item()
    classes = {"classification": 10.0, "images": 10.0, "language": 32.0, "hope": 32.0}
    if task.kind == "regression":
        assert loss == pytest.approx(batch[1].square().mean().item())
    else:
        assert loss == pytest.approx(torch.tensor(classes[task.kind]).log().item(), rel=1e-5)
