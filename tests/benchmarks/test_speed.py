import contextlib
import json

import pytest
import torch

from benchmarks import work
from benchmarks.speed import catalog, command, optimizers
from benchmarks.speed.case import Case, Run, Setting
from benchmarks.speed.command import results
from benchmarks.speed.coordinate_mlp import coordinate_mlp, peak_share
from benchmarks.speed.correctness import farther, inputs, singular_values, strides
from benchmarks.speed.elementwise import elementwise
from benchmarks.speed.matrices import SPLIT, matrices
from benchmarks.speed.overheads import buckets, memory
from benchmarks.speed.race import ratio
from benchmarks.speed.report import report
from benchmarks.speed.scaling import exponent, scaling
from deepopt import ops

QUICK = Setting(quick=True)


def raced(name, seconds, **more):
    row = {"contender": name, "runs": 5, "bytes": 2e9, "flops": 3e9, "least_flops": 1e9}
    row |= {f"{clock}{end}": seconds for clock in ("cpu", "wall") for end in ("", "_low", "_high")}
    shares = {"traffic_seconds": 0.5, "product_seconds": 1.5, "roofline_seconds": 1.0}
    return {**row, **shares, **more}


def line(case, threads, **found):
    conditions = {**command.conditions(Setting()), "code_sha256": "0123456789ab" * 5}
    rates = dict.fromkeys(work.Rates._fields, 2e9)
    return {"case": case, "threads": threads, **conditions, "rates": rates, "clock": "cpu", **found}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file of results: a race in which ours takes 0.5 of the other's time, and a table."""
    details = [{"name": "a", "count": 4000, "value": 0.25}]
    cases = {
        "race": Case("A race", None, [ratio("ours", "theirs", 0.6)], "theirs", note="As it is."),
        "table": Case("A table", None, [], threads=(1,)),
    }
    monkeypatch.setattr(catalog, "CASES", cases)
    rows = [
        raced("theirs", 4.0, products_share=0.75),
        raced("ours", 2.0),
        {"contender": "absent", "not_run": "ModuleNotFoundError: No module named 'absent'"},
    ]
    lines = [line("race", 1, rows=rows), line("table", 1, details=details, exponent=1.0)]
    path = tmp_path / "speed.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


@pytest.fixture
def lines(path):
    return {of.run: line for of, line in results(path, Setting()).lines.items()}


def test_the_report_has_targets_times_and_shares_from_the_lines_alone(lines):
    text = report(lines, "python -m benchmarks speed")
    assert "| race | 1 | ours / theirs | 0.500 | <= 0.600 | met |" in text
    assert (
        "| ours | 2,000 (2,000 to 2,000) | 2,000 (2,000 to 2,000) | 0.50 "
        "| 2.00 | 25% | 3.00 | 75% | 1.00 | 50% |  | 5 |" in text
    )
    assert (
        "| 3.00 | 38% | 1.00 | 25% | 25% | 5 |" in text
    )  # of theirs, a quarter is outside of products
    assert "| absent | not run: ModuleNotFoundError: No module named 'absent' |" in text
    assert "| a | 4,000 | 0.250 |" in text
    assert "Exponent of the power law through them: 1.000." in text
    assert "As it is." in text
    assert "Not measured yet: race (2)." in text
    assert "quick" not in text
    assert "different code" not in text


def test_whether_a_target_is_met_follows_from_the_numbers(lines):
    lines[Run("race", 1)]["rows"][1]["cpu"] = 2.5
    assert "| ours / theirs | 0.625 | <= 0.600 | NOT met |" in report(lines, "")
    lines[Run("race", 1)]["rows"][1] = {"contender": "ours", "not_run": "because"}
    assert "| ours / theirs | nan | <= 0.600 | not measured |" in report(lines, "")


def test_the_report_tells_of_quick_runs_and_of_different_code(lines):
    for one in lines.values():
        one["quick"] = True
    lines[Run("table", 1)]["code_sha256"] = "f" * 60
    text = report(lines, "")
    assert "not to be quoted" in text
    assert "lines of different code" in text


def test_lines_of_other_conditions_and_torn_lines_do_not_count(path):
    path.write_text(path.read_text() + '{"case": "ra')
    assert len(results(path, Setting()).lines) == 2
    assert not results(path, QUICK).lines


def test_lines_of_other_devices_stay_when_a_case_is_measured_again(path, monkeypatch):
    elsewhere = line("race", 1) | {"device": "cuda"}
    path.write_text(path.read_text() + json.dumps(elsewhere) + "\n")
    rows = [raced("theirs", 1.0), raced("ours", 1.0)]
    measured = line("race", 1, rows=rows) | {"code_sha256": "f" * 64}
    monkeypatch.setattr(command, "execute_apart", lambda run, setting: measured)
    monkeypatch.setattr(command, "plot", lambda *_: None)
    arguments = ["--out", str(path.parent), "--cases", "race", "--threads", "1", "--fresh"]
    assert command.main(arguments) == 0
    found = [json.loads(x) for x in path.read_text().splitlines()]
    assert elsewhere in found
    assert [x for x in found if (x["case"], x["device"]) == ("race", "cpu")] == [measured]


def test_finished_cases_are_not_repeated_and_failed_ones_leave_the_others(
    path, monkeypatch, capsys
):
    def execute(run, setting):
        if run.case == "table":
            raise RuntimeError("its process ended with 1")
        return line(run.case, run.threads, rows=[raced("theirs", 1.0), raced("ours", 1.0)])

    monkeypatch.setattr(command, "execute_apart", execute)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(RuntimeError, match="1 runs failed"):
        command.main(["--out", str(path.parent)])
    told = capsys.readouterr()
    assert "table, 1 thread(s): its process ended with 1" in told.err
    assert "ours / theirs: 1.00 (<= 0.600): NOT met" in told.out
    assert len(path.read_text().splitlines()) == 2


def test_the_command_runs_cases_in_processes_of_their_own(tmp_path, capsys):
    arguments = ["--quick", "--out", str(tmp_path), "--cases", "strides"]
    assert command.main(arguments) == 0
    (written,) = map(json.loads, (tmp_path / "speed.jsonl").read_text().splitlines())
    assert (written["case"], written["threads"], written["quick"]) == ("strides", 1, True)
    assert len(written["code_sha256"]) == 64
    assert "### strides: " in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "1/1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "adamw"], "invalid choice: 'adamw'"),
        (["--cases", "strides", "--threads", "2"], "runs on [2] threads"),
        (["--device", "gpu"], "Invalid --device: 'gpu'"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_race_of_matrices_has_every_optimizer_and_its_counts():
    found = matrices([(8, 12)], 0.0, SPLIT)(QUICK)
    rows = {row["contender"]: row for row in found["rows"]}
    assert rows.keys() == set(SPLIT)
    linear = rows["DeepMomentum linear"]
    assert linear["flops"] == work.total_flops(work.newton_schulz(8, 12))
    assert 0 < linear["products_share"] < 1
    assert rows["M3"]["runs"] == 1


def test_a_race_of_the_element_wise_path_counts_wide_state_for_narrow_parameters():
    found = elementwise([(50,), (30,)], 0.0, torch.bfloat16)(QUICK)
    moved = {row["contender"]: row["bytes"] for row in found["rows"]}
    assert moved["AdamW fused"] == 14 * 80
    assert moved["DeepMomentum"] == 22 * 80


def test_what_another_package_raises_is_its_result(monkeypatch):
    monkeypatch.setattr(optimizers, "OTHERS", ("torch Muon",))
    known = optimizers.matrix_optimizers("cpu")

    def broken(params):
        raise ImportError("not here")

    changed = {**known, "torch Muon": (broken, *known["torch Muon"][1:])}
    monkeypatch.setattr(optimizers, "matrix_optimizers", lambda device: changed)
    names = ("torch Muon", "DeepMomentum linear")
    found = matrices([(8, 12)], 0.0, names)(QUICK)
    assert found["rows"][1] == {"contender": "torch Muon", "not_run": "ImportError: not here"}


def test_torchs_fused_kernel_is_wrong_about_strides_and_ours_is_not():
    found = strides(QUICK, shape=(4, 3, 2, 2))
    errors = {row["contender"]: row["largest error"] for row in found["details"]}
    assert errors["DeepMomentum"] < 1e-6


def test_singular_values_are_compared_input_by_input():
    found = singular_values(QUICK, shapes=((16, 24),))
    assert len(found["details"]) == 3 * 3
    first, second = found["details"][:2]
    assert (first["contender"], second["contender"]) == ("torch Muon", "DeepMomentum")
    assert farther(found) > 0
    second["90% within"] = 8 * first["90% within"]
    assert farther(found) > 7


def test_the_inputs_have_the_condition_that_they_are_named_after():
    made = inputs(6, 9)["condition 1e+03"]
    values = torch.linalg.svdvals(made)
    assert float(values[0] / values[-1]) == pytest.approx(1e3, rel=1e-3)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_coordinate_mlps_rate_counts_a_tanh_in_two_ways(gradient, monkeypatch):
    monkeypatch.setattr(ops, "backend", lambda name: contextlib.nullcontext())
    found = coordinate_mlp(gradient, (2, 4, 5), 0.0)(QUICK)
    kernel = [d for d in found["details"] if d["contender"] == "kernel"]
    assert [d["FLOPs of a tanh"] for d in kernel] == [1, work.TANH_OPERATIONS]
    share = peak_share("kernel", 1).value(found)
    assert share == kernel[0]["of the float32 products' rate"] > 0


def test_the_exponent_is_that_of_the_power_law():
    points = [{"parameters": n, "ms": 3.0 * n**1.2} for n in (10, 100, 5000)]
    assert exponent(points) == pytest.approx(1.2)


@pytest.mark.parametrize("optimizer", ["elementwise", "delta"])
def test_scaling_measures_every_size_that_a_minute_allows(optimizer):
    sizes = (1e-4, 2e-4, 4e-4)
    found = scaling(optimizer, sizes, minute=60.0, side=4)(QUICK)
    assert [d["parameters"] for d in found["details"]] == pytest.approx([100, 200, 400], abs=8)
    found = scaling(optimizer, sizes, minute=0.0, side=4)(QUICK)
    assert len(found["details"]) == 1


def test_every_shape_is_a_bucket_and_memory_is_that_of_one():
    found = buckets(QUICK, count=2, repeats=2)
    assert {d["buckets"] for d in found["details"]} == {2}
    found = memory(QUICK, shapes=((8, 16), (16, 8)), count=2)
    assert {d["MB of a bucket"] for d in found["details"]} == {2 * 8 * 16 * 4 / 1e6}


def test_every_case_has_a_baseline_and_targets_name_its_contenders():
    for name, case in catalog.CASES.items():
        assert set(case.threads) <= {1, 2}, name
        assert case.title, name
