import json
import re

import pytest
import torch

pytest.importorskip("cmaes", reason="the extra deepopt-torch[meta] is not installed")

from deepopt.meta import __main__ as command
from deepopt.meta.evolution import Evolution, Log

SMALL = Evolution(population=4, pool=2, tasks=1, steps=(10, 12))


def test_a_search_that_was_interrupted_goes_on_bit_for_bit(tmp_path):
    whole, torn = Log(tmp_path / "whole"), Log(tmp_path / "torn")
    expected = SMALL.run(whole, 3)
    SMALL.run(torn, 2)
    with open(torn.path, "a") as file:
        file.write('{"is": "generation", "numb')  # a kill in the middle of a line
    assert torch.equal(SMALL.run(Log(torn.path), 3), expected)
    assert torn.path.read_text() == whole.path.read_text()


def test_a_baseline_from_before_tasks_had_a_field_is_found_again(tmp_path):
    log = Log(tmp_path / "log")
    (task,) = SMALL.tasks_of(0)
    measured = SMALL.baseline(task, log)
    (line,) = log.of("baseline")
    del line["task"]["scale"]
    assert SMALL.baseline(task, log) == measured
    assert len(log.of("baseline")) == 1


def test_another_search_does_not_go_on_from_the_log(tmp_path):
    SMALL.run(Log(tmp_path / "log"), 0)
    with pytest.raises(ValueError, match=r"Invalid log: .*give another folder"):
        Evolution(seed=1).run(Log(tmp_path / "log"), 1)


def test_a_log_that_leads_elsewhere_or_is_longer_than_asked_for_is_refused(tmp_path):
    log = Log(tmp_path / "log")
    SMALL.run(log, 2)
    with pytest.raises(ValueError, match=r"Invalid generations: 1; .* has 2: ask for as many"):
        SMALL.run(log, 1)
    log.of("generation")[1]["mean"][0] += 1e-3
    with pytest.raises(ValueError, match=r"Invalid log: generation 1 .*another processor"):
        SMALL.run(log, 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--population 1", "Invalid population: 1; it must be at least 2"),
        ("--pool 0", "Invalid pool: 0"),
        ("--tasks 0", "Invalid tasks: 0"),
        ("--units 0", "Invalid units: 0"),
        ("--seed -1", "Invalid seed: -1"),
        ("--steps 40 20", r"Invalid steps: \(40, 20\)"),
        ("--steps 0 0", r"Invalid steps: \(0, 0\)"),
        ("--time-scales 1.5", r"Invalid time_scales: \(1.5,\)"),
        ("--memory rows --time-scales .3", "--time-scales: rows have none"),
        ("--generations 0", "--generations: 0 must be at least 1"),
        ("--validation 1", "--validation: 1 must be at least 2"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_writes_anything(tmp_path, capsys, wrong, said):
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "out"), *wrong.split()])
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_file_for_its_folder_and_ends_quietly_when_interrupted(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        command.main(["--out", str(tmp_path / "file")])
    assert "file" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evolution, "run", interrupted)
    assert command.main(["--out", str(tmp_path / "out")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_few_generations_are_better_than_the_start(tmp_path):
    """A stream with little noise, on which a short average is far better than the mean of two."""
    search = Evolution(population=6, pool=1, tasks=1, steps=(100, 100))
    log = Log(tmp_path / "log")
    phi = search.run(log, 6)
    values = [torch.tensor(line["values"]).median().item() for line in log.of("generation")]
    assert values[-1] < values[0] - 0.005
    (task,) = search.tasks_of(0)
    found, start, linear = search.relative(
        task, torch.stack([phi, search.start(), torch.zeros_like(phi)]), log
    ).tolist()
    assert found < start < linear


def test_a_generation_goes_round_the_pool_before_a_task_comes_again():
    search = Evolution(pool=6, tasks=2)
    for rounds in range(2):
        seeds = [task.seed for k in range(3) for task in search.tasks_of(3 * rounds + k)]
        assert sorted(seeds) == list(range(6))


def test_the_start_is_the_mean_of_the_averages():
    from deepopt.ops.horizons_write import mixing_weights

    for scales, share in (((0.7,), 1 / 2), ((0.5, 0.97), 1 / 3)):
        search = Evolution(time_scales=scales)
        features = torch.randn(2, 2 * len(scales) + 4, dtype=torch.float64)
        weights = mixing_weights(search.start().expand(2, *search.start().shape), features)
        torch.testing.assert_close(weights, torch.full_like(weights, share))


def test_the_command_leaves_what_it_found_with_what_made_it(tmp_path, capsys):
    arguments = "--generations 2 --validation 2 --population 4 --pool 2 --tasks 1 --steps 10 12"
    assert command.main(["--out", str(tmp_path), *arguments.split()]) == 0
    outcome = json.loads((tmp_path / "phi.json").read_text())
    assert torch.tensor(outcome["phi"]).shape == (2, 8)
    assert outcome["generations"] == 2
    assert outcome["time_scales"] == [0.5]
    assert {name: len(x) for name, x in outcome["validation"].items()} == {
        "linear": 2, "start": 2, "trained": 2,
    }  # fmt: skip
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert "streams: linear" in capsys.readouterr().out
