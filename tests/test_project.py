"""What the files around the package promise about it."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import deepopt

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.fixture
def installed():
    try:
        return metadata.distribution("deepopt-torch")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")


def test_version_is_the_same_everywhere(installed):
    assert installed.version == deepopt.__version__
    assert f"version: {deepopt.__version__}\n" in read("CITATION.cff")
    assert deepopt.__version__ in read("CHANGELOG.md")


def test_torch_is_the_only_requirement_and_none_of_the_build(installed):
    hard = [line for line in installed.requires if "extra ==" not in line]
    assert hard == ["torch>=2.10"]
    (build,) = re.findall(r"^\[build-system\]$.*?^requires = \[(.*?)\]$", read("pyproject.toml"),
                          re.DOTALL | re.MULTILINE)  # fmt: skip
    assert "torch" not in build


def test_make_commands_of_the_documents_exist():
    targets = set(re.findall(r"^(\w+):", read("Makefile"), re.MULTILINE))
    named = re.findall(r"^\s*(?:\$ )?make (\w+)", read("README.md") + read(".ci/run"), re.MULTILINE)
    assert {"train", "test", "lint"} <= targets
    assert set(named) <= targets
    assert named


@pytest.fixture
def build_script(monkeypatch):
    spec = importlib.util.spec_from_file_location("deepopt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_build_without_torch_falls_back_unless_extensions_are_demanded(
    build_script, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert build_script.compiled("auto") == {}
    assert capsys.readouterr().err.count("\n") == 1
    assert build_script.compiled("0") == {}
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"DEEPOPT_EXT=1 needs torch.*--no-build-isolation"):
        build_script.compiled("1")


def test_unknown_extension_mode_is_refused(build_script, monkeypatch):
    monkeypatch.setenv("DEEPOPT_EXT", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build_script.extension_mode()


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_source_that_does_not_compile_is_left_out_unless_demanded(tmp_path, mode):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++")
    shutil.copy(ROOT / "setup.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, "DEEPOPT_EXT": mode}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode == 0) == (mode == "auto"), done.stderr
    assert ("deepopt: deepopt._C_cpu not built" in done.stderr) == (mode == "auto")
    assert not list(tmp_path.rglob("*.so"))


def test_the_source_distribution_has_what_its_build_needs(tmp_path):
    tree = tmp_path / "tree"
    for name in ("csrc", "deepopt"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=tree, env={**os.environ, "DEEPOPT_EXT": "0"},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")
              if path.suffix in (".cpp", ".cu", ".cuh", ".h")}  # fmt: skip
    assert len(needed) > 30
    assert needed <= held


def test_the_python_code_of_the_readme_runs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Linear(64, 4)
    )
    names = {
        "torch": torch,
        "dataclass": dataclasses.dataclass,
        "model": model,
        "extra": torch.nn.Parameter(torch.randn(32, 32)),
    }
    blocks = re.findall(r"```python\n(.*?)```", read("README.md"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    for _ in range(5):
        loss = model(torch.randn(16, 32)).square().mean()
        names["optimizer"].zero_grad()
        loss.backward()
        names["optimizer"].step()
    assert loss.isfinite()
    assert len(deepopt.DeepMomentum(names["groups"]).param_groups) == 3


def test_every_test_that_the_contract_page_names_exists():
    page = (ROOT / "docs" / "contract.md").read_text()
    named = set(re.findall(r"`((?:[\w/]+\.py::)?test_\w+)`", page))
    assert len(named) > 30
    contract = ROOT / "tests" / "optim" / "contract"
    for each in named:
        file, _, test = each.rpartition("::")
        paths = list((ROOT / "tests").rglob(file) if file else contract.glob("test_*.py"))
        assert len(paths) == 1 or not file, each
        holding = [path for path in paths if f"def {test}(" in path.read_text()]
        assert len(holding) == 1, each
