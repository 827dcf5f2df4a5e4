"""Lines of results: only a run that has ended replaces one."""

import json

import pytest

from benchmarks.runs import Results
from deepopt._files import DamagedFile


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def execute(run):
    if run == "broken":
        raise ValueError("no")
    return {"run": run, "setting": "today's", "loss": 1.0}


@pytest.fixture
def results(tmp_path):
    """Two files: one with a line of today's setting and one of an earlier, and one with a third."""

    def path_of(run):
        return tmp_path / ("a.jsonl" if run < "m" else "z.jsonl")

    def open_results():
        paths = sorted(tmp_path.glob("*.jsonl"))
        return Results(paths, lambda x: x["run"], path_of, lambda run, x: x["setting"] == "today's")

    for run, setting in (("done", "today's"), ("early", "earlier"), ("new", "today's")):
        with path_of(run).open("a") as file:
            file.write(json.dumps({"run": run, "setting": setting, "loss": 3.0}) + "\n")
    return open_results


def complete(results, *runs):
    results.complete(runs, execute, 1, lambda run, line: f"{line['loss']}")


def test_only_lines_that_count_are_found_and_their_runs_are_not_repeated(results, capsys):
    found = results()
    assert found.lines.keys() == {"done", "new"}
    complete(found, "done", "done", "new")
    assert capsys.readouterr().out == ""


def test_lines_that_do_not_count_stay_until_their_run_is_repeated(results, tmp_path):
    complete(results(), "also")
    assert {x["run"] for x in read(tmp_path / "a.jsonl")} == {"done", "early", "also"}
    complete(results(), "early")
    found = {x["run"]: x for x in read(tmp_path / "a.jsonl")}
    assert len(read(tmp_path / "a.jsonl")) == len(found) == 3
    assert found["early"]["setting"] == "today's"


def test_a_run_that_fails_while_it_is_repeated_keeps_its_line(results, tmp_path, monkeypatch):
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"run": "broken", "setting": "today's", "loss": 3.0}) + "\n")
    found = results()
    found.forget(["broken", "done", "unknown"])
    with pytest.raises(RuntimeError, match="1 runs failed"):
        complete(found, "broken", "done")
    lines = {x["run"]: x["loss"] for x in read(tmp_path / "a.jsonl")}
    assert lines == {"done": 1.0, "early": 3.0, "broken": 3.0}


def test_two_processes_that_complete_runs_of_one_file_keep_each_others_lines(results, tmp_path):
    first, second = results(), results()
    first.complete(
        ["also", "also 2"],
        lambda run: complete(second, f"{run}, elsewhere") or execute(run),
        1,
        lambda *_: "",
    )
    found = [x["run"] for x in read(tmp_path / "a.jsonl")]
    assert sorted(found) == [
        "also",
        "also 2",
        "also 2, elsewhere",
        "also, elsewhere",
        "done",
        "early",
    ]


def test_a_damaged_line_that_is_not_the_last_is_named_and_nothing_is_lost(results, tmp_path):
    found, path = results(), tmp_path / "z.jsonl"
    text = "<<<<<<< HEAD\n" + path.read_text()
    path.write_text(text)
    for act in (results, lambda: complete(found, "zero")):
        with pytest.raises(DamagedFile, match=r"z\.jsonl, line 1 is not JSON .*: mend the line"):
            act()
    assert path.read_text() == text


def test_a_torn_line_is_dropped_before_the_next_one_is_written(results, tmp_path):
    with (tmp_path / "z.jsonl").open("a") as file:
        file.write('{"run": "to')
    complete(results(), "torn", "zero")
    assert [x["run"] for x in read(tmp_path / "z.jsonl")] == ["new", "torn", "zero"]
