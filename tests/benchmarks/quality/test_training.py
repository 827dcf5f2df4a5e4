"""A run: several batches in a step, levels at their chunks, averaged weights, what a line has."""

import pytest
import torch
from torch import nn

import benchmarks
from benchmarks.quality import contenders, language, training
from benchmarks.quality.contenders import Contender, Setting, build
from benchmarks.quality.training import Run, execute, tensor_bytes
from deepopt.hope import Hope, HopeConfig


def linear(batch, steps_at=1):
    """A workload whose batches of `batch` rows are cut from the same endless table."""

    def data(seed, step):
        rows = [
            torch.randn(3, generator=torch.Generator().manual_seed(step * batch + row))
            for row in range(batch)
        ]
        x = torch.stack(rows)
        return x, x.sum(1, keepdim=True)

    def loss(model, pair):
        return (model(pair[0]) - pair[1]).square().mean()

    def model():
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    return benchmarks.workload(data=data, model=model, loss=loss, steps=4)


def test_several_batches_in_a_step_are_one_batch_of_all_their_examples(monkeypatch):
    sizes = {"small": linear(2), "large": linear(6)}
    monkeypatch.setattr(training, "find", sizes.get)
    setting = Setting(1e-2)
    three = execute(Run("small", "AdamW", setting, 0, 4, batch=3))
    one = execute(Run("large", "AdamW", setting, 0, 4))
    assert three["batch"] == 3
    assert three["curve"] == pytest.approx(one["curve"], abs=2e-5)


def test_lines_from_before_there_were_batches_and_devices_are_runs_of_one_batch_on_the_cpu():
    line = {"workload": "w", "contender": "AdamW", "setting": Setting(1e-3)._asdict()}
    assert Run.of({**line, "seed": 1, "steps": 2}) == Run(
        "w", "AdamW", Setting(1e-3), 1, 2, 1, "cpu"
    )


def hope(with_tokens):
    def data(seed, step):
        tokens = torch.full((2, 16), step % 7)
        return language.Text(tokens, tokens) if with_tokens else (tokens, tokens)

    def loss(model, batch):
        return model(*batch).loss

    config = HopeConfig(dim=16, layers=1, heads=1, cms_chunks=(16, 128))
    return benchmarks.workload(data=data, model=lambda: Hope(config), loss=loss)


def test_levels_of_a_model_learn_at_the_end_of_their_chunk_of_tokens(monkeypatch):
    monkeypatch.setattr(training, "find", {"hope": hope(True)}.get)
    for batch, chunk_steps in ((1, 4), (2, 2)):
        run = Run("hope", "AdamW", Setting(1e-3), 0, 8, batch=batch)
        model = hope(True).model()
        tokens = training.tokens_of_step(run, model)
        assert tokens == 32 * batch
        optimizer = build(model, "AdamW", run.setting, run.steps, tokens)
        chunks = {group["chunk"] for group in optimizer.param_groups}
        assert chunks == {1, 16, 128}
        assert 128 // tokens == chunk_steps


def test_a_model_with_levels_needs_batches_with_tokens(monkeypatch):
    monkeypatch.setattr(training, "find", {"hope": hope(False)}.get)
    with pytest.raises(ValueError, match="data must return a batch with its tokens"):
        execute(Run("hope", "AdamW", Setting(1e-3), 0, 2))


class Averaging(torch.optim.SGD):
    """It tells its modes apart, and keeps the rates that it was given."""

    def __init__(self, params, lr, weight_decay, momentum=0.0):
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay)
        self.modes, self.rates = [], []

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")

    def step(self, closure=None):
        self.modes.append("step")
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.parametrize("decays", [True, False])
def test_an_optimizer_with_modes_trains_in_one_and_is_measured_in_the_other(decays, monkeypatch):
    made = []

    def create(groups, name, lr, weight_decay, **options):
        made.append(Averaging(groups, lr, weight_decay, **options))
        return made[-1]

    entry = Contender("sgd", ({}, {}), momentum="momentum", rate_decays=decays)
    monkeypatch.setitem(contenders.CONTENDERS, "Averaging", entry)
    monkeypatch.setattr(contenders.deepopt, "create_optimizer", create)
    monkeypatch.setattr(training, "find", {"small": linear(2)}.get)
    line = execute(Run("small", "Averaging", Setting(1e-3), 0, 32))
    assert made[0].modes == ["train", *["step"] * 32, "eval"]
    assert made[0].rates[:2] == [pytest.approx(0.5e-3), pytest.approx(1e-3)]
    assert made[0].rates[-1] == pytest.approx(1e-3 / 30 if decays else 1e-3)
    assert "metrics" in line


def test_bytes_of_nested_states_count():
    state = {"step": 3, "basis": [torch.zeros(2, 2), []], "average": torch.zeros(3)}
    assert tensor_bytes(state) == 4 * (4 + 3)


def test_batches_are_moved_with_the_form_they_have():
    text = language.Text(torch.zeros(2), torch.ones(2))
    found = training.moved({"a": text, "b": [torch.zeros(1)], "c": "name"}, "meta")
    assert found["a"].tokens.device.type == "meta"
    assert found["b"][0].device.type == "meta"
    assert isinstance(found["a"], language.Text)
    assert found["c"] == "name"
