"""A short run of the trainer, how it is started and stopped, and what it leaves behind."""

import json
import threading
from pathlib import Path

import pytest
import torch

from deepopt.hope import HopeConfig, files
from deepopt.hope.train import main
from deepopt.hope.trainer import TrainConfig, Trainer

# The slow CMS level learns every fourth step, so that interruptions leave gradients pending.
MODEL = {"dim": 16, "layers": 1, "heads": 1, "memory_chunk": 8, "projection_chunk": 16}
SIZES = HopeConfig(**MODEL, cms_chunks=(16, 128))
STEPS = 14


def short(out: Path, data: Path) -> TrainConfig:
    return TrainConfig(
        out=out, data=data, steps=STEPS, warmup=3, batch_size=2, seq_len=16,
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


def wrong(arguments: list[str], capsys) -> str:
    """The message of a command line that is refused, on one line and without a traceback."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


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


def saved_step(out: Path) -> int:
    return files.load(out / "checkpoint.safetensors")["step"]


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
