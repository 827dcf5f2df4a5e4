"""The command end to end: it runs, goes on where it stopped, and its page says what lines say."""

import importlib.util
import json
import math
import re

import pytest

from benchmarks.quality import command, tiers, training
from benchmarks.quality.command import main
from benchmarks.quality.contenders import CONTENDERS, Setting, package
from benchmarks.quality.plan import Rates, Tuning
from benchmarks.quality.results import results
from benchmarks.quality.training import Run
from benchmarks.quality.workload import Unavailable

OURS = "DeepMomentum, covariance"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(
        tiers.TIERS,
        "standard",
        tiers.Tier(
            lambda w, c: [Tuning(w, c, trials=1, seeds=2, steps=4)], ("friedman",), ("AdamW", OURS)
        ),
    )
    monkeypatch.setitem(
        tiers.TIERS,
        "rates",
        tiers.Tier(lambda w, c: [Rates(w, c, seeds=2, steps=4)], ("friedman",), ("AdamW", OURS)),
    )


def lines(folder, name="friedman"):
    path = folder / "quality" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_are_counted_and_are_not_repeated(tmp_path, capsys):
    arguments = ["--tier", "rates", "--out", str(tmp_path), "--jobs", "1"]
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
    arguments = ["--tier", "rates", "--out", str(tmp_path), "--jobs", "1"]
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
    assert re.search(rf"\| {OURS} \| \d+ \+ \d+ \| lr ", page)
    image = tmp_path / "quality" / "friedman_4.png"
    assert image.read_bytes()[:4] == b"\x89PNG"
    for file in (tmp_path / "quality.md", image):
        file.unlink()
    monkeypatch.setattr(command, "execute", None)
    assert main([*arguments, "--report"]) == 0
    assert (tmp_path / "quality.md").read_text() == page
    assert image.exists()


def test_fresh_repeats_and_keeps_old_lines_until_new_ones_are_there(tmp_path, capsys, monkeypatch):
    arguments = ["--tier", "rates", "--out", str(tmp_path), "--jobs", "1"]
    main(arguments)
    capsys.readouterr()
    assert main([*arguments, "--fresh"]) == 0
    assert capsys.readouterr().out.count("\n") == 12
    assert len(lines(tmp_path)) == 12


def test_an_interrupt_keeps_what_has_ended_and_says_so(tmp_path, monkeypatch, capsys):
    execute, ran = command.execute, []

    def interrupted(run):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(run)
        return execute(run)

    monkeypatch.setattr(command, "execute", interrupted)
    arguments = ["--tier", "rates", "--out", str(tmp_path), "--jobs", "1"]
    assert main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(lines(tmp_path)) == 3
    monkeypatch.setattr(command, "execute", execute)
    assert main(arguments) == 0
    assert len(lines(tmp_path)) == 12


def test_a_workload_without_data_is_skipped_visibly_with_the_way_to_get_it(
    tmp_path, monkeypatch, capsys
):
    def missing():
        raise Unavailable("its package is not installed: pip install it")

    found = command.find("friedman")
    absent = Rates("digits_mlp", ("AdamW", OURS))
    monkeypatch.setattr(
        command,
        "find",
        lambda name: found if name == "friedman" else type("Absent", (), {"sha256": missing}),
    )
    kept, skipped = command.available([absent, Rates("friedman", ("AdamW",))])
    assert [plan.workload for plan in kept] == ["friedman"]
    assert skipped == {"digits_mlp": "its package is not installed: pip install it"}
    assert "skipped: digits_mlp: its package" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "frydman"], "'frydman' is unknown; choose from breast_cancer, "),
        (["--workloads", "none.py"], "no such file"),
        (["--workloads", "parity_dyck"], "on which no choice may depend"),
        (["--tier", "locked", "--workloads", "friedman"], "tier locked has breast_cancer_wine, "),
        (["--optimizers", "Adamw"], "choose from AdamW; SGD; "),
        (["--jobs", "0"], "must be at least 1"),
        (["--report"], "run without it first"),
    ],
)
def test_bad_arguments_are_named_with_the_remedy(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "error"), [("import nowhere", "ModuleNotFoundError"), ("(", "SyntaxError")]
)
def test_a_workload_file_that_does_not_run_is_named(text, error, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--workloads", str(path)])
    assert f"mine.py': the file cannot be run ({error}: " in capsys.readouterr().err


def test_where_nothing_could_run_the_reasons_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "available", lambda every: ([], {"friedman": "it lacks data"}))
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--jobs", "1"])
    assert "nothing could run here: it lacks data" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1])
def test_smoke_fails_where_a_run_does_not_improve(code, tmp_path, monkeypatch, capsys):
    small = Tuning("friedman", ("AdamW", OURS), trials=1, seeds=2, steps=20)
    monkeypatch.setitem(
        tiers.TIERS, "smoke", tiers.Tier(lambda w, c: [small], ("friedman",), ("AdamW", OURS))
    )
    execute = command.execute

    def flat(run):
        line = execute(run)
        return line if code == 0 else {**line, "curve": [1.0, 1.0]}

    monkeypatch.setattr(command, "execute", flat)
    assert main(["--tier", "smoke", "--out", str(tmp_path), "--jobs", "1"]) == code
    assert ("seed 1, 20 steps: the loss did not fall" in capsys.readouterr().err) == (code == 1)


def test_an_optimizer_whose_package_is_absent_is_skipped_visibly_with_the_way_to_get_it(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = ["--tier", "rates", "--optimizers", OURS, "Lion", "--out", str(tmp_path)]
    assert main([*arguments, "--jobs", "1"]) == 0
    said = capsys.readouterr().err
    assert "skipped: Lion: it needs pytorch_optimizer, which is not installed" in said
    assert {line["contender"] for line in lines(tmp_path)} == {"AdamW", OURS}
    assert "pip install --no-deps pytorch_optimizer |" in (tmp_path / "quality.md").read_text()


def test_lines_of_an_absent_package_or_an_unknown_workload_stay_and_stop_nobody(
    tmp_path, monkeypatch
):
    arguments = ["--tier", "rates", "--out", str(tmp_path), "--jobs", "1"]
    main(arguments)
    path = tmp_path / "quality" / "friedman.jsonl"
    foreign = {**lines(tmp_path)[0], "contender": "Lion"}
    path.write_text(path.read_text() + json.dumps(foreign) + "\n")
    gone = tmp_path / "quality" / "gone.jsonl"
    gone.write_text(json.dumps({**foreign, "workload": "gone.py"}) + "\n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*arguments, "--fresh"]) == 0
    assert foreign in lines(tmp_path)
    assert gone.exists()


def test_without_an_accelerator_its_tier_is_refused_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "accelerator", lambda: None)
    with pytest.raises(SystemExit):
        main(["--tier", "gpu", "--out", str(tmp_path)])
    assert "finds no accelerator on this machine; use --tier full" in capsys.readouterr().err


def test_full_has_two_horizons_and_two_batches_and_gpu_larger_ones_on_its_device():
    def sizes(tier):
        every = tiers.plans(tier, ["friedman"], None)
        return [(p.final_steps // 300, p.batch, p.device) for p in every]

    assert sizes("full") == [(1, 1, "cpu"), (4, 1, "cpu"), (1, 4, "cpu")]
    device = tiers.accelerator() or "cuda"
    assert sizes("gpu") == [(4, 16, device), (16, 16, device), (4, 64, device)]


def test_two_folders_are_compared_seed_by_seed(tmp_path, capsys):
    for name in ("old", "new"):
        main(["--out", str(tmp_path / name), "--jobs", "1"])
    path = tmp_path / "new" / "quality" / "friedman.jsonl"
    every = lines(tmp_path / "new")
    for line in every:
        if line["contender"] == OURS and line["steps"] == 4:
            line["metrics"]["val_loss"] -= 0.5 + 0.001 * line["seed"]
    path.write_text("".join(json.dumps(line) + "\n" for line in every))
    capsys.readouterr()
    folders = [str(tmp_path / name / "quality") for name in ("old", "new")]
    assert main(["compare", *folders]) == 0
    text = capsys.readouterr().out
    assert f"{len(every)} runs are in both, 0 in the old folder alone" in text
    assert "| the same |" in text
    assert f"| friedman | {OURS} | its best | 4 | 2 |" in text
    assert "-0.5005 [" in text
    assert "| better |" in text


@pytest.mark.parametrize("folder", ["none", "."])
def test_a_folder_without_lines_is_refused_with_its_name(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / folder), str(tmp_path)])
    assert f"{tmp_path / folder}: no " in capsys.readouterr().err


@pytest.mark.parametrize("contender", CONTENDERS)
def test_every_contender_takes_every_setting(contender):
    try:
        package(contender)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for setting in (Setting(1e-3), Setting(1e-3, 2.0, 0.1, 0.95, 1), Setting(1e-3, beta=None)):
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
    assert results(tmp_path).path_of(run) == tmp_path / "mine.jsonl"
