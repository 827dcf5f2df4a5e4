"""The command end to end: it runs, goes on where it stopped, and its page says what lines say."""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import runs
from benchmarks.hope import command, training
from benchmarks.hope.bytes import Bytes
from benchmarks.hope.formal import Formal
from benchmarks.hope.plan import Plan
from benchmarks.hope.recall import Recall
from benchmarks.hope.report import report
from benchmarks.hope.training import Run
from deepopt.hope import HopeConfig
from deepopt.hope.trainer import TrainConfig, Trainer

TINY = HopeConfig(dim=16, layers=1, heads=2, memory_chunk=8, projection_chunk=8)
SIZES = {"tokens": 16, "batch": 2, "sizes": TINY}
TINY_TASKS = {
    "bytes": Bytes(**SIZES, windows=2, longer=2, texts=1),
    "parity": Formal("parity", **SIZES, words=4),
    "recall": Recall(**SIZES, pairs=3, texts=4, grows=(0, 0, 0)),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, task in TINY_TASKS.items():
        monkeypatch.setitem(training.TASKS, name, task)
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))


def lines(folder, task):
    return [json.loads(x) for x in (folder / "hope" / f"{task}.jsonl").read_text().splitlines()]


def test_the_command_runs_every_task_and_goes_on_where_it_stopped(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--tasks", "parity", "recall", "--steps", "2"]
    arguments += ["--models", "Hope", "gated DeltaNet", "--rates", "0.004", "0.002", "--seeds", "2"]
    arguments += ["--parts", "models", "ablations", "--ablations", "memories frozen"]
    assert command.main(arguments) == 0
    page = (tmp_path / "hope.md").read_text()
    assert "## bytes" in page
    for task in ("parity", "recall"):
        found = lines(tmp_path, task)
        # two models at two rates, the second seed at the better one, one changed part
        assert len(found) == 2 * 2 + 2 + 1
        assert {line["seed"] for line in found} == {0, 1}
        assert all(math.isfinite(line["train_loss"]) for line in found)
        assert f"## {task}" in page
    assert "`python -m benchmarks hope --rates 0.004 0.002 --seeds 2 --steps 2`" in page
    assert "| memories frozen | " in page
    assert "| gated DeltaNet | not run |" in page  # on bytes

    (tmp_path / "hope" / "parity.jsonl").write_text(
        "".join(json.dumps(x) + "\n" for x in lines(tmp_path, "parity")[:-1]) + '{"task": "pa'
    )
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert capsys.readouterr().out.startswith("1/1, 0 s left: parity, Hope, memories frozen")
    assert (tmp_path / "hope.md").read_text() == page


def test_parts_of_the_layer_are_changed_on_what_it_can_do_and_with_every_seed_for_a_goal():
    plan, parts = Plan(rates=(4e-3,), seeds=2), ("memories frozen", "no convolutions")
    runs = dict.fromkeys(plan.ablations(["bytes", "parity", "reading"], parts, {}))
    assert [(run.task, run.model, run.seed) for run in runs] == [
        ("bytes", "Hope, memories frozen", 0),
        ("bytes", "Hope, no convolutions", 0),
        ("parity", "Hope, memories frozen", 0),
        ("parity", "Hope, no convolutions", 0),
        ("bytes", "Hope, memories frozen", 1),
    ]


def test_tasks_on_which_no_part_is_changed_are_refused_where_nothing_else_is_asked_for(
    tmp_path, capsys
):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), "--tasks", "reading", "--parts", "ablations"])
    assert "--tasks reading: parts of the layer are changed on bytes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_fresh_repeats_the_runs_asked_for_and_keeps_the_others(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--tasks", "parity", "--steps", "2", "--parts", "models"]
    arguments += ["--rates", "0.004", "--seeds", "1"]
    assert command.main([*arguments, "--models", "Hope", "Transformer++"]) == 0
    capsys.readouterr()
    assert command.main([*arguments, "--models", "Hope", "--fresh"]) == 0
    assert capsys.readouterr().out.count("parity, Hope") == 1
    assert sorted(x["model"] for x in lines(tmp_path, "parity")) == ["Hope", "Transformer++"]


def test_lines_of_another_setting_do_not_count_but_in_the_report(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--tasks", "parity", "--steps", "2", "--seeds", "1"]
    arguments += ["--models", "Transformer++", "--parts", "models", "--rates", "0.004"]
    assert command.main(arguments) == 0
    page = (tmp_path / "hope.md").read_text()
    wider = dataclasses.replace(TINY_TASKS["parity"], sizes=HopeConfig(dim=32, layers=1, heads=2))
    monkeypatch.setitem(training.TASKS, "parity", wider)
    assert not command.results(tmp_path / "hope").lines
    assert command.main([*arguments, "--report"]) == 0
    told = (
        " **1 of 1 runs were made in an earlier setting**, for example before updates had a least "
        "size or the delta memory looked ahead; "
    )
    assert told in (again := (tmp_path / "hope.md").read_text())
    assert again.replace(told + "the benchmark repeats them when it is run again.", "") == page


def test_the_optimizers_of_the_package_train_the_default_model(tmp_path):
    arguments = ["--out", str(tmp_path), "--tasks", "bytes", "--parts", "optimizers"]
    assert command.main([*arguments, "--steps", "2"]) == 0
    found = {line["optimizer"] for line in lines(tmp_path, "bytes")}
    assert found == {
        "AdamW", "DMGD", "DeepMomentum", "DeltaGradientDescent", "DeltaMomentum", "M3", "Muon",
        "PreconditionedMomentum", "SGD",
    }  # fmt: skip
    assert "| M3 | 0.004 | 7." in (tmp_path / "hope.md").read_text()


def test_a_run_on_bytes_is_the_training_command_of_hope(tmp_path):
    """Same weights, batches, optimizer and schedule, so the same loss on the same windows."""
    task, steps = TINY_TASKS["bytes"], 12
    config = TrainConfig(
        out=tmp_path, model=TINY, steps=steps, seq_len=16, batch_size=2, eval_windows=2,
        warmup=min(training.WARMUP, steps // 2), memory=training.MEMORY, quiet=True,
    )  # fmt: skip
    assert config.weight_decay == task.weight_decay
    expected = Trainer(config).run().val_bits_per_byte
    found = training.execute(Run("bytes", "Hope", config.optimizer, config.lr, 0, steps))
    assert task.windows == config.eval_windows
    assert found["metrics"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_a_run_that_is_not_finite_is_a_line_and_the_worst(monkeypatch):
    monkeypatch.setattr("deepopt.hope.optimizers.MAX_GRAD_NORM", math.nan)
    line = training.execute(Run("recall", "Hope", "SGD", 4e-3, 0, 3))
    assert line["diverged"] == "not finite after 1 steps"
    plan = Plan(["recall"], ["Hope"], (4e-3,), 1, 3)
    page = report(plan, {plan.run("recall", "Hope", 4e-3): line}, "a command")
    assert "| recall | accuracy | 0.0000 | >= 0.99 | NOT met |" in page


def test_goals_best_rates_means_and_ranges_are_computed_from_the_lines():
    plan = Plan(["bytes", "recall"], ["Hope", "gated DeltaNet"], (4e-3, 2e-3), 2, 7)
    values = {
        ("Hope", 4e-3, 0): (1.90, 1.8, 1.7),
        ("Hope", 2e-3, 0): (1.80, 1.6, 1.7),
        ("Hope", 2e-3, 1): (1.70, 1.6, 1.7),
        ("gated DeltaNet", 4e-3, 0): (2.0, 2.0, 2.0),
        ("gated DeltaNet", 4e-3, 1): (2.2, 2.0, 2.0),
        ("gated DeltaNet", 2e-3, 0): (2.1, 2.0, 2.0),
        ("Hope, memories frozen", 2e-3, 0): (1.95, 1.9, 1.9),
        ("Hope, memories frozen", 2e-3, 1): (1.93, 1.9, 1.9),
    }
    known = {}
    for (model, lr, seed), found in values.items():
        run = plan.run("bytes", model, lr, seed)
        names = ("bits_per_byte", "carried_on", "with_resets")
        known[run] = {
            **vars(run),
            "parameters": 1000,
            "train_loss": 1.5,
            "train_cpu_seconds": 60.0,
            "task_config": "8 x 256",
            "python": "3",
            "torch": "2",
            "metrics": dict(zip(names, found, strict=True)),
        }
    page = report(plan, known, "a command")
    assert "| Hope | 1,000 | 0.002 | 2 | 1.7500 (1.7000 to 1.8000) |" in page
    assert "| gated DeltaNet | 1,000 | 0.004 | 2 | 2.1000 (2.0000 to 2.2000) |" in page
    assert (
        f"| bytes | bits per byte / gated DeltaNet's | {1.75 / 2.1:.4f} | <= 0.99 | met |" in page
    )
    assert "learning memories are worth | 0.1900 | >= 0.15 | met |" in page
    assert "carried on minus resets | -0.1000 | <= 0 | met |" in page
    assert "| recall | accuracy | not run | >= 0.99 | not run |" in page
    assert "| memories frozen | 1,000 | 1.9500 | not run |" in page
    assert "the best of Hope, gated DeltaNet is at an end" in page


@pytest.mark.parametrize("option", ["--steps", "--seeds", "--jobs"])
def test_counts_below_one_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path), option, "0"])
    assert f"{option} 0: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused_by_name(rate, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path), "--rates", rate])
    assert f"--rates {rate}: must be positive and finite" in capsys.readouterr().err
