"""The benchmark of Hope's speed: its lines, its page, and its refusals."""

import json

import pytest

from benchmarks.hope import speed
from deepopt.hope import HopeConfig

SMALL = HopeConfig(vocab_size=11, dim=16, layers=1, heads=2, memory_chunk=4, projection_chunk=4)


def test_every_model_has_a_row_and_the_page_is_made_from_the_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CONFIG", SMALL)
    monkeypatch.setattr(speed, "BATCH", 16)
    monkeypatch.setattr(speed, "READ", (1, 8))
    options = ["--out", str(tmp_path)]
    assert speed.main([*options, "--lengths", "8", "--seconds", "0.01"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "hope_speed.jsonl").read_text().splitlines()]
    train = {line["model"]: line for line in lines if line["kind"] == "train"}
    assert set(train) == set(speed.MODELS)
    assert all(line["flops_per_token"] > 0 for line in train.values())
    assert [line["read"] for line in lines if line["kind"] == "decode"] == [1, 1, 8, 8]
    page = (tmp_path / "hope_speed.md").read_text()
    for model in speed.MODELS:
        assert f"| 8 | {model} |" in page
    assert speed.main([*options, "--lengths", "--seconds", "0.01"]) == 0  # decoding alone
    again = [json.loads(line) for line in (tmp_path / "hope_speed.jsonl").read_text().splitlines()]
    assert [line for line in again if line["kind"] == "train"] == list(train.values())
    assert len(again) == len(lines)
    assert all(new != old for new, old in zip(again[-4:], lines[-4:], strict=True))
    page = (tmp_path / "hope_speed.md").read_text()
    (tmp_path / "hope_speed.md").unlink()
    assert speed.main([*options, "--report"]) == 0
    assert (tmp_path / "hope_speed.md").read_text() == page


def test_goals_are_judged_by_the_lines_and_not_run_without_them():
    def line(model, tokens, rate, peak):
        return {"model": model, "tokens": tokens, "tokens_per_second": rate, "peak_bytes": peak}

    table = speed.goals(
        [line("Hope", 512, 50.0, 6), line("Transformer++", 512, 100.0, 2),
         line("Hope", 8192, 44.0, 6), line("Transformer++", 8192, 20.0, 6)]
    )  # fmt: skip
    assert [row.split(" | ")[1:] for row in table.splitlines()[2:]] == [
        ["0.50", ">= 0.5", "met |"],
        ["3.00", "<= 2.5", "NOT met |"],
        ["not run", ">= 1", "not run |"],
        ["2.20", ">= 1", "met |"],
        ["0.88", ">= 0.9", "NOT met |"],
    ]


def test_decoding_alone_has_a_page_too(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "CONFIG", SMALL)
    monkeypatch.setattr(speed, "READ", (1, 8))
    assert speed.main(["--out", str(tmp_path), "--lengths", "--seconds", "0.01"]) == 0
    assert "| 8 | Hope, scan |" in (tmp_path / "hope_speed.md").read_text()


def test_a_report_without_lines_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--out", str(tmp_path), "--report"])
    assert "run without it first" in capsys.readouterr().err
