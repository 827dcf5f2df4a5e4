import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import runs, swap
from benchmarks.__main__ import main
from benchmarks.swap import Results, Run


def line(run, bits):
    return {
        **vars(run),
        "val_bits_per_byte": bits,
        "parameters": 1000,
        "model_cpu_seconds": 0.5,
        "optimizer_cpu_seconds": 0.01,
        "state_floats_per_parameter": 2.0,
        **swap.setting(run),
    }


@pytest.fixture
def results(tmp_path):
    """AdamW is best at 4e-3; a challenger is 0.25 bits better on seed 0 and 0.75 on seed 1."""
    path = tmp_path / "swap.jsonl"
    lines = [line(run, 3.0 + abs(run.lr - 4e-3)) for run in swap.sweep("Hope", 70)]
    for run in swap.swaps("Hope", 4e-3, 70)[1:]:
        gain = 0.0 if run.optimizer == "AdamW" else (0.25, 0.75)[run.seed]
        lines.append(line(run, 3.0 - gain))
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return Results(path)


def test_the_rate_is_adamws_best(results):
    assert swap.best_rate(results, "Hope", 70) == 4e-3


def test_the_table_has_every_optimizer_its_seeds_mean_and_difference(results):
    text = swap.report(results, {"Hope": 70}, "python -m benchmarks swap")
    assert "## Hope, 1,000 parameters, 70 steps" in text
    assert "| AdamW | 3.0000 | 3.0000 | 3.0000 | +0.0000 | 0.500 | 0.0100 | 2.00 |" in text
    for name in ("Muon", *(f"DeepMomentum, {m}" for m in ("linear", "covariance", "delta"))):
        assert f"| {name} | 2.7500 | 2.2500 | 2.5000 | -0.5000 |" in text


def test_finished_runs_are_not_repeated(results, monkeypatch):
    monkeypatch.setattr(swap, "execute", None)  # cannot even be sent to a worker
    results.complete(swap.swaps("Hope", 4e-3, 70), jobs=1)


def test_a_run_trains_the_model_it_names_and_reports_what_it_depends_on(monkeypatch):
    tiny = swap.TransformerConfig(dim=16, layers=1, heads=2)
    monkeypatch.setitem(swap.CONFIGS, "Transformer", tiny)
    monkeypatch.setattr(
        swap, "TrainConfig", lambda **k: TrainConfig(**k, seq_len=16, eval_windows=2, warmup=1)
    )
    found = swap.execute(Run("Transformer", "DeepMomentum", "delta", 1e-3, 0, 2))
    assert found["parameters"] == sum(p.numel() for p in swap.Transformer(tiny).parameters())
    assert 7.5 < found["val_bits_per_byte"] <= 8.1
    assert found["seq_len"] == 16
    assert len(found["data_sha256"]) == 64


def test_the_command_runs_sweeps_and_swaps_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch, capsys
):
    tiny = swap.TransformerConfig(dim=16, layers=1, heads=2)
    monkeypatch.setitem(swap.CONFIGS, "Transformer", tiny)
    monkeypatch.setattr(
        swap, "TrainConfig", lambda **k: TrainConfig(**k, seq_len=16, eval_windows=2, warmup=1)
    )
    monkeypatch.setattr(swap, "LEARNING_RATES", (1e-3, 2e-3))
    monkeypatch.setattr(swap, "CHALLENGERS", (("DeepMomentum", "linear"),))
    monkeypatch.setattr(runs, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(1))
    command = ["--out", str(tmp_path), "--models", "Transformer", "--steps", "2"]
    assert swap.main(command) == 0
    lines = (tmp_path / "swap.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 1 + 2  # the sweep, AdamW's second seed, the challenger
    assert "| DeepMomentum, linear |" in (tmp_path / "swap.md").read_text()

    capsys.readouterr()
    (tmp_path / "swap.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert swap.main(command) == 0
    assert capsys.readouterr().out.count("bits/byte") == 1


def test_lines_of_another_setting_and_torn_lines_do_not_count(results, monkeypatch):
    text = results.path.read_text()
    results.path.write_text(text + '{"model": "Ho')
    assert Results(results.path).lines == results.lines
    monkeypatch.setitem(swap.CONFIGS, "Hope", swap.HopeConfig(dim=64))
    assert not Results(results.path).lines


def test_the_report_is_written_again_from_lines_of_any_setting_without_a_run(
    results, monkeypatch, tmp_path
):
    before = results.path.read_text()
    monkeypatch.setattr(swap, "execute", None)
    monkeypatch.setitem(swap.CONFIGS, "Hope", swap.HopeConfig(dim=64))
    command = ["--report", "--out", str(tmp_path), "--models", "Hope", "--steps", "70"]
    assert swap.main(command) == 0
    assert results.path.read_text() == before
    assert "| Muon | 2.7500 | 2.2500 |" in (tmp_path / "swap.md").read_text()
    assert (tmp_path / "swap.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_counts_as_infinitely_bad_and_is_shown(results):
    run = Run("Hope", "Muon", None, 4e-3, 0, 70)
    results.lines[run] = {**vars(run), "diverged": "the loss is nan"}
    text = swap.report(results, {"Hope": 70}, "python -m benchmarks swap")
    assert "| Muon | inf | 2.2500 | inf | +inf | nan | nan | nan |" in text
    assert swap.picture(results, {"Hope": 70}).startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [[], ["swop"]])
def test_an_unknown_benchmark_lists_the_known_ones(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    assert main() == 2
    assert "swap: The swap" in capsys.readouterr().err


TrainConfig = swap.TrainConfig
