"""What users install: built, installed and used outside of the checkout.

The environment there has what the tests have, but not this package. The kernels are compiled once,
from the source distribution, and compared with those that the checkout was installed with.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
STEP = """
import deepopt, torch
assert not deepopt.__file__.startswith({root!r}), deepopt.__file__
params = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(7))]
optimizer = deepopt.DeepMomentum(params)
for _ in range(2):
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
deepopt.DeepMomentum(params, memory="mlp")  # which reads a file of the package
from deepopt.hope import PRETRAINED
names = ["config.json", "model.safetensors", "training.json"]
assert sorted(path.name for path in PRETRAINED.iterdir()) == names
print("stepped")
"""


class Place(NamedTuple):
    """A folder outside of the checkout, with an environment in it."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "env" / "bin" / "python")

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command says; it must succeed."""
        done = self.tried(*command, cwd=cwd, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def tried(
        self, *command: str, cwd: Path | None = None, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("DEEPOPT", "PYTHONPATH"))}
        path = f"{self.folder / 'env' / 'bin'}{os.pathsep}{outer['PATH']}"
        # No download, and the setuptools that are there: PIP_NO_BUILD_ISOLATION=0 means that.
        pip = {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0",
               "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}  # fmt: skip
        return subprocess.run(
            command, cwd=cwd or self.folder, env={**outer, **pip, "PATH": path, **environment},
            capture_output=True, text=True,
        )  # fmt: skip

    def install(self, wheel: Path) -> None:
        self.run(self.python, "-m", "pip", "install", "--force-reinstall", str(wheel))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    made = Place(folder)
    made.run(made.python, "-m", "pip", "uninstall", "-y", "setuptools")  # an old one, with some
    (site_packages,) = folder.glob("env/lib/python*/site-packages")
    others = folder / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"deepopt|__editable__|pip\b|.*\.pth$", path.name):
            (others / path.name).symlink_to(path)
    (site_packages / "others.pth").write_text(f"{others}\n")
    assert made.tried(made.python, "-c", "import deepopt").returncode == 1
    return made


@pytest.fixture(scope="module")
def checkout(place):
    """A copy of the checkout as version control has it, as a repository of its own."""
    copy = place.folder / "checkout"
    aside = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.so", "__pycache__", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=aside)
    git = ["git", "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        place.run(*git, *arguments, cwd=copy)
    return copy


@pytest.fixture(scope="module")
def sdist(place, checkout):
    place.run(place.python, "setup.py", "-q", "sdist", "-d", str(place.folder), cwd=checkout)
    (archive,) = place.folder.glob("*.tar.gz")
    return archive


def wheel(place: Place, source: Path, name: str, **environment: str) -> Path:
    to = place.folder / name
    place.run(place.python, "-m", "pip", "wheel", "-w", str(to), str(source), **environment)
    (made,) = to.iterdir()
    return made


@pytest.fixture(scope="module")
def plain(place, checkout):
    return wheel(place, checkout, "plain", DEEPOPT_EXT="0")


@pytest.fixture(scope="module")
def compiled(place, sdist):
    return wheel(place, sdist, "compiled", DEEPOPT_EXT="1")


def contents(path: Path) -> dict[str, bytes]:
    """The files of a wheel, but for the two that tell how it was made."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()
                if not re.search(r"\.dist-info/(WHEEL|RECORD)$", name)}  # fmt: skip


def test_what_comes_from_the_source_distribution_is_what_comes_from_the_checkout(plain, compiled):
    ours, theirs = contents(compiled), contents(plain)
    binaries = {name: ours.pop(name) for name in sorted(ours) if name.endswith(".so")}
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert list(binaries) == ["deepopt/_C_cpu.abi3.so"]
    for name, content in binaries.items():
        assert str(Path.home()).encode() not in content  # no folder of the builder's
        built = ROOT / name  # by `make`, from the checkout
        assert built.exists(), "install the checkout with DEEPOPT_EXT=1"
        assert built.read_bytes() == content


def test_wheels_are_tagged_by_what_is_in_them(plain, compiled):
    assert plain.name.endswith("-py3-none-any.whl")
    assert re.search(r"-cp310-abi3-\w+\.whl$", compiled.name)


def test_the_wheel_with_kernels_works_outside_and_says_nothing(place, compiled):
    place.install(compiled)
    code = STEP.format(root=str(ROOT))
    assert place.run(place.python, "-W", "error", "-c", code) == "stepped\n"
    assert re.search(r"^cpu +yes$", place.run(place.python, "-m", "deepopt.ops"), re.MULTILINE)


def test_the_wheel_without_kernels_works_and_says_once_what_to_type(place, plain):
    place.install(plain)
    code = STEP.format(root=str(ROOT))
    said = place.run(place.python, "-c", code)
    assert "stepped\n" in said
    assert said.count("Warning: ") == said.count("deepopt runs without its kernels") == 1
    assert "pip install --no-build-isolation --no-deps --force-reinstall" in said
    quiet = place.run(place.python, "-W", "error", "-c", code, DEEPOPT_BACKEND="reference")
    assert quiet == "stepped\n"


def test_the_training_command_works_in_an_installation(place, plain):
    place.install(plain)
    text = place.folder / "text"
    text.write_text("".join(f"{n} squared is {n * n}.\n" for n in range(400)))
    small = "--steps 2 --batch-size 2 --seq-len 16 --dim 16 --layers 1 --heads 1 --eval-windows 2"
    command = [place.python, "-m", "deepopt.hope.train", "--data", str(text), *small.split()]
    assert "bits per byte" in place.run(*command)
    assert (place.folder / "runs" / "hope" / "checkpoint.safetensors").exists()


def test_the_commands_of_the_readme_install_the_package(place, checkout, plain):
    readme = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"^## Install$.*?^```sh\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    *ways, look = block.splitlines()
    where = {"install .": checkout, "install git+URL": place.folder, ".whl": plain.parent}
    assert len(ways) == len(where)
    for way, (part, folder) in zip(ways, where.items(), strict=True):
        assert part in way
        command = way.replace("URL", checkout.as_uri())
        place.tried(place.python, "-m", "pip", "uninstall", "-y", "deepopt-torch")
        place.run("bash", "-c", command, cwd=folder, DEEPOPT_EXT="0")
        assert "reference  yes" in place.run("bash", "-c", look)


def isolated(place: Place) -> dict[str, str]:
    """The environment of a build that pip isolates: its setuptools, nothing of the target's."""
    overlay = place.folder / "overlay"
    if not overlay.exists():
        overlay.mkdir()
        for path in (place.folder / "others").iterdir():
            if re.match(r"setuptools|_distutils_hack|pkg_resources|wheel|packaging", path.name):
                (overlay / path.name).symlink_to(path)
        code = "import site, sys\nhidden = {*site.getsitepackages(), %r}\n" \
               "sys.path[:] = [path for path in sys.path if path not in hidden]\n"  # fmt: skip
        (overlay / "sitecustomize.py").write_text(code % str(place.folder / "others"))
    return {"PYTHONPATH": str(overlay)}


def test_an_isolated_build_finds_the_torch_that_it_is_for(place, checkout):
    code = "import setup; print([e.name for e in setup.compiled('1')['ext_modules']])"
    environment = isolated(place)
    hidden = place.tried(place.python, "-c", "import torch", **environment)
    assert "No module named 'torch'" in hidden.stderr
    found = place.run(place.python, "-c", code, cwd=checkout, **environment)
    assert "'deepopt._C_cpu'" in found


def test_a_build_without_torch_says_loudly_that_it_has_no_kernels(place, checkout, tmp_path):
    lonely = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", lonely], check=True)
    command = [str(lonely / "bin" / "python"), "setup.py", "-q", "bdist_wheel", "-d", str(tmp_path)]
    said = place.run(*command, cwd=checkout, **isolated(place))
    assert "No module named 'torch'" in said
    assert "THIS INSTALLATION IS SLOWER" in said
    assert "--no-build-isolation --no-deps --force-reinstall" in said
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]
    done = place.tried(*command, cwd=checkout, DEEPOPT_EXT="1", **isolated(place))
    assert done.returncode != 0
    assert "DEEPOPT_EXT=1 needs torch" in done.stderr
