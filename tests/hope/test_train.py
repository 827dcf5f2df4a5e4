"""``python -m deepopt.hope.train``: its help, its refusals, and what it says while it runs."""

import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys

import pytest

from deepopt.hope import HopeConfig, optimizers, report
from deepopt.hope import trainer as training
from deepopt.hope.train import argument_parser, configurations, main
from deepopt.hope.trainer import TrainConfig, Trainer
from tests.hope.runs import STEPS, StopAfter, arguments, metrics, saved_step, train, wrong


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


# -- what goes wrong -------------------------------------------------------------------------


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


def test_run_is_not_overwritten_unasked(config, capsys):
    train(config)
    before = {name: (config.out / name).read_bytes() for name in training.OUTPUTS}
    assert "holds a run already" in wrong(arguments(config), capsys)
    assert before == {name: (config.out / name).read_bytes() for name in training.OUTPUTS}
    assert "exclude each other" in wrong(arguments(config, "--resume", "--overwrite"), capsys)
    assert main(arguments(config, "--overwrite", "--seed=1")) == 0
    assert (config.out / "metrics.jsonl").read_bytes() != before["metrics.jsonl"]


def test_a_run_is_not_cut_short_by_fewer_steps(config, capsys):
    train(config)
    message = wrong(arguments(config, "--resume", "--steps=10"), capsys)
    assert "steps=14 there and 10 here" in message


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


def test_a_checkpoint_whose_parameters_were_grouped_otherwise_is_refused_with_a_way_out(
    config, monkeypatch, capsys
):
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run(StopAfter(2))
    chunk_groups = optimizers.chunk_groups
    monkeypatch.setattr(optimizers, "chunk_groups", lambda *given: chunk_groups(*given)[::-1])
    message = wrong(arguments(config, "--resume"), capsys)
    assert "does not fit the optimizers of this version" in message
    assert "start anew with --overwrite" in message


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


# -- what it says, and to whom ---------------------------------------------------------------


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
