"""A run learns, and goes on bit for bit after it was stopped, killed or interrupted."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from deepopt.hope import files
from deepopt.hope import trainer as training
from deepopt.hope.optimizers import lr_factor
from deepopt.hope.train import Interrupt, interrupts, main
from deepopt.hope.trainer import Trainer
from deepopt.optim.registry import REGISTRY
from tests.hope.runs import (
    STEPS,
    StopAfter,
    arguments,
    assert_same_run,
    metrics,
    saved_step,
    train,
)


def test_training_learns_and_writes_its_outputs(config):
    config = dataclasses.replace(config, steps=40, lr=2e-2)
    result = train(config)
    lines = metrics(config.out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert [line["step"] for line in lines if "val_loss" in line] == list(range(4, 41, 4))
    watched = [line for line in lines if "diagnostics" in line]
    assert [line["step"] for line in watched] == list(range(4, 41, 4))
    model = Trainer(dataclasses.replace(config, out=config.out / "names")).model
    assert watched[0]["diagnostics"].keys() == {name for name, _ in model.named_parameters()}
    assert all(0 < row["ratio"] < 1 for row in watched[-1]["diagnostics"].values())
    assert lines[0]["bits_per_byte"] == pytest.approx(8, abs=1e-3)
    assert result.val_bits_per_byte < 6
    assert result.val_loss == lines[-1]["val_loss"]
    assert result.parameters == sum(p.numel() for p in Trainer(
        dataclasses.replace(config, out=config.out / "other")).model.parameters())  # fmt: skip
    assert 0.5 < result.state_floats_per_parameter < 4
    assert result.model_cpu_seconds > 0
    assert result.optimizer_cpu_seconds > 0
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (config.out / "samples.txt").read_text().count("=== prompt\n") == 2
    assert sorted(os.listdir(config.out)) == sorted(training.OUTPUTS)


@pytest.mark.filterwarnings("ignore:DeltaGradientDescent has captured no inputs:UserWarning")
@pytest.mark.parametrize("name", [e.cls.__name__ for e in REGISTRY.values() if not e.wraps])
def test_every_optimizer_trains_hope_at_the_default_rate(name, config):
    run = dataclasses.replace(config, optimizer=name, steps=30, eval_every=30)
    train(run)
    losses = [line["loss"] for line in metrics(config.out) if "loss" in line]
    assert len(losses) == 30
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2


def test_another_model_trains_by_the_same_loop(config):
    class Bigrams(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(256, 256)

        def forward(self, tokens, targets):
            loss = torch.nn.functional.cross_entropy(self.embedding(tokens).mT, targets)
            return SimpleNamespace(loss=loss)

    assert train(config, Bigrams).parameters == 256 * 256
    assert not (config.out / "samples.txt").exists()


def test_a_model_says_what_made_it(config, tmp_path):
    """Its command makes the same weights again; its digest is that of the file beside it."""
    config = dataclasses.replace(config, steps=3, warmup=1)
    result = train(config)
    about = json.loads((config.out / "training.json").read_text())
    weights = (config.out / "model.safetensors").read_bytes()
    assert about["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert about["data_sha256"] == Trainer(dataclasses.replace(config, out=tmp_path)).corpus.sha256
    assert about["val_bits_per_byte"] == pytest.approx(result.val_bits_per_byte, abs=1e-4)
    assert about["parameters"] == result.parameters

    python, _, module, *arguments = shlex.split(about["command"])
    assert (python, module) == ("python", "deepopt.hope.train")
    assert str(config.out) not in arguments
    assert main([*arguments, "--quiet", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert (
        json.loads((tmp_path / "again" / "training.json").read_text())["command"]
        == about["command"]
    )


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [lr_factor(step, 10, 4) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[-1] == pytest.approx(1 / 6)
    assert lr_factor(0, 10, 0) == 1


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 20, 800])
def test_the_warm_up_follows_the_number_of_steps_unless_it_is_given(config, steps):
    short = dataclasses.replace(config, steps=steps, warmup=None)
    assert short.warmup_steps == steps // 16
    assert dataclasses.replace(config, steps=800, warmup=None).warmup_steps == 50
    assert dataclasses.replace(config, steps=800, warmup=7).warmup_steps == 7


def test_a_run_must_not_become_part_of_its_own_text(config):
    inside = dataclasses.replace(config, data=config.data.parent)
    with pytest.raises(ValueError, match="lies inside data"):
        training.Trainer(inside)


# -- resuming --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DeepMomentum", "adamw", "MUON", "sgd", "adafactor"])
def test_stopped_run_goes_on_bit_for_bit(config, tmp_path, name):
    whole = dataclasses.replace(config, optimizer=name, out=tmp_path / "whole")
    broken = dataclasses.replace(config, optimizer=name, out=tmp_path / "broken")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        Trainer(broken).run(StopAfter(7))
    assert saved_step(broken.out) == 7
    saved = files.load(broken.out / "checkpoint.safetensors")
    assert any("pending_grad" in s for o in saved["optimizers"] for s in o["state"].values())
    torch.manual_seed(123)
    train(dataclasses.replace(broken, resume=True))
    assert_same_run(whole.out, broken.out)


@pytest.mark.parametrize("moment", ["os.replace", "torch.nn.utils.clip_grad_norm_"])
def test_killed_run_goes_on_bit_for_bit(config, tmp_path, moment):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole)
    # Killed while the checkpoint of step 10 is complete but not yet in place, or within step 13.
    in_place = moment == "os.replace"
    when = (
        "str(arguments[1]).endswith('.safetensors') and calls == 4" if in_place else "calls == 13"
    )
    program = f"""
import os, signal, sys, torch
from deepopt.hope.train import Interrupt, argument_parser, configurations, interrupts, main
torch.set_num_threads(1)
original, calls = {moment}, 0
def killing(*arguments, **options):
    global calls
    calls += 1
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)
{moment} = killing
main({arguments(config)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert saved_step(config.out) == (5 if in_place else 10)
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 14, "los')  # as if killed in the middle of a line
    assert main(arguments(config, "--resume")) == 0
    assert_same_run(whole.out, config.out)


def test_resuming_a_finished_run_changes_nothing(config):
    first = train(config)
    before = metrics(config.out)
    again = train(dataclasses.replace(config, resume=True))
    assert again.val_loss == first.val_loss
    assert metrics(config.out) == before


def test_a_finished_run_is_extended_by_more_steps(config, tmp_path):
    train(config)
    finished = metrics(config.out)
    longer = dataclasses.replace(config, steps=STEPS + 8, warmup=None, resume=True)
    with pytest.raises(KeyboardInterrupt):
        Trainer(longer).run(StopAfter(3))
    assert saved_step(config.out) == STEPS + 3
    train(longer)
    lines = metrics(config.out)
    assert lines[: len(finished)] == finished
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 9))
    # The warm-up stays that of the run, and the rate is that of a run of so many steps.
    rates = [config.lr * lr_factor(s, STEPS + 8, 3) for s in range(STEPS, STEPS + 8)]
    assert [line["lr"] for line in steps[STEPS:]] == pytest.approx(rates)
    assert max(line["loss"] for line in steps[STEPS:]) < steps[0]["loss"]

    at_once = dataclasses.replace(config, out=tmp_path / "at once")
    train(at_once)
    train(dataclasses.replace(longer, out=at_once.out))
    assert_same_run(at_once.out, config.out)


# -- signals ---------------------------------------------------------------------------------


def test_ctrl_c_saves_and_says_how_to_resume(config, tmp_path, monkeypatch, capsys):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole)
    sample = training.sample_batch
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it

    def interrupted(data, batch_size, seq_len, seed, step):
        if step == 7 and batch_size == config.batch_size:
            signal.raise_signal(signal.SIGINT)
        return sample(data, batch_size, seq_len, seed, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "sample_batch", interrupted)
        assert main(arguments(config)) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert saved_step(config.out) == 8
    assert f"--out={config.out}" in (message := capsys.readouterr().err)
    assert message.rstrip().endswith("--resume")
    assert main(arguments(config, "--resume")) == 0
    assert_same_run(whole.out, config.out)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_save_and_end_the_process_with_their_own_code(config, number, code):
    endless = arguments(config, "--steps=9999999", "--save-every=9999999", "--eval-every=9999999")
    command = [sys.executable, "-m", "deepopt.hope.train", *endless]
    # A background job of a shell ignores SIGINT, one under nohup SIGHUP, and children inherit that.
    ignored = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, text=True)  # fmt: skip
    finally:
        signal.signal(number, ignored)
    try:
        began = time.monotonic()
        while not (config.out / "metrics.jsonl").exists() and time.monotonic() < began + 60:
            time.sleep(0.01)
        run.send_signal(number)
        message = run.communicate(timeout=60)[1]
    finally:
        run.kill()
    assert run.returncode == code, message
    assert "Traceback" not in message
    assert message.rstrip().endswith("--resume")
    steps = saved_step(config.out)
    assert steps > 0
    assert [line["step"] for line in metrics(config.out)] == list(range(1, steps + 1))


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_is_real_whichever_it_is(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whose effect can be seen
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup
    try:
        with interrupts() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.is_set()
            assert stop.signal == signal.SIGHUP
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)


# -- numbers that are not finite -------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_loss_stops_and_keeps_the_checkpoint(config, monkeypatch, capsys, value):
    forward = training.Hope.forward

    def diverging(self, tokens, targets=None, state=None):
        output = forward(self, tokens, targets, state)
        steps[0] += torch.is_grad_enabled()
        return output._replace(loss=output.loss * value) if steps[0] == 8 else output

    steps = [0]
    monkeypatch.setattr(training.Hope, "forward", diverging)
    assert main(arguments(config)) == 1
    assert f"the loss is {value} at step 8" in capsys.readouterr().err
    state = files.load(config.out / "checkpoint.safetensors")
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def weights_become(value: float, monkeypatch, step: int) -> None:
    """The optimizer makes a weight of this value in a step."""
    train_step = Trainer.train_step

    def breaking(self, watched=False):
        result = train_step(self, watched)
        if self.step == step:
            self.model.head.weight.data[0, 0] = value
        return result

    monkeypatch.setattr(Trainer, "train_step", breaking)


@pytest.mark.parametrize("step", [10, 11, STEPS])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(
    config, monkeypatch, capsys, step, value
):
    """Also where no step sees them: before a checkpoint, at an interruption, at the end."""
    weights_become(value, monkeypatch, step)
    if step == 11:
        monkeypatch.setattr(Interrupt, "is_set", lambda self: next(asked) == 11)
        asked = iter(range(1, 99))
    code = main(arguments(config, "--eval-every=100"))
    assert code == 1
    assert re.search(r"the \D+ is (nan|-?inf) at step", capsys.readouterr().err)
    state = files.load(config.out / "checkpoint.safetensors")
    assert state["step"] == (5 if step == 10 else 10)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
