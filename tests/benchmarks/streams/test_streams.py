import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.quality.workload import Unavailable
from benchmarks.streams import command, runs, tasks
from benchmarks.streams.runs import Run
from benchmarks.streams.tasks import TASKS


@pytest.fixture
def short(monkeypatch):
    """The regression alone, with a short period."""
    task = dataclasses.replace(TASKS["regimes"], steps=16, period=8, rates=(0.01,))
    monkeypatch.setitem(TASKS, "regimes", task)
    monkeypatch.setattr(
        command, "CONTENDERS", (("linear", 0.9), ("M3", 0.9), ("AdamW", 0.9), ("mlp", 0.9))
    )


def available(name):
    """The data of a task, where its package is installed."""
    try:
        TASKS[name].data(0, 0)
    except Unavailable as why:
        pytest.skip(str(why))
    return TASKS[name].data


def test_text_switches_between_sources_and_english_every_fifty_steps():
    assert TASKS["text"].regimes == 2
    english = {0: False, 49: False, 50: True, 99: True, 100: False}
    for step, expected in english.items():
        tokens, _ = TASKS["text"].data(0, step)
        rows = [bytes(row.tolist()) for row in tokens.to(torch.uint8)]
        assert all((row in bytes(tasks.english().tolist())) == expected for row in rows)


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_is_a_function_of_the_seed_and_the_step(name):
    data = available(name)
    for ours, theirs in zip(data(0, 3), data(0, 3), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(data(0, 3)[0], data(1, 3)[0])
    assert not torch.equal(data(0, 3)[0], data(0, 4)[0])


def test_regimes_recur():
    assert TASKS["regimes"].regimes == 3
    first, again = tasks.teachers(0)[0 // 50 % 3], tasks.teachers(0)[150 // 50 % 3]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], tasks.teachers(0)[1][0])


def test_labels_are_wrong_in_every_other_period_alone():
    def known(step):  # a teacher's answers agree with the labels where none is wrong
        first, second = tasks.teachers(0)[0]
        x, labels = TASKS["bursts"].data(0, step)
        answers = (torch.tanh(2 * x @ first) @ second)[:, : tasks.CLASSES].argmax(-1)
        return (answers == labels).float().mean().item()

    assert TASKS["bursts"].regimes == 2
    assert [known(step) for step in (0, 49, 100)] == [1.0, 1.0, 1.0]
    # A quarter is right, and a tenth of the others by chance.
    assert known(50) == pytest.approx(0.25 + 0.075, abs=0.1)
    assert known(99) == pytest.approx(0.25 + 0.075, abs=0.1)


def test_digits_come_two_classes_at_a_time_and_all_recur():
    data = available("digits")
    assert TASKS["digits"].regimes == 5
    seen = [set(data(0, step)[1].tolist()) for step in range(0, 300, 50)]
    assert seen == [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {0, 1}]


def test_permuted_digits_have_one_order_of_pixels_per_regime_and_it_recurs(monkeypatch):
    monkeypatch.setattr(tasks, "NOISE", 0.0)
    counted = tasks.Part(torch.arange(64.0).expand(10, 64), torch.arange(10))
    monkeypatch.setattr(tasks.datasets, "digits", lambda: SimpleNamespace(train=counted))
    seen = [tasks.permuted_digits(0, step).inputs for step in (0, 49, 50, 100, 150)]
    orders = [tuple(inputs[0].tolist()) for inputs in seen]
    assert all((inputs == inputs[0]).all() for inputs in seen)
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert orders[0] == orders[1] == orders[4]
    assert len(set(orders)) == 3


def test_the_drift_goes_through_every_teacher_and_never_jumps():
    for step in (0, 50, 100, 150):
        assert torch.equal(tasks.drift(0, step).targets, tasks.regimes(0, step).targets)
    for step in range(160):
        pairs = zip(tasks.turning_teacher(0, step), tasks.turning_teacher(0, step + 1), strict=True)
        for now, later in pairs:
            assert 0 < (later - now).norm() < 0.08 * now.norm()


@pytest.mark.usefixtures("short")
def test_a_task_whose_data_is_not_installed_is_skipped_visibly(tmp_path, monkeypatch, capsys):
    def missing(seed, step):
        raise Unavailable("it is not installed: pip install it")

    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], data=missing))
    arguments = ["--out", str(tmp_path), "--tasks", "digits", "regimes", "--seeds", "1"]
    assert command.main(arguments) == 0
    assert "skipped: digits: it is not installed: pip install it" in capsys.readouterr().err
    assert "| linear | 0.9 | – |" in (tmp_path / "streams.md").read_text()


@pytest.mark.usefixtures("short")
def test_a_run_has_the_online_loss_and_that_after_a_switch():
    line = runs.execute(Run("regimes", "mlp", 0.9, 0.01, 0))
    task = TASKS["regimes"]
    torch.manual_seed(0)
    model = task.model()
    losses = runs.train(task, model, runs.build(Run.of(line), model), 0)
    assert line["loss"] == pytest.approx(sum(losses[8:]) / 8, abs=1e-5)
    assert line["after_switch"] == line["loss"]  # all eight are within ten steps
    assert losses[0] == task.loss(task.model(), task.data(0, 0)).item() or losses[-1] < losses[0]


def test_what_is_forgotten_is_the_first_loss_after_a_return_less_the_last_ones_before_it():
    task = dataclasses.replace(TASKS["regimes"], regimes=2, period=20, steps=120)
    visit = [2.0 - 0.1 * x for x in range(10)] + [1.0] * 10  # the last ten have a mean of one
    found = runs.returned(task, visit * 6)
    # The mean of 1.3, 1.2, 1.1, 1, 1, from step 7 on, is still above 1.1.
    assert found == {"forgotten": pytest.approx(1.0), "relearned": 8.0}
    other = [5.0] * 20  # nothing of it is forgotten; it comes twice in the second half
    assert runs.returned(task, [*visit, *other] * 3)["forgotten"] == pytest.approx(1 / 3)


def test_a_regime_that_is_not_relearned_counts_with_its_whole_visit():
    task = dataclasses.replace(TASKS["regimes"], regimes=1, period=20, steps=40)
    assert runs.returned(task, [1.0] * 20 + [2.0] * 20) == {"forgotten": 1.0, "relearned": 20}


def test_a_regime_that_has_not_come_back_has_nothing_forgotten():
    task = dataclasses.replace(TASKS["regimes"], regimes=5, period=20, steps=100)
    assert runs.returned(task, [1.0] * 100) == {}


@pytest.mark.parametrize(("name", "size"), [("delta", 0.2), ("delta, own size", None)])
def test_updates_have_a_fixed_size_unless_the_name_says_own_size(name, size):
    run = Run("regimes", name, 0.5, 0.01, 0)
    optimizer = runs.build(run, TASKS["regimes"].model())
    assert {group["update_rms"] for group in optimizer.param_groups} == {size}
    assert {group["memory"] for group in optimizer.param_groups} == {"delta"}


@pytest.mark.usefixtures("short")
def test_a_run_that_has_a_line_is_not_repeated_and_the_tables_show_it(tmp_path, monkeypatch):
    arguments = ["benchmarks", "streams", "--out", str(tmp_path), "--tasks", "regimes"]
    arguments += ["--seeds", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    made = {
        **dataclasses.asdict(Run("regimes", "linear", 0.9, 0.01, 0)),
        "loss": 7.5,
        "after_switch": 9.25,
    }
    (tmp_path / "streams.jsonl").write_text(json.dumps(made) + "\n")
    assert main() == 0
    lines = [json.loads(x) for x in (tmp_path / "streams.jsonl").read_text().splitlines()]
    names = ["linear", "M3", "AdamW", "mlp"]
    assert [(line["optimizer"], line["seed"]) for line in lines] == [
        *((name, 0) for name in names), *((name, 1) for name in names),
    ]  # fmt: skip
    text = (tmp_path / "streams.md").read_text()
    assert "| linear | 0.9 | 7.5000 (9.2500) |" in text
    assert text.count("| win |") + text.count("| tie |") == 3
    (tmp_path / "streams.md").unlink()
    monkeypatch.setattr("sys.argv", [*arguments, "--report"])
    assert main() == 0
    assert (tmp_path / "streams.md").read_text() == text


@pytest.mark.usefixtures("short")
def test_only_the_best_rate_is_repeated_and_held_against_the_best_linear_memory(monkeypatch):
    task = dataclasses.replace(TASKS["regimes"], rates=(0.01, 0.02))
    monkeypatch.setitem(TASKS, "regimes", task)
    monkeypatch.setattr(command, "LINEAR", (("linear", 0.9), ("linear", 0.7)))
    values = {
        ("linear", 0.9): {0.01: (2.0,), 0.02: (1.0, 1.2)},
        ("linear", 0.7): {0.01: (0.9, 1.1), 0.02: (3.0,)},
        ("M3", 0.9): {0.01: (0.7, 0.8), 0.02: (0.8,)},
    }
    lines = {
        Run("regimes", *contender, lr, seed): {"loss": loss}
        for contender, rates in values.items()
        for lr, losses in rates.items()
        for seed, loss in enumerate(losses)
    }
    best = [run.lr for run in command.repeats("regimes", ("M3", 0.9), 3, lines)]
    assert best == [0.01, 0.01, 0.01]
    found = command.row(lines, "regimes", ("M3", 0.9), 2)
    # Less the linear memory of 0.7: -0.2 and -0.3.
    assert found == ["M3", "0.9", "0.7000", "0.8000", "0.7500", "-0.2500 [-0.8853, +0.3853]", "tie"]
    assert command.row(lines, "regimes", ("M3", 0.9), 3)[-3:] == ["–", "", ""]
