from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    return path


@pytest.fixture
def config(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch):
    """A short run of the trainer, whose samples are short, too."""
    # Not above: where only the tests for a GPU run, what the trainer needs may be missing.
    from deepopt.hope.trainer import Trainer
    from tests.hope.runs import short

    samples = Trainer.samples
    monkeypatch.setattr(Trainer, "samples", lambda self, model: samples(self, model, 2, 8, 8))
    return short(tmp_path / "run", text)
