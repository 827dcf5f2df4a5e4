import json
import math

import pytest
import torch
from torch import nn

from benchmarks import fig4
from benchmarks.fig4 import MOMENTUM, Method, Surface
from deepopt import DeltaMomentum, PreconditionedMomentum

SURFACE = Surface(10.0, 0.5, 3.0)


@pytest.mark.parametrize(
    ("method", "make"),
    [
        (MOMENTUM, PreconditionedMomentum),
        (Method("implicit"), DeltaMomentum),
        (Method("implicit", "scalars"), DeltaMomentum),
        (Method("derived"), lambda p, **k: DeltaMomentum(p, rule="derived", **k)),
        (Method("implicit", inner=0.1), lambda p, **k: DeltaMomentum(p, inner_lr=1e-6, **k)),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_a_row_of_the_batch_is_the_optimizer_on_that_surface(method, make):
    settings = [(5e-6, 0.5), (1e-5, 0.9)]
    points, values = fig4.trajectories(method, settings, [Surface(1, 1, 1), SURFACE], 20)
    start = torch.tensor(fig4.START, dtype=torch.float64)
    if method.unit == "vector":
        params = [nn.Parameter(start.clone())]
    else:
        params = [nn.Parameter(x.clone()) for x in start]
    optimizer = make(params, lr=1e-5, betas=(0.9, 0.999))
    for step in range(20):
        point = params[0] if method.unit == "vector" else torch.stack(params)
        torch.testing.assert_close(points[step, 1, 1], point.detach())
        value = point[0] ** 2 + 10 * (point[0] - point[1] + 0.5 * torch.sin(3 * point[0])) ** 2
        torch.testing.assert_close(values[step, 1, 1], value.detach())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def test_arriving_is_staying():
    values = torch.ones(6, 1, 4)
    values[1, 0, 0] = 0  # passes through
    values[3:, 0, 1] = 0
    values[:, 0, 2] = math.nan
    values[5, 0, 3] = 0
    assert fig4.steps_to_reach(values).tolist() == [[math.inf, 3, math.inf, 5]]


def test_the_command_writes_tables_lines_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fig4, "LEARNING_RATES", (0.0032, 0.0064))
    monkeypatch.setattr(fig4, "SETTINGS", ((0.0032, 0.9), (0.0064, 0.9)))
    assert fig4.main(["--out", str(tmp_path), "--steps", "300"]) == 0
    text = (tmp_path / "fig4.md").read_text()
    assert "| momentum | 7 of 12 | 204 | 0 / 0 |" in text
    assert "| literal, vector | 0 of 12 | - |" in text
    assert capsys.readouterr().out == text
    lines = [json.loads(line) for line in (tmp_path / "fig4.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(fig4.METHODS)
    assert {len(line["steps"]) for line in lines} == {12}
    assert (tmp_path / "fig4.png").read_bytes().startswith(b"\x89PNG")
