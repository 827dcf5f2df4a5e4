"""The model that comes with the package is the one that its training.json says, and knows code."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from deepopt.data import evaluation_batches, stdlib_corpus
from deepopt.hope import PRETRAINED, Hope, HopeConfig, complete
from deepopt.hope.generate.__main__ import main

ROOT = Path(__file__).parents[2]
ABOUT = json.loads((PRETRAINED / "training.json").read_text())


def test_its_training_json_is_that_of_the_weights():
    weights = (PRETRAINED / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == ABOUT["model_sha256"]
    assert len(weights) < 3e6
    model = Hope.from_pretrained()
    assert sum(p.numel() for p in model.parameters()) == ABOUT["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config == HopeConfig()


def test_it_predicts_held_out_code_as_well_as_training_json_and_the_readme_say():
    """On a few windows; those of training.json where Python is the one that it was made with."""
    model, corpus = Hope.from_pretrained(), stdlib_corpus()
    same = corpus.sha256 == ABOUT["data_sha256"]
    total = count = 0.0
    with torch.no_grad():
        for tokens, targets in evaluation_batches(corpus.val, 8, 256, 128 if same else 32):
            total += model(tokens, targets).loss.item() / 0.6931471805599453
            count += 1
    assert total / count == pytest.approx(ABOUT["val_bits_per_byte"], abs=1e-3 if same else 0.4)
    for page in ("README.md", "docs/hope.md"):
        said = re.findall(r"([\d.]+) bits per byte on held-out files", (ROOT / page).read_text())
        assert said == [f"{ABOUT['val_bits_per_byte']:.2f}"], page


def test_the_command_without_a_checkpoint_completes_with_it(capsys):
    assert main(["--prompt=import os\nimport ", "--length=30", "--seed=1"]) == 0
    drawn = torch.Generator().manual_seed(1)
    expected = complete(
        Hope.from_pretrained(), "import os\nimport ", 30, temperature=0.8, generator=drawn
    )
    assert capsys.readouterr().out == f"import os\nimport {''.join(expected)}\n"


@pytest.mark.parametrize(
    ("prompt", "continuation"), [("def __init__(", "self"), ("    def __repr__", "(self")]
)
def test_it_has_learned_what_python_looks_like(prompt, continuation):
    found = "".join(complete(Hope.from_pretrained(), prompt, len(continuation), temperature=0))
    assert found == continuation
