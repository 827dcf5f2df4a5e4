"""Triton's kernels without a GPU: in emulation, and as machine code for four architectures."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton: pip install triton", allow_module_level=True)

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def run(*command, **environment):
    """A Python process of its own, because Triton reads these variables when it is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
        check=False,
    )


def test_kernels_compute_in_emulation_what_they_promise(tmp_path):
    pytest.importorskip("numpy", reason="Triton's interpreter needs it")
    done = run("-m", "pytest", "-p", "no:cacheprovider", FOLDER / "emulated.py",
               TRITON_INTERPRET="1", TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_installation_has_the_kernels_in_the_package(tmp_path):
    pytest.importorskip("setuptools")
    done = run("setup.py", "-q", "build_py", "--build-lib", tmp_path, DEEPOPT_EXT="0")
    assert done.returncode == 0, done.stderr
    installed = {path.name for path in (tmp_path / "deepopt" / "ops" / "triton").glob("*.py")}
    assert installed == {path.name for path in (ROOT / "csrc" / "triton").glob("*.py")} != set()


# What multiplies matrices there.
MATRIX_UNITS = {
    "cuda:80": "HMMA",
    "cuda:90": "HGMMA",
    "cuda:100": "UTCHMMA",
    "hip:gfx942": "v_mfma",
}
# Registers of a thread, by tile. 255 is all there are: one block of eight warps or, as the H100's
# fastest tiles have, two of four. AMD's 168 leave room for three waves of four.
REGISTERS = {"128x128": 255, "128x64": 255, "64x64": 208, "chunk": 64}
REGISTERS_ON_AMD = 168


@pytest.mark.parametrize("target", MATRIX_UNITS)
def test_machine_code_has_no_spills_wide_loads_and_matrix_instructions(target, tmp_path):
    done = run(FOLDER / "aot.py", target, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    kernels, amd = json.loads(done.stdout), target.startswith("hip")
    assert len(kernels) == 11
    for name, usage in kernels.items():
        assert usage["spills"] == 0, name
        tile = "x".join(name.split()[2].split("x")[:2])
        most = REGISTERS_ON_AMD if amd else REGISTERS[tile]
        assert usage["registers"] <= most, (name, usage["registers"])
        count = usage["instructions"]
        # float32 stays float32: NVIDIA's matrix units would round it to tf32.
        exact = "fp32/fp32" in name and "split" not in name
        if "chunk" not in name and (amd or not exact):
            assert any(code.startswith(MATRIX_UNITS[target]) for code in count), name
        assert_wide(name, count, "global_load" if amd else "LDG")


def assert_wide(name, count, prefix):
    """Matrices are read 16 bytes at a time; what else is read is one number per matrix."""
    loads = {code: n for code, n in count.items() if code.startswith(prefix) and "BAR" not in code}
    narrow = {code: n for code, n in loads.items() if not code.endswith((".128", "dwordx4"))}
    assert len(loads) > len(narrow), name
    numbers = {"erase_kernel": 2, "divide_kernel": 1, "split_kernel": 4}.get(name.split()[0], 0)
    assert sum(narrow.values()) <= numbers, (name, narrow)
