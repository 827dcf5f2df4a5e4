"""What the files around the package promise about it."""

import ast
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
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


def imported(*places: str) -> set[str]:
    """The packages that the Python files below these folders import."""
    names = set()
    for path in (path for place in places for path in (ROOT / place).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names


def test_extras_name_what_is_imported_and_nothing_else():
    _, _, section = read("pyproject.toml").partition("[project.optional-dependencies]\n")
    listed = re.findall(r'^(\w+) = \["(.*?)"\]', section.partition("\n[")[0], re.MULTILINE)
    imports = {"scikit-learn": "sklearn"}
    named = {
        imports.get(name, name)
        for extra, text in listed
        if extra not in ("dev", "docs")  # tools
        for name in re.findall(r'(?:^|")([\w-]+)', text)
    }
    ours = {"deepopt", "benchmarks", "torch", *sys.stdlib_module_names}
    assert {"matplotlib", "triton", "transformers"} <= named
    assert named <= imported("deepopt", "csrc", "benchmarks", "docs/examples")
    assert imported("deepopt", "csrc", "benchmarks") - ours <= named


def test_what_make_installs_as_torch_is_what_is_imported():
    named = re.findall(r"^TORCH\s*\?=(.*)|TORCH:-(.*?)\}", read("Makefile") + read(".ci/run"),
                       re.MULTILINE)  # fmt: skip
    packages = {name.partition("==")[0] for pair in named for name in "".join(pair).split()}
    assert packages == {"torch", "triton"}
    assert packages <= imported("deepopt", "csrc")


def test_nothing_claims_to_be_on_a_package_index():
    claim = re.compile(r"pip install[^\n]*\bdeepopt(?!_torch-[\w.-]*\*?[\w.-]*\.whl)")
    places = ("*.md", "Makefile", "deepopt/**/*.py", "docs/**/*.*", "csrc/**/*.*", ".github/**/*.*",
              "benchmarks/**/*.py", "tests/integration/*.py", "setup.py")  # fmt: skip
    for path in (path for place in places for path in ROOT.glob(place)):
        if path.is_file() and path.suffix not in (".png", ".so", ".pyc", ".pt"):
            assert not claim.search(path.read_text()), path
    assert "Nothing is on a package index yet" in read("README.md")


def test_make_commands_of_the_documents_exist():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    named = re.findall(
        r"^\s*(?:\$ )?make ([\w-]+)", read("README.md") + read(".ci/run"), re.MULTILINE
    )
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
    said = capsys.readouterr().err
    assert "compiled operators not built, plain torch serves instead" in said
    assert "--no-build-isolation --no-deps --force-reinstall" in said
    assert build_script.compiled("0") == {}
    assert not capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"DEEPOPT_EXT=1 needs torch.*--no-build-isolation"):
        build_script.compiled("1")


def test_unknown_extension_mode_is_refused(build_script, monkeypatch):
    monkeypatch.setenv("DEEPOPT_EXT", "yes")
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        build_script.extension_mode()


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_an_old_setuptools_is_named_with_the_remedy(monkeypatch, version):
    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit, match=rf"needs setuptools 77.*{version}: pip install --upgrade"):
        exec(compile(read("setup.py"), "setup.py", "exec"), {"__file__": "setup.py"})


def test_a_torch_that_is_too_old_is_left_alone(build_script, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert build_script.compiled("auto") == {}
    assert "torch 2.9.1+cpu is older than 2.10" in capsys.readouterr().err


def test_kernels_that_are_demanded_need_sources(build_script, monkeypatch, tmp_path):
    monkeypatch.setattr(build_script, "ROOT", tmp_path)
    assert build_script.compiled("auto") == {}
    with pytest.raises(SystemExit, match=r"DEEPOPT_EXT=1, but csrc/cpu has no sources"):
        build_script.compiled("1")


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


def test_a_wheel_has_what_was_built_and_nothing_older(tmp_path):
    """Nothing compiles here, and a module of an earlier version lies where builds are made."""
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "triton").mkdir()
    (tmp_path / "csrc" / "triton" / "__init__.py").write_text("")
    (tmp_path / "csrc" / "cpu" / "broken.cpp").write_text("this is no C++")
    (tmp_path / "deepopt").mkdir()
    (tmp_path / "deepopt" / "__init__.py").write_text('__version__ = "0"')
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "dist"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "DEEPOPT_EXT": "auto"},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "deepopt._C_cpu not built, plain torch serves instead" in done.stderr
        (wheel,) = (tmp_path / "dist").glob("*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            modules = {name for name in archive.namelist() if name.startswith("deepopt/")}
            (about,) = [name for name in archive.namelist() if name.endswith("/WHEEL")]
            assert b"Root-Is-Purelib: true" in archive.read(about)
        assert modules == {"deepopt/__init__.py", "deepopt/ops/triton/__init__.py"}
        for folder in (tmp_path / "build").glob("lib*"):
            (folder / "deepopt" / "gone.py").write_text("")


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
