"""Every block of Python and every command of the pages runs as it is printed.

A page's blocks run in order in one namespace, which holds what they assume: a model, an optimizer,
tokens. A block that needs another package is a test of its own, skipped where that is missing.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import deepopt
from deepopt import hope, memory
from deepopt.ops import combine, newton_schulz
from deepopt.ops.operator import OPERATORS
from deepopt.optim import Continuum

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def read(page: str) -> str:
    return (ROOT / page).read_text()


def python_blocks(page: str) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```", read(page), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines())
            for indent, code in found]  # fmt: skip


# -- Python ----------------------------------------------------------------------------------


def nothing() -> dict:
    return {}


def in_training() -> dict:
    """A model with gradients, and what a training script has around it."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Linear(64, 4))
    model(torch.randn(16, 32)).square().mean().backward()
    optimizer = deepopt.DeepMomentum(deepopt.param_groups(model))
    return {"deepopt": deepopt, "torch": torch, "model": model, "optimizer": optimizer}


class Writer:
    """Keeps what TensorBoard's would write."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = value


def in_a_trainer() -> dict:
    names = in_training()
    hidden = [names["model"][2].weight]
    return {**names, "writer": Writer(), "number": 1, "hidden_weights": hidden}


def of_hope() -> dict:
    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(256, (batch, length))

    names = {name: getattr(hope, name) for name in hope.__all__}
    mask = torch.ones(2, 66, dtype=torch.bool)
    mask[0, :3] = False
    return {
        **names, "deepopt": deepopt, "torch": torch, "Continuum": Continuum, "device": "cpu",
        "tokens": tokens(2, 66), "targets": tokens(2, 66), "prompt": tokens(2, 5),
        "prompts": tokens(2, 66), "batches": [(tokens(2, 66), tokens(2, 66)) for _ in range(2)],
        "batch": 2, "seq_len": 66, "mask": mask, "starts": torch.rand(2, 66) < 0.1,
    }  # fmt: skip


ASSUMED = {
    "docs/checkpoints.md": nothing,
    "docs/hope.md": of_hope,
    "docs/index.md": in_training,
    "docs/kernels.md": in_training,
    "docs/trainers.md": in_a_trainer,
    "docs/tutorial.md": nothing,
    "docs/your_memory.md": nothing,
    "docs/your_operator.md": nothing,
}
ELSEWHERE = {  # where more is asked of them
    "README.md": "tests/test_project.py",
    "docs/routing.md": "tests/routing/test_groups.py",
    "docs/your_workload.md": "tests/benchmarks/quality/test_workloads.py",
}
NEEDS = {
    "transformers": r"\btransformers\.|AutoModelForCausalLM",
    "accelerate": r"\baccelerator\b",
}  # Lightning's block is a method, which runs without it


def package(block: str) -> str:
    return next((name for name, sign in NEEDS.items() if re.search(sign, block)), "")


def after(page: str, names: dict) -> None:
    """What a page's blocks have come to."""
    if page == "docs/tutorial.md":
        assert names["after"] < names["before"]
    if page == "docs/your_operator.md":
        clipped = OPERATORS["clip_norm"](torch.ones(2, 3, 4), 1.0)
        torch.testing.assert_close(torch.linalg.matrix_norm(clipped), torch.ones(2))
        torch.library.opcheck(OPERATORS["clip_norm"].overload, (torch.ones(2, 3, 4), 1.0))
    if page == "docs/trainers.md":
        assert names["writer"].scalars["ratio/2.weight"] > 0
        assert isinstance(names["configure_optimizers"](names["model"]), torch.optim.Optimizer)
        make, options = names["optimizer_cls_and_kwargs"]
        assert len(make(**options).param_groups) > 1


@pytest.fixture
def _restored(tmp_path, monkeypatch):
    """What pages register is gone at the end, and what they write lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for operator in (combine, newton_schulz):
        monkeypatch.setattr(operator, "implementations", dict(operator.implementations))
    monkeypatch.setattr(memory, "BUILT_IN", dict(memory.BUILT_IN))
    torch.manual_seed(0)
    yield
    OPERATORS.pop("clip_norm", None)


@pytest.mark.usefixtures("_restored")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own imports
@pytest.mark.parametrize("page", ASSUMED)
def test_the_python_code_of_a_page_runs(page, capsys):
    blocks = [block for block in python_blocks(page) if not package(block)]
    names = {"__name__": "page", **ASSUMED[page]()}
    assert blocks
    for block in blocks:
        exec(block, names)
    after(page, names)


def with_transformers() -> dict:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained("a Llama")
    args = transformers.TrainingArguments(output_dir="out", use_cpu=True, report_to="none")
    return {"transformers": transformers, "args": args, "steps": 10, "data": [{}],
            "AutoModelForCausalLM": transformers.AutoModelForCausalLM}  # fmt: skip


def with_accelerate() -> dict:
    accelerate = pytest.importorskip("accelerate")
    names = in_training()
    scheduler = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 32)))
    return {**names, "accelerator": accelerate.Accelerator(cpu=True), "loader": loader,
            "scheduler": scheduler}  # fmt: skip


WITH = {"transformers": with_transformers, "accelerate": with_accelerate}
OTHERS = [
    pytest.param(page, number, id=f"{page}, block {number}, {package(block)}")
    for page in ASSUMED
    for number, block in enumerate(python_blocks(page), 1)
    if package(block)
]


@pytest.mark.usefixtures("_restored")
@pytest.mark.filterwarnings("ignore")  # those of other packages
@pytest.mark.parametrize(("page", "number"), OTHERS)
def test_a_block_that_needs_another_package_runs(page, number):
    block = python_blocks(page)[number - 1]
    exec(block, {"__name__": "page", **ASSUMED[page](), **WITH[package(block)]()})


def test_no_page_with_python_code_is_left_out():
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
    names = {path.relative_to(ROOT).as_posix() for path in pages}
    assert {name for name in names if python_blocks(name)} == {*ASSUMED, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert Path(page).name in read(test)


# -- commands --------------------------------------------------------------------------------

COMMAND = re.compile(r"python3? -m\s+((?:deepopt|benchmarks)\b[^`]*)")
GIVEN_BY_THE_READER = {"TIER": "smoke"}


def commands(page: str) -> set[str]:
    """The commands of a page, in blocks and in sentences, from the name of the module on."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
    text = read(page)
    blocks = [block for _, language, block in fence.findall(text) if language != "python"]
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", fence.sub("", text))
    made = re.findall(r"make (?:train|checkpoint) ARGS=\"?(--[^\"`\n]+)", text)
    found = {f"deepopt.hope.train {options}" for options in made}
    return found | {
        match[1] for part in (*lines, *inline) if (match := COMMAND.match(part.strip()))
    }


PAGES_WITH_COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
    if path.name not in ("CHANGELOG.md", "decisions.md") and COMMAND.search(path.read_text())
)


class Parsed(BaseException):
    """The options of a command are good."""


@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_the_commands_of_a_page_are_taken_by_their_parsers(page, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        raise Parsed(parse(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    found = commands(page)
    assert found
    for command in sorted(found):
        module, *options = shlex.split(command, comments=True)
        assert importlib.util.find_spec(module), command
        if not options:  # there may be no parser, and nothing to parse
            continue
        options = [GIVEN_BY_THE_READER.get(option, option) for option in options]
        monkeypatch.setattr(sys, "argv", [module, *options])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            with pytest.raises((Parsed, SystemExit)) as ended:
                runpy.run_module(module, run_name="__main__")
        asked_for_help = "--help" in options and ended.value.args == (0,)
        assert ended.type is Parsed or asked_for_help, f"{command}: {capsys.readouterr().err}"
