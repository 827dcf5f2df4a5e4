"""``python -m deepopt.hope.generate``: prompts, conversations, and learning what it is told."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch

from deepopt.hope import Hope, HopeConfig, complete
from deepopt.hope.generate.__main__ import main

LINE = "0123456789abcdefghijklmnopqrstuv\n"


@pytest.fixture(params=["titans", "attention"])
def folder(tmp_path, request):
    torch.manual_seed(0)
    config = HopeConfig(mixer=request.param, dim=16, heads=2, layers=1, cms_chunks=(32, 64))
    model = Hope(config)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_prompt_is_continued_as_complete_does(folder, capsys):
    assert main([f"--checkpoint={folder}", "--prompt=def f(", "--length=20", "--seed=3"]) == 0
    expected = "".join(
        complete(Hope.from_pretrained(folder), "def f(", 20, temperature=0.8,
                 generator=torch.Generator().manual_seed(3))
    )  # fmt: skip
    assert capsys.readouterr().out == f"def f({expected}\n"


def test_a_long_prompt_is_read_in_parts(folder, capsys, monkeypatch):
    prompt, widths = LINE * 3, []
    monkeypatch.setattr(sys.modules[main.__module__], "PREFILL", 32)
    forward = Hope.forward

    def counted(model, tokens, **options):
        widths.append(tokens.shape[1])
        return forward(model, tokens, **options)

    monkeypatch.setattr(Hope, "forward", counted)
    arguments = [f"--prompt={prompt}", "--length=5", "--temperature=0"]
    assert main([f"--checkpoint={folder}", *arguments]) == 0
    assert max(widths) == 32
    monkeypatch.undo()
    expected = complete(Hope.from_pretrained(folder), prompt, 5, temperature=0)
    assert capsys.readouterr().out == f"{prompt}{''.join(expected)}\n"


def test_a_conversation_continues_all_that_was_read(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert main([f"--checkpoint={folder}", "--length=9", "--temperature=0"]) == 0
    model = Hope.from_pretrained(folder)
    found = capsys.readouterr().out
    texts = ["one\n", "one\ntwo\n"]
    assert found == "".join(
        "".join(complete(model, text, 9, temperature=0)) + "\n" for text in texts
    )


def test_with_adapt_it_learns_what_it_is_told_and_saves_nothing(folder, capsys, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr("sys.stdin", io.StringIO(LINE * 12))
    assert main([f"--checkpoint={folder}", "--length=1", "--adapt", "--adapt-lr=0.02"]) == 0
    said = capsys.readouterr().err
    bits = [float(x) for x in re.findall(r"at ([\d.]+) bits per byte", said)]
    assert len(bits) == 12
    assert bits[-1] < bits[0] - 1
    assert "[read 32 bytes" in said  # nothing predicts the first
    assert "; 12 updates so far]" in said  # 12 * 33 - 1 bytes, 32 for an update
    assert (folder / "model.safetensors").read_bytes() == before


def test_without_a_rate_adapt_changes_no_continuation(folder, capsys):
    outputs = []
    for more in ([], ["--adapt", "--adapt-lr=0", "--adapt-chunk=4"]):
        assert main([f"--checkpoint={folder}", f"--prompt={LINE}", "--temperature=0", *more]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_the_command_runs_without_a_warning(folder):
    command = [sys.executable, "-W", "error", "-m", "deepopt.hope.generate"]
    done = subprocess.run(
        [*command, f"--checkpoint={folder}", "--length=3", "--temperature=0"],
        input="hello\n", capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize("more", [[], ["--adapt"], ["--prompt", b"\xff\xe9"]], ids=str)
def test_bytes_that_are_no_text_are_read_and_what_cannot_be_shown_is_replaced(folder, more):
    done = subprocess.run(
        [sys.executable, "-m", "deepopt.hope.generate", f"--checkpoint={folder}", "--length=20",
         *more],
        input=b"\xff\xe9 text\n", capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=nowhere"], "nowhere has no config.json: give the folder"),
        (["--prompt="], "prompt is empty"),
        (["--device=nowhere"], "device='nowhere': cannot be used here"),
        (["--device=meta"], "device='meta': cannot be used here"),
        (["--length=-1"], "length=-1: must be at least 0"),
        (["--temperature=-1"], "temperature=-1.0: must be finite"),
        (["--top-p=2"], "top_p=2.0: must be above 0"),
        (["--adapt", "--adapt-chunk=0"], "chunk=0: must be an int of at least 1"),
        (["--adapt", "--adapt-lr=-1"], "adapt_lr=-1.0: must be finite"),
    ],
)
def test_wrong_input_is_named_with_the_remedy(folder, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        main([f"--checkpoint={folder}", *arguments])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
