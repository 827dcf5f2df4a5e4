"""Runs that are interrupted, killed and resumed, and what a user can get wrong about them."""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from deepopt.hope import HopeConfig, files, report
from deepopt.hope import trainer as training
from deepopt.hope.train import Interrupt, argument_parser, configurations, interrupts, main
from deepopt.hope.trainer import TrainConfig, Trainer
from deepopt.optim.registry import REGISTRY

# The slow CMS level learns every fourth step, so that interruptions leave gradients pending.
MODEL = {"dim": 16, "layers": 1, "heads": 1, "memory_chunk": 8, "projection_chunk": 16}
SIZES = HopeConfig(**MODEL, cms_chunks=(16, 128))
STEPS = 14


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    return path


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    samples = Trainer.samples
    monkeypatch.setattr(Trainer, "samples", lambda self, model: samples(self, model, 2, 8, 8))


@pytest.fixture
def config(tmp_path, text):
    return TrainConfig(
        out=tmp_path / "run", data=text, steps=STEPS, warmup=3, batch_size=2, seq_len=16,
        eval_every=4, eval_windows=4, save_every=5, quiet=True, model=SIZES,
    )  # fmt: skip


def train(config, build_model=None):
    return Trainer(config, build_model).run()


def arguments(config: TrainConfig, *more: str) -> list[str]:
    names = ("out", "data", "steps", "warmup", "batch_size", "seq_len", "eval_every",
             "eval_windows", "save_every")  # fmt: skip
    options = {name: getattr(config, name) for name in names} | MODEL
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [*flags, "--cms-chunks", "16", "128", "--quiet", *more]


class StopAfter(threading.Event):
    """Set once it has been asked for a number of times, which a run does once per step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


def metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("cpu_seconds")} for line in lines]


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    assert_same(*(files.load(out / "checkpoint.safetensors") for out in (a, b)))
    assert metrics(a) == metrics(b)
    assert (a / "samples.txt").read_text() == (b / "samples.txt").read_text()


def saved_step(out: Path) -> int:
    return files.load(out / "checkpoint.safetensors")["step"]


# -- a run -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": True, "projections": False, "memory_hidden": 0, "cms_chunks": (64,)},
        {"max_erase": 0.5, "cms_variant": "nested", "recompute": True},
    ],
    ids=str,
)
def test_the_command_of_a_run_has_the_options_that_are_not_the_defaults(options, tmp_path):
    config = TrainConfig(
        out=tmp_path, model=HopeConfig(**options), lr=1e-2, eval_every=7, quiet=True
    )
    arguments = shlex.split(config.command)[3:]
    parsed = configurations(argument_parser().parse_args([*arguments, f"--out={tmp_path}"]))
    assert parsed == [dataclasses.replace(config, eval_every=TrainConfig.eval_every, quiet=False)]
    if not options:
        assert arguments == ["--lr", "0.01"]


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


def test_learning_rate_rises_to_its_peak_and_falls_to_zero():
    factors = [training.lr_factor(step, 10, 4) for step in range(10)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[-1] == pytest.approx(1 / 6)
    assert training.lr_factor(0, 10, 0) == 1


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


@pytest.mark.parametrize("steps", [1, 2, 15, 16, 20, 800])
def test_the_warm_up_follows_the_number_of_steps_unless_it_is_given(config, steps):
    short = dataclasses.replace(config, steps=steps, warmup=None)
    assert short.warmup_steps == steps // 16
    assert dataclasses.replace(config, steps=800, warmup=None).warmup_steps == 50
    assert dataclasses.replace(config, steps=800, warmup=7).warmup_steps == 7


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
    rates = [config.lr * training.lr_factor(s, STEPS + 8, 3) for s in range(STEPS, STEPS + 8)]
    assert [line["lr"] for line in steps[STEPS:]] == pytest.approx(rates)
    assert max(line["loss"] for line in steps[STEPS:]) < steps[0]["loss"]

    at_once = dataclasses.replace(config, out=tmp_path / "at once")
    train(at_once)
    train(dataclasses.replace(longer, out=at_once.out))
    assert_same_run(at_once.out, config.out)


def test_a_run_is_not_cut_short_by_fewer_steps(config, capsys):
    train(config)
    message = wrong(arguments(config, "--resume", "--steps=10"), capsys)
    assert "steps=14 there and 10 here" in message


def test_resuming_a_finished_run_changes_nothing(config):
    first = train(config)
    before = metrics(config.out)
    again = train(dataclasses.replace(config, resume=True))
    assert again.val_loss == first.val_loss
    assert metrics(config.out) == before


def test_comparison_starts_both_from_the_same_weights_and_resumes(config, monkeypatch, capsys):
    assert main(arguments(config, "--compare", "adamw", "--memory", "delta")) == 0
    runs = [config.out / "deepmomentum", config.out / "adamw"]
    first, second = (metrics(out)[0] for out in runs)
    assert {k: first[k] for k in ("loss", "grad_norm")} == {
        k: second[k] for k in ("loss", "grad_norm")
    }
    assert metrics(runs[0])[-1] != metrics(runs[1])[-1]
    assert (config.out / "comparison.png").exists()
    assert "DeepMomentum: " in (output := capsys.readouterr().out)
    assert output.count(" MFLOP per token in the forward pass") == 1
    assert "AdamW: " in output

    # The second had not begun when the comparison was interrupted.
    before = metrics(runs[1])
    for name in training.OUTPUTS:
        (runs[1] / name).unlink()
    assert main(arguments(config, "--compare", "adamw", "--memory", "delta", "--resume")) == 0
    assert metrics(runs[1]) == before


# -- what goes wrong ---------------------------------------------------------------------------


def wrong(arguments: list[str], capsys) -> str:
    """The message of a command line that is refused, on one line and without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_run_is_not_overwritten_unasked(config, capsys):
    train(config)
    before = {name: (config.out / name).read_bytes() for name in training.OUTPUTS}
    assert "holds a run already" in wrong(arguments(config), capsys)
    assert before == {name: (config.out / name).read_bytes() for name in training.OUTPUTS}
    assert "exclude each other" in wrong(arguments(config, "--resume", "--overwrite"), capsys)
    assert main(arguments(config, "--overwrite", "--seed=1")) == 0
    assert (config.out / "metrics.jsonl").read_bytes() != before["metrics.jsonl"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--lr=0.5"], "lr=0.004 there and 0.5 here"),
        (["--optimizer=adamw"], "optimizer='DeepMomentum' there and 'AdamW' here"),
        (["--memory=delta"], "memory=None there and 'delta' here"),
        (["--dim=32"], "dim=16 there and 32 here"),
        (["--cms-chunks", "16"], "cms_chunks=[16, 128] there and [16] here"),
    ],
)
def test_checkpoint_of_another_run_is_refused(config, capsys, change, named):
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run(StopAfter(2))
    message = wrong(arguments(config, "--resume", *change), capsys)
    assert named in message
    assert message.count(" there and ") == 1


def test_checkpoint_of_other_data_is_refused(config, text, capsys):
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run(StopAfter(2))
    text.write_text(text.read_text() + "more")
    assert "data_sha256=" in wrong(arguments(config, "--resume"), capsys)


def test_nothing_to_resume_and_damaged_checkpoints_are_named(config, capsys):
    assert "holds no checkpoint" in wrong(arguments(config, "--resume"), capsys)
    config.out.mkdir()
    path = config.out / "checkpoint.safetensors"
    path.write_bytes(b"damaged")
    assert "is damaged or not a checkpoint" in wrong(arguments(config, "--resume"), capsys)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    assert "is not a checkpoint of this program" in wrong(arguments(config, "--resume"), capsys)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--optimizer=adamx"], "optimizer='adamx' is unknown or not for this; choose one of"),
        (["--optimizer=lbfgs"], "optimizer='lbfgs' is unknown"),
        (["--memory=none"], "Invalid memory: 'none'"),
        (["--optimizer=sgd", "--memory=delta"], "memory='delta': SGD has none"),
        (["--compare=deepmomentum"], "compare=DeepMomentum is the optimizer of the run itself"),
        (["--lr=-1"], "Invalid learning rate: -1"),
        (["--steps=0"], "steps=0: must be at least 1"),
        (["--warmup=14"], "warmup=14: must be at least 0 and below steps=14"),
        (["--threads=0"], "threads=0: must be from 1 to "),
        (["--seq-len=99999"], "seq_len=99999 needs at least 100000 bytes"),
        (["--dim=15", "--heads=2"], "dim=15: must be a multiple of heads=2"),
        (["--data=nowhere"], "nowhere does not exist"),
        (["--device=none"], "device='none': cannot be used here"),
    ],
)
def test_wrong_input_is_named_without_a_traceback(config, capsys, options, named):
    assert named in wrong(arguments(config, *options), capsys)
    assert not config.out.exists()


def test_full_disk_keeps_the_last_checkpoint(config, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:  # the second checkpoint within the run, after its metrics
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(arguments(config)) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "--resume" in message
    assert saved_step(config.out) == 5
    assert not list(config.out.glob("*.tmp"))
    assert main(arguments(config, "--resume")) == 0


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


@pytest.mark.parametrize("rate", ["1e2", "1e6", "1e30"])
@pytest.mark.parametrize("steps", ["2", "3", "20"])
def test_a_rate_that_diverges_ends_with_a_code_that_tells(config, capsys, rate, steps):
    code = main(arguments(config, "--warmup=0", f"--lr={rate}", f"--steps={steps}"))
    said = capsys.readouterr()
    learned = re.search(r"([\d.]+) bits per byte on held-out", said.out)
    if code == 0:  # it may be at home again where the last step has brought it
        assert float(learned[1]) <= 16
    else:
        assert code == 1
        assert "with a smaller lr" in said.err
    assert code == 1 or steps != "20"


# -- an output that nobody reads ---------------------------------------------------------------


@pytest.mark.parametrize(("flags", "both"), [([], False), (["-OO"], True)])
def test_a_run_outlives_those_who_read_what_it_says(config, flags, both):
    command = [sys.executable, *flags, "-m", "deepopt.hope.train", *arguments(config)]
    command.remove("--quiet")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=write if both else subprocess.PIPE)
    finally:
        os.close(write)
    assert done.returncode == 0, done.stderr
    assert both or b"Error" not in done.stderr
    assert saved_step(config.out) == STEPS
    assert (config.out / "loss.png").exists()


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ([], "deepopt.hope.train --help"),
        ([], "deepopt.optim"),
        ([], "deepopt.ops"),
        ([], "benchmarks --help"),
        (["-OO"], "deepopt.optim"),
        (["-OO"], "benchmarks --help"),
    ],
)
def test_commands_say_nothing_about_pipes_that_close_early(flags, command):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, *flags, "-m", *command.split()],
                              stdout=write, stderr=subprocess.PIPE, text=True)  # fmt: skip
    finally:
        os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


# -- help --------------------------------------------------------------------------------------


def test_help_describes_every_option_also_where_python_drops_docstrings():
    environment = {**os.environ, "COLUMNS": "200"}
    shown = []
    for flags in ([], ["-OO"]):
        command = [sys.executable, *flags, "-m", "deepopt.hope.train", "--help"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    assert shown[0] == shown[1]
    for field in (*dataclasses.fields(TrainConfig), *dataclasses.fields(HopeConfig)):
        if field.name in ("model", "vocab_size"):
            continue
        assert re.search(rf"--{field.name.replace('_', '-')}\b", shown[0]), field.name
        assert field.metadata["help"] in " ".join(shown[0].split()), field.name


@pytest.mark.parametrize("cls", [TrainConfig, HopeConfig])
def test_the_docstring_of_a_configuration_has_its_options(cls):
    for field in dataclasses.fields(cls):
        assert field.name == "model" or f"    {field.name}: " in cls.__doc__
    assert "Args:" in cls.__doc__


# -- checkpoints -------------------------------------------------------------------------------


def test_checkpoint_keeps_types_and_shared_storage(tmp_path):
    whole = torch.arange(6.0).view(2, 3)
    state = {
        "views": {0: whole[0], 1: whole[1], "transposed": whole.t()},
        "narrow": [whole.bfloat16(), torch.zeros((), dtype=torch.int64), torch.zeros(0, 3)],
        "plain": (None, True, 1, 0.1, float("inf"), "text", [], {}, ()),
    }
    files.save(tmp_path / "c", state)
    assert_same(files.load(tmp_path / "c"), state)


def test_a_checkpoint_with_any_byte_changed_or_missing_is_refused(tmp_path):
    path = tmp_path / "c"
    files.save(path, {"a": torch.arange(3.0), "text": '"sha256":"', "b": {0: (1, None)}})
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))] + [whole + b" "]
    for at, byte in enumerate(whole):
        for flipped in {byte ^ 1, byte ^ 32, byte ^ 128, 32} - {byte}:
            damaged.append(whole[:at] + bytes([flipped]) + whole[at + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not a checkpoint"):
            files.load(path)
    path.write_bytes(whole)
    assert files.load(path)["a"].tolist() == [0, 1, 2]


def test_a_damaged_checkpoint_does_not_resume(config, capsys):
    train(config)
    path = config.out / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert "is damaged (it differs from its checksum)" in wrong(
        arguments(config, "--resume"), capsys
    )


def test_a_checkpoint_from_before_the_checksum_loads(tmp_path):
    path = tmp_path / "c"
    files.save(path, {"a": torch.arange(3.0)})
    with safetensors.safe_open(path, "pt") as file:
        old = {"format": "deepopt.hope.checkpoint/1", "state": file.metadata()["state"]}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(tensors, old))
    assert_same(files.load(path), {"a": torch.arange(3.0)})


def test_checkpoint_refuses_what_is_not_data(tmp_path):
    with pytest.raises(TypeError, match="cannot hold /a/0, a object"):
        files.save(tmp_path / "c", {"a": [object()]})
    assert not (tmp_path / "c").exists()


def test_a_run_must_not_become_part_of_its_own_text(config):
    inside = dataclasses.replace(config, data=config.data.parent)
    with pytest.raises(ValueError, match="lies inside data"):
        training.Trainer(inside)


def test_progress_shows_loss_bits_and_speed(config, capsys):
    train(dataclasses.replace(config, quiet=False))
    shown = capsys.readouterr().err
    assert re.search(r"DeepMomentum step \d+/14: held out: loss \d\.\d+, \d\.\d+ bits/byte", shown)


def test_a_bar_on_a_terminal_shows_loss_bits_and_speed(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    with report.Progress("AdamW", 3, 5, tokens_per_step=100, quiet=False) as progress:
        progress.show(2.0)
        progress.show_validation(1.0)
        progress.show(1.5)
    shown = terminal.getvalue()
    assert re.search(r"AdamW: 100%.*5/5 .*loss 1\.500, 2\.164 bits/byte, [\d,]+ tokens/s", shown)
    assert "step 4: held out: loss 1.000, 1.443 bits/byte" in shown


@pytest.mark.filterwarnings("ignore:DeltaGradientDescent has captured no inputs:UserWarning")
@pytest.mark.parametrize("name", [e.cls.__name__ for e in REGISTRY.values() if not e.wraps])
def test_every_optimizer_trains_hope_at_the_default_rate(name, config):
    run = dataclasses.replace(config, optimizer=name, steps=30, eval_every=30)
    train(run)
    losses = [line["loss"] for line in metrics(config.out) if "loss" in line]
    assert len(losses) == 30
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2
