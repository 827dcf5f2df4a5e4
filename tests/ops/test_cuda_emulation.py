"""The CUDA operators, run on the CPU: kernels and launchers as they are, threads taken in turns."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from deepopt.ops.operator import OPERATORS, UNAVAILABLE, Implementation, backend

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"


def parity():
    """The table of test_parity.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("parity_table", HERE / "test_parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = parity()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All operators of csrc/cuda as those of the namespace deepopt_emulated, for CPU tensors."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulation")
    sources = sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")])
    unit, built = folder / "all.cpp", folder / "emulated.so"
    unit.write_text("".join(f'#include "{path}"\n' for path in sources))
    torch_folder = Path(torch.__file__).parent
    # fmt: off
    command = [
        compiler, "-O1", "-std=c++20", "-march=native", "-shared", "-fPIC", "-ffp-contract=off",
        "-DDEEPOPT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-I{HERE / 'emulation'}", f"-I{torch_folder / 'include'}",
        unit, "-o", built, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10",
    ]
    # fmt: on
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    namespace = torch.library.Library("deepopt_emulated", "DEF")
    for name, found in OPERATORS.items():
        namespace.define(name + str(found.overload._schema).partition(name)[2])
    torch.ops.load_library(built)
    yield ctypes.CDLL(str(built))
    namespace._destroy()


def emulated(name):
    return getattr(torch.ops.deepopt_emulated, name).default


EMULATED = list(table.TABLE)


@pytest.fixture
def in_place_of_cpu(library, monkeypatch):
    """What the table calls the CPU's kernels are the emulated ones."""
    monkeypatch.delitem(UNAVAILABLE, "cpu", raising=False)
    for name in EMULATED:
        found = OPERATORS[name]
        monkeypatch.setitem(
            found.implementations, "cpu", Implementation(emulated(name), found._supports)
        )


@pytest.mark.parametrize("name", EMULATED)
def test_errors_are_those_of_the_arithmetic(in_place_of_cpu, name):
    @settings(derandomize=True, deadline=None, max_examples=40, database=None)
    @given(shape=table.drawn)
    def check(shape):
        if not table.TABLE[name].empty and 0 in shape.sizes:
            shape.sizes = (2, 1, 1)
        table.check(name, "cpu", shape)

    check()
