"""The page about the MLP memory: every number of it is computed from lines and from read-outs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.mlp_memory import SEEDS, forgotten, norms, on_stream, read_outs, weight
from benchmarks.mlp_memory import main as write_page
from benchmarks.streams.command import LINEAR, MLP, sweep
from benchmarks.streams.runs import Run
from deepopt.memory.horizons import HAND_MADE

RESULTS = Path(__file__).parents[2] / "docs/results"


def test_the_committed_page_is_what_the_command_makes_of_the_committed_lines(tmp_path):
    for name in ("quality", "mlp-memory"):
        shutil.copytree(RESULTS / name, tmp_path / name)
    shutil.copy(RESULTS / "streams.jsonl", tmp_path)
    made = tmp_path / "mlp-memory/gate.md"
    made.unlink()
    assert write_page(["--out", str(tmp_path)]) == 0
    assert made.read_text() == (RESULTS / "mlp-memory/gate.md").read_text()


def test_a_folder_without_read_outs_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        write_page(["--out", str(tmp_path)])
    assert "no phi.json" in capsys.readouterr().err


@pytest.mark.parametrize(("ours", "status"), [(0.9, "met"), (1.1, "NOT met")])
def test_on_a_stream_the_memories_with_the_lowest_means_are_compared(ours, status):
    lines = {}
    measured = {MLP[0]: ours + 1.0, MLP[1]: ours, LINEAR[0]: 1.0, LINEAR[1]: 2.0}
    for contender, loss in measured.items():
        for run in sweep("regimes", contender):
            for seed in range(SEEDS):
                key = Run(run.task, run.optimizer, run.beta, run.lr, seed)
                lines[key] = {"loss": loss + run.lr + 0.001 * seed}
    row = on_stream("regimes", "mlp", lines)
    assert row[1].startswith(f"{ours - 1:+.4f}")
    assert row[-1] == status
    for contender in MLP[:2]:
        del lines[Run("regimes", *contender, sweep("regimes", contender)[0].lr, 1)]
    assert on_stream("regimes", "mlp", lines)[-1] == "not run"


@pytest.mark.parametrize(
    ("loss", "ours", "status"),
    [(0.9, 0.7, "met"), (0.9, 0.9, "NOT met"), (1.1, 0.7, "NOT met")],
)
def test_less_is_forgotten_than_by_the_best_linear_memory_only_at_no_larger_a_loss(
    loss, ours, status
):
    lines = {}
    measured = {MLP[0]: (loss, ours), LINEAR[0]: (1.0, 1.0), LINEAR[1]: (2.0, 9.0)}
    for contender, found in measured.items():
        for run in sweep("regimes", contender):
            for seed in range(SEEDS):
                key = Run(run.task, run.optimizer, run.beta, run.lr, seed)
                lines[key] = {"loss": found[0] + run.lr, "forgotten": found[1]}
    assert forgotten("regimes", "mlp", lines)[1::2] == [f"{ours:.2f}", status]
    del lines[Run("regimes", *MLP[0], sweep("regimes", MLP[0])[0].lr, 1)]["forgotten"]
    assert forgotten("regimes", "mlp", lines)[-1] == "not run"


def test_the_closed_form_answers_as_it_is_written():
    """clip(1.2 - 2 c1 / max c, 0, 1), but for the share of the other average."""
    phi = torch.tensor(HAND_MADE, dtype=torch.float64)
    share = torch.tensor([0.1, 0.4, 0.5, 0.8], dtype=torch.float64)
    found = weight(phi, 0.7, torch.full_like(share, 0.99), share)
    torch.testing.assert_close(found, (1.2 - 2 * share).clamp(0, 1), atol=0.02, rtol=0)


def test_norms_are_those_that_averages_of_a_steady_gradient_under_noise_have():
    best = torch.tensor(0.6, dtype=torch.float64)
    expected = norms(0.7, best)
    torch.manual_seed(0)
    entries = 20_000
    steady = torch.randn(entries, dtype=torch.float64)
    short = long = torch.zeros(entries, dtype=torch.float64)
    # The steady part for which the short average has the cosine 0.6 with a gradient.
    a = best * expected[1]
    sizes, cosines = [], []
    for step in range(400):
        noise = torch.randn(entries, dtype=torch.float64)
        grad = a.sqrt() * steady + (1 - a).sqrt() * noise
        if step > 100:
            cosines.append(torch.cosine_similarity(grad, short, dim=0))
            sizes.append(torch.stack([long.norm(), short.norm()]) / entries**0.5)
        long, short = 0.9 * long + 0.1 * grad, 0.7 * short + 0.3 * grad
    torch.testing.assert_close(torch.stack(sizes).mean(0), expected, atol=0.01, rtol=0)
    torch.testing.assert_close(torch.stack(cosines).mean(), best, atol=0.01, rtol=0)


def test_a_search_with_two_short_averages_is_left_out(tmp_path):
    found = {"memory": "horizons", "time_scales": [0.5, 0.7], "phi": [[0.0] * 11]}
    (tmp_path / "both").mkdir()
    (tmp_path / "both/phi.json").write_text(json.dumps(found))
    assert list(read_outs(tmp_path)) == ["by hand, .7"]


def test_every_search_for_horizons_is_shown():
    names = ["by hand, .7", "trained, .7", "trained, .5", "trained, 0"]
    assert list(read_outs(RESULTS / "mlp-memory")) == names
