"""What the compiler made of the kernels: loops over vectors, for which nothing in C++ asks."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import deepopt
from deepopt.ops.operator import UNAVAILABLE

# A kernel of every kind, and the instructions that it must have for sixteen floats at a time.
EXPECTED = {
    "all_float": ("vsqrtps", "vdivps", "vfmadd"),
    "bf16_bf16": ("vsqrtps", "vdivps"),
    "bf16_float_stochastic": ("vsqrtps", "vpmulld"),
    "apply_update_float": ("vmulps",),
    "apply_update_bf16_exact": ("vmulps",),
    "two_floats": ("vfmadd",),
    "three_floats": ("vfmadd",),
    "of_bf16_next": ("vfmadd",),
    "take_in": ("vfmadd",),
    "take_first": ("vfmadd",),
    "take_next": ("vfmadd",),
    "squares": ("vmulpd", "vaddpd"),
    "products": ("vmulpd", "vaddpd"),
    "unit2": ("vfmadd", "vdivps"),
    "learn2": ("vmulps",),
    "slopes": ("vfmadd", "vdivps"),
}


@pytest.fixture(scope="module")
def listing():
    """The instructions of the library."""
    if "cpu" in UNAVAILABLE:
        pytest.skip(UNAVAILABLE["cpu"])
    if not shutil.which("objdump"):
        pytest.skip("needs objdump")
    (library,) = Path(deepopt.__file__).parent.glob("_C_cpu*.so")
    command = ["objdump", "-dC", "--no-show-raw-insn", library]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "arch_x86_64_v4" not in listed:
        pytest.skip("not built for x86-64 by GCC")
    return listed + "\n\n"


@pytest.fixture(scope="module")
def functions(listing):
    """The instructions of every kernel for x86-64-v4, by its name."""
    kernel = r"<[^\n]*?::(\w+)\([^\n]*arch_x86_64_v4\]>:\n(.*?)\n\n"
    return dict(re.findall(kernel, listing, re.DOTALL))


@pytest.mark.parametrize("name", EXPECTED)
def test_kernels_work_on_sixteen_floats_at_a_time(functions, name):
    for instruction in EXPECTED[name]:
        assert re.search(rf"\b{instruction}\w*\s.*%zmm", functions[name]), instruction


def test_products_of_small_matrices_keep_their_sums_in_registers(listing):
    """Vectors that are longer than registers go through memory, at a tenth of the speed."""
    found = re.search(r"::multiply\([^\n]*arch_x86_64_v3\]>:\n(.*?)\n\n", listing, re.DOTALL)
    assert re.search(r"vmulps\s.*%ymm", found[1])
    assert not re.search(r"vmov\w+\s+%ymm\d+,[^,]*\(%r[sb]p\)", found[1])
