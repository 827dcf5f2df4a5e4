"""The command end to end: it runs, goes on where it stopped, and its page says what lines say."""

import json
import math

import pytest

from benchmarks.quality import command, results, training
from benchmarks.quality.command import main
from benchmarks.quality.contenders import CONTENDERS, Setting
from benchmarks.quality.plan import Swaps, Tuning
from benchmarks.quality.results import Results
from benchmarks.quality.training import Run
from benchmarks.quality.workload import Unavailable

OURS = "DeepMomentum, delta"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(
        command.TIERS,
        "standard",
        command.Tier(
            lambda w, c: Tuning(w, c, trials=1, seeds=2, steps=4), ("friedman",), ("AdamW", OURS)
        ),
    )
    monkeypatch.setitem(
        command.TIERS,
        "swaps",
        command.Tier(lambda w, c: Swaps(w, c, seeds=2, steps=4), ("friedman",), ("AdamW", OURS)),
    )


def lines(folder, name="friedman"):
    path = folder / "quality" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_swaps_run_are_counted_and_are_not_repeated(tmp_path, capsys):
    arguments = ["--tier", "swaps", "--out", str(tmp_path), "--jobs", "1"]
    assert main(arguments) == 0
    assert "1/12, " in capsys.readouterr().out
    assert len(lines(tmp_path)) == 2 * 3 * 2
    page = (tmp_path / "quality.md").read_text()
    assert f"### {OURS}, at AdamW's best rate" in page
    assert "| friedman, 4 steps | 0." in page
    assert main(arguments) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "quality.md").read_text() == page


def test_a_torn_line_and_a_line_of_other_data_are_run_again(tmp_path, capsys):
    arguments = ["--tier", "swaps", "--out", str(tmp_path), "--jobs", "1"]
    main(arguments)
    whole = lines(tmp_path)
    whole[0]["data"] = "another"
    text = "".join(json.dumps(line) + "\n" for line in whole)
    (tmp_path / "quality" / "friedman.jsonl").write_text(text[:-30])
    capsys.readouterr()
    main(arguments)
    assert capsys.readouterr().out.count("\n") == 2
    found = lines(tmp_path)
    assert len(found) == len(whole)
    assert {line["data"] for line in found} == {whole[1]["data"]}


def test_the_tuned_tier_makes_page_and_plot_again_from_the_lines_alone(tmp_path, monkeypatch):
    arguments = ["--out", str(tmp_path), "--jobs", "1"]
    assert main(arguments) == 0
    page = (tmp_path / "quality.md").read_text()
    assert f"| {OURS} | lr " in page
    assert (tmp_path / "quality" / "friedman.png").read_bytes()[:4] == b"\x89PNG"
    for file in (tmp_path / "quality.md", tmp_path / "quality" / "friedman.png"):
        file.unlink()
    monkeypatch.setattr(results, "execute", None)
    assert main([*arguments, "--report"]) == 0
    assert (tmp_path / "quality.md").read_text() == page
    assert (tmp_path / "quality" / "friedman.png").exists()


def test_fresh_repeats_and_keeps_old_lines_until_new_ones_are_there(tmp_path, capsys, monkeypatch):
    arguments = ["--tier", "swaps", "--out", str(tmp_path), "--jobs", "1"]
    main(arguments)
    capsys.readouterr()
    assert main([*arguments, "--fresh"]) == 0
    assert capsys.readouterr().out.count("\n") == 12
    assert len(lines(tmp_path)) == 12


def test_an_interrupt_keeps_what_has_ended_and_says_so(tmp_path, monkeypatch, capsys):
    execute, ran = results.execute, []

    def interrupted(run):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(run)
        return execute(run)

    monkeypatch.setattr(results, "execute", interrupted)
    arguments = ["--tier", "swaps", "--out", str(tmp_path), "--jobs", "1"]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 3
    monkeypatch.setattr(results, "execute", execute)
    assert main(arguments) == 0
    assert len(lines(tmp_path)) == 12


def test_a_workload_without_data_is_skipped_visibly_with_the_way_to_get_it(
    tmp_path, monkeypatch, capsys
):
    def missing():
        raise Unavailable("its package is not installed: pip install it")

    found = command.find("friedman")
    absent = command.Swaps("digits_mlp", ("AdamW", OURS))
    monkeypatch.setattr(
        command,
        "find",
        lambda name: found if name == "friedman" else type("Absent", (), {"sha256": missing}),
    )
    kept, skipped = command.available([absent, Swaps("friedman", ("AdamW",))])
    assert [plan.workload for plan in kept] == ["friedman"]
    assert skipped == {"digits_mlp": "its package is not installed: pip install it"}
    assert "skipped: digits_mlp: its package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "frydman"], "'frydman' is unknown; choose from breast_cancer, "),
        (["--workloads", "none.py"], "no such file"),
        (["--optimizers", "Adamw"], "choose from AdamW; SGD; "),
        (["--jobs", "0"], "must be at least 1"),
        (["--report"], "run without it first"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_contender_takes_every_setting(contender):
    for setting in (Setting(1e-3), Setting(1e-3, 2.0, 0.1, 0.95, 1)):
        found = training.execute(Run("friedman", contender, setting, 0, 3))
        assert math.isfinite(found["metrics"]["val_loss"])
        assert found["state_bytes"] > 0
        assert len(found["curve"]) == 3


def test_a_run_repeats_to_the_last_bit_and_depends_on_its_seed():
    def loss(seed):
        run = Run("friedman", OURS, Setting(3e-3), seed, 5)
        return training.execute(run)["metrics"]["val_loss"]

    assert loss(0) == loss(0) != loss(1)


def test_a_run_that_diverges_and_one_that_is_refused_leave_lines_that_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "build", lambda *_: (_ for _ in ()).throw(ValueError("no; use")))
    found = training.execute(Run("friedman", "Muon", Setting(1e-3), 0, 3))
    assert found["refused"] == "no"
    assert training.value(found) == math.inf
    monkeypatch.undo()
    found = training.execute(Run("friedman", "SGD", Setting(1e9), 0, 40))
    assert "not finite" in found["diverged"]


def test_comments_and_docstrings_change_no_hash():
    assert training.code('"""About."""\nx = 1  # one') == training.code('"""Other."""\nx = 1')
    assert training.code("x = 1") != training.code("x = 2")


def test_lines_of_workloads_by_path_have_a_file_of_their_own(tmp_path):
    run = Run("folder/mine.py", OURS, Setting(1e-3), 0, 3)
    assert Results(tmp_path)._path(run.workload) == tmp_path / "mine.jsonl"
