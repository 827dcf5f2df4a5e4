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
    # What was there before may name another Triton than the installed one: tests/versions/run.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
        check=False,
    )


def test_every_process_has_the_same_triton():
    done = run("-c", "import triton; print(triton.__file__)")
    assert done.stdout.strip() == importlib.util.find_spec("triton").origin, done.stderr


@pytest.mark.parametrize("file", ["emulated.py", "emulated_memories.py"])
def test_kernels_compute_in_emulation_what_they_promise(file, tmp_path):
    pytest.importorskip("numpy", reason="Triton's interpreter needs it")
    done = run("-m", "pytest", "-p", "no:cacheprovider", FOLDER / file,
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
# Bytes on the stack of a thread. The code that older versions make for an H100 sets up to four
# registers aside around a loop, never in one: of the float32 erase_kernel, and in 3.5 of the masked
# split_kernel. Newer versions need none.
SPILLS = {("3.5", "cuda:90"): 16, ("3.6", "cuda:90"): 8}


@pytest.mark.parametrize("target", MATRIX_UNITS)
def test_machine_code_has_no_spills_wide_loads_and_matrix_instructions(target, tmp_path):
    done = run("-W", "error::UserWarning", FOLDER / "aot.py", target,
               TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (version, kernels), amd = json.loads(done.stdout), target.startswith("hip")
    spills = SPILLS.get((".".join(version.split(".")[:2]), target), 0)
    assert len(kernels) == 11
    for name, usage in kernels.items():
        assert usage["spills"] <= spills, name
        tile = "x".join(name.split()[2].split("x")[:2])
        most = REGISTERS_ON_AMD if amd else REGISTERS[tile]
        assert usage["registers"] <= most, (name, usage["registers"])
        count = usage["instructions"]
        if "chunk" not in name:
            # float32 stays float32: NVIDIA's matrix units would round it to tf32.
            exact = not amd and "fp32/fp32" in name and "split" not in name
            multiply, looped = "FFMA" if exact else MATRIX_UNITS[target], usage["looped"]
            assert any(code.startswith(multiply) for code in looped), name
            assert not any(code.startswith(("LDL", "STL")) for code in looped), name
        assert_wide(name, count, "global_load" if amd else "LDG")


def assert_wide(name, count, prefix):
    """Matrices are read 16 bytes at a time; what else is read is one number per matrix."""
    loads = {code: n for code, n in count.items() if code.startswith(prefix) and "BAR" not in code}
    narrow = {code: n for code, n in loads.items() if not code.endswith((".128", "dwordx4"))}
    assert len(loads) > len(narrow), name
    numbers = {"erase_kernel": 3, "divide_kernel": 1, "split_kernel": 4}.get(name.split()[0], 0)
    assert sum(narrow.values()) <= numbers, (name, narrow)
