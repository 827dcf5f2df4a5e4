"""``make gpu``: what it makes of stages that fail, hang and crash, its tables and predictions."""

import json
import math
import re
import sys

import pytest
import torch
from torch import nn

from benchmarks import work
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import roofline, summary
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.muon import CompiledMuon
from benchmarks.gpu.rows import races
from benchmarks.gpu.stages import MANY_CORES, PLANTED, STAGES, Stage
from benchmarks.timing import quartiles
from benchmarks.work import Rates

MACHINE = {"machine": {"card": "a card"}, "rehearsal": False}


def stage(code, seconds=60.0, **about):
    return Stage("tried", "", [sys.executable, "-c", code], seconds, [], **about)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda it: it.name)
def test_planted_faults_are_reported_as_what_they_are(planted, tmp_path):
    found = gpu.run(planted, tmp_path, 1.0 if "hang" in planted.name else 60.0, rehearse=True)
    assert found["outcome"] == planted.expected != "passed"
    if planted.name == "planted-failure":
        assert "planted: 1 is not 2" in found["note"]
        assert "planted: 1 is not 2" in (tmp_path / "planted-failure.log").read_text()


def test_a_hanging_stage_ends_with_all_that_it_started(tmp_path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = f"import subprocess; subprocess.run({sleeper!r})"
    found = gpu.run(stage(child), tmp_path, 1.5, rehearse=False)
    assert found["outcome"] == "TIMED OUT"
    assert found["seconds"] < 20


def test_a_stage_leaves_its_log_and_what_its_tests_said(tmp_path):
    found = gpu.run(
        stage("print('3 failed, 4 passed in 1.2s'); raise SystemExit(1)"), tmp_path, 60, False
    )
    assert (found["outcome"], found["note"]) == ("FAILED", "3 failed, 4 passed")
    assert "3 failed" in (tmp_path / "tried.log").read_text()


def test_a_stage_without_what_it_needs_is_left_out(tmp_path, monkeypatch):
    monkeypatch.delenv("DEEPOPT_NO_SUCH_THING", raising=False)
    found = gpu.run(stage("", needs="DEEPOPT_NO_SUCH_THING"), tmp_path, 60, rehearse=False)
    assert found["outcome"] == "left out"


def test_stages_have_names_of_their_own_and_fit_into_nine_minutes_but_for_the_last():
    names = [each.name for each in (*STAGES, *PLANTED)]
    assert len(set(names)) == len(names)
    assert sum(each.seconds for each in STAGES[:6]) <= 9 * 60


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["no-such-stage"])
    assert "no-such-stage" in capsys.readouterr().err


def race_line(contender, seconds, race="gpt2-small"):
    times = {"work": [seconds] * 3, "wall": [seconds] * 3, "graph": None, "predicted": seconds / 2}
    about = {"kind": "race", "race": race, "device": "cuda", "threads": 1, "quick": False}
    return {**about, "contender": contender, "bytes": 1e9, "flops": 0.0, **times}


def test_the_summary_judges_goals_and_divides_by_what_was_predicted(tmp_path):
    rates = {"kind": "rates", "race": "gpt2-small", "device": "cuda", "copy": 1e12}
    lines = [
        rates,
        race_line("torch Muon", 1e-2),
        race_line("linear", 9e-3),
        race_line("delta", 6e-3),
    ]
    lines.append({"kind": "failed", "contender": "mlp", "note": "RuntimeError: out of memory"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE))
    stages = [{"stage": "build", "outcome": "passed", "seconds": 3.2, "note": "a | b"}]
    (tmp_path / "stages.jsonl").write_text(json.dumps(stages[0]) + "\n")
    text = summary.summary(tmp_path)
    rows = {tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in text.splitlines()}
    assert ("build", "passed", "3", "a / b") in rows
    assert ("gpt2-small: linear / torch Muon", "0.9", "<= 0.6", "NOT met") in rows
    assert ("gpt2-small: delta / torch Muon", "0.6", "<= 0.7", "met") in rows
    assert ("gpt2-small", "delta", "6", "0.60", "3", "2.00", "", "6", "17%") in rows
    assert "failed: mlp: RuntimeError: out of memory" in text


def test_of_lines_about_the_same_the_last_counts(tmp_path):
    lines = [race_line("linear", 1.0), race_line("linear", 2.0), race_line("delta", 3.0)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summary.read(tmp_path / "rows.jsonl")
    assert [line["work"][0] for line in found] == [2.0, 3.0]


def test_the_roofline_page_has_todays_predictions_for_every_row():
    text = roofline.PAGE.read_text()
    assert roofline.predictions() in text, "run `python -m benchmarks.gpu.roofline`"
    card, cores = text.split("## The CPU")
    for name, race in races().items():
        for part in (card, cores) if name in MANY_CORES else (card,):
            for contender in race.contenders:
                assert re.search(rf"\| {re.escape(race.title)} +\| {contender} ", part)


def test_a_page_without_marks_is_refused_and_one_with_them_filled(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must have the lines"):
        summary.put_between(page, ("<a>", "<b>"), "new")
    page.write_text("before\n\n<a>\nold\n<b>\n\nafter\n")
    summary.put_between(page, ("<a>", "<b>"), "new\n")
    assert page.read_text() == "before\n\n<a>\n\nnew\n\n<b>\n\nafter\n"


def test_predictions_add_up_what_phases_need():
    rates = Rates(copy=1e12, stream=1e12, float32=1e12, bfloat16=1e13)
    contender = races()["gpt2-small"].contenders["linear"]
    found = work.roofline_seconds(contender.work, rates)
    assert found >= work.total_bytes(contender.work) / 1e12 - 1e-12
    assert found >= work.total_flops(contender.work) / 1e13 - 1e-12
    split = work.covariance(64, 80, split=True)
    assert all(math.isfinite(work.product_seconds([phase], rates)) for phase in split)


def test_the_muon_to_compile_is_muon():
    param = nn.Parameter(torch.zeros(48, 96))
    param.grad = torch.randn(48, 96)
    CompiledMuon([param], lr=1.0, weight_decay=0.0).step()
    values = torch.linalg.svdvals(-param.detach()) / (0.2 * 96**0.5)
    assert 0.6 < values.min() <= values.max() < 1.3
    exact = torch.optim.Muon([torch.nn.Parameter(torch.zeros(48, 96))], lr=1.0)
    other = exact.param_groups[0]["params"][0]
    other.grad = param.grad
    exact.step()
    cosine = torch.cosine_similarity(param.detach().flatten(), other.detach().flatten(), dim=0)
    assert cosine > 0.99


def test_a_clock_gives_the_seconds_of_whole_periods():
    assert quartiles([1.0, 3.0, 2.0, 6.0], period=2) == pytest.approx((3.0, 1.5, 4.5))
    clock = Clock("cpu")
    calls = []
    assert clock.work(lambda: calls.append(1)) >= 0
    assert clock.wall(lambda: calls.append(1)) >= 0
    assert len(calls) == 2
