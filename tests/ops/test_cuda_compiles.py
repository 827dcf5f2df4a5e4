"""What nvcc makes of the CUDA kernels for every architecture that is built for; no GPU needed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc" / "cuda"
KERNELS = sorted(CSRC.glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
# With 256 threads a block, 64 registers let 1024 threads, half of what there can be, run at a time.
MOST_REGISTERS = 64
# The MLP is limited by arithmetic, for which 768 threads do; held to 64, its gradient spills.
MOST_REGISTERS_OF_THE_MLP = 80
# One thread of a block runs the MLP, with arrays whose length is known when it runs.
ON_THE_STACK = "mix_horizons"

# Loads and stores of 16 bytes that a kernel needs for one turn of its loop.
VECTORS = {
    "adamw_denseIfffL": (4, 3),
    "adamw_denseI13__nv_bfloat16S\\w*f": (6, 5),
    "adamw_denseI13__nv_bfloat16ff": (7, 5),
    "adamw_denseI6__halfS\\w*f": (6, 5),
    "adamw_denseIdddL": (4, 3),
    "apply_update_denseIff": (2, 1),
    "apply_update_denseI13__nv_bfloat16f": (3, 1),
    "combine_straightILi1ELi4E": (1, 1),
    "combine_straightILi2ELi4E": (2, 1),
    "combine_straightILi3ELi4E": (3, 1),
    "combine_straightILi0ELi4E": (1, 1),
    "multi_scale_wordsILi4E": (3, 3),
    "sum_squares": (1, 0),
    "sum_products": (2, 0),
    "horizons_wordsILi4E": (2, 2),
    "products_of_rowsILb0E": (1, 0),
    "products_of_rowsILb1E": (2, 0),
}


def setup_module_of_the_project():
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool(name):
    """The toolkit's, or the one that comes with Triton."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None and (spec := importlib.util.find_spec("triton")):
        found = shutil.which(name, path=str(Path(spec.origin).parent / "backends/nvidia/bin"))
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request, tmp_path_factory):
    """For every kernel file the object for one architecture, and what ptxas said of it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    if f"compute_{request.param}" not in listed.stdout.split():
        pytest.skip(f"this nvcc does not know sm_{request.param}")
    flags = setup_module_of_the_project().NVCC_FLAGS
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    objects = {}
    for source in KERNELS:
        to = folder / f"{source.stem}.o"
        # With the launchers: for the device alone, what they call would not be checked.
        command = [nvcc, *flags, f"-arch=sm_{request.param}", "-c", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", to, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        objects[to] = done.stdout + done.stderr
    return objects


def test_kernels_keep_everything_in_registers(compiled):
    entries = 0
    for log in compiled.values():
        for name, told in re.findall(
            r"Compiling entry function '(\w+)'(.*?Used \d+ registers)", log, re.DOTALL
        ):
            entries += 1
            sizes = re.findall(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told
            )
            assert sizes, name
            if ON_THE_STACK not in name:
                assert {number for size in sizes for number in size} == {"0"}, f"{name}: {told}"
            registers = int(told.rpartition("Used ")[2].split()[0])
            most = MOST_REGISTERS_OF_THE_MLP if "mlp" in name else MOST_REGISTERS
            assert registers <= most, f"{name} takes {registers} registers"
    assert entries >= 40


def test_entries_are_loaded_and_stored_16_bytes_at_a_time(compiled):
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    environment = {**os.environ, "PATH": f"{Path(cuobjdump).parent}:{os.environ['PATH']}"}
    functions = {}
    for built in compiled:
        listed = subprocess.run(
            [cuobjdump, "-sass", built], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for part in listed.split("Function : ")[1:]:
            name, _, code = part.partition("\n")
            functions[name] = code
    for pattern, (loads, stores) in VECTORS.items():
        found = [name for name in functions if re.search(pattern, name)]
        assert found, pattern
        for name in found:
            code = functions[name]
            wide = [len(re.findall(rf"{kind}\.E\S*\.128", code)) for kind in ("LDG", "STG")]
            assert wide[0] >= loads, f"{name}: {wide[0]} wide loads"
            assert wide[1] >= stores, f"{name}: {wide[1]} wide stores"


def test_operators_compile_with_the_headers_of_torch(tmp_path):
    """The host's half: with a torch that has CUDA it is linked, too."""
    compiler = shutil.which("g++")
    nvcc = shutil.which("nvcc")
    if compiler is None or nvcc is None:
        pytest.skip("needs g++ and nvcc")
    homes = [os.environ.get("CUDA_HOME"), Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    home = next(
        (Path(h) for h in homes if h and (Path(h) / "include/cuda_runtime.h").exists()), None
    )
    if home is None:
        pytest.skip("needs the headers of CUDA")
    unit = tmp_path / "all.cpp"
    unit.write_text("".join(f'#include "{path}"\n' for path in sorted(CSRC.glob("*.cpp"))))
    flags = setup_module_of_the_project().CUDA_CXX_FLAGS
    folders = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{home / 'include'}"]
    command = [compiler, "-fsyntax-only", *flags, *folders, unit]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_setup_asks_for_the_architectures_that_the_toolkit_has():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    asked = setup_module_of_the_project().architectures(nvcc)
    assert asked.endswith("+PTX")
    assert asked.startswith("8.0;9.0")
    assert setup_module_of_the_project().architectures(sys.executable) is None
