"""The CUDA operators, run on the CPU: kernels and launchers as they are, threads taken in turns."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from deepopt.ops.operator import OPERATORS, UNAVAILABLE, Implementation, backend
from tests.ops import comparison, parity

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc" / "cuda"


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


SOURCES = "".join(path.read_text() for path in CSRC.glob("*.cpp"))
EMULATED = sorted(re.findall(r'm\.impl\("(\w+)"', SOURCES))


@pytest.fixture
def in_place_of_cpu(library, monkeypatch):
    """What the table calls the CPU's kernels are the emulated ones."""
    monkeypatch.delitem(UNAVAILABLE, "cpu", raising=False)
    for name in EMULATED:
        found = OPERATORS[name]
        monkeypatch.setitem(
            found.implementations, "cpu", Implementation(emulated(name), found.supports)
        )


@pytest.mark.parametrize("name", EMULATED)
def test_errors_are_those_of_the_arithmetic(in_place_of_cpu, name):
    @settings(derandomize=True, deadline=None, max_examples=40, database=None)
    @given(shape=parity.drawn)
    def check(shape):
        if not parity.TABLE[name].empty and 0 in shape.sizes[1:]:
            shape.sizes = (2, 1, 1)
        comparison.check(name, "cpu", shape)

    check()


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("entry", [0, 1])
def test_a_stack_beyond_one_block_and_pointers_off_16_bytes(in_place_of_cpu, name, entry):
    """More than a chunk of each kernel; the lists' other tensors begin at odd places."""
    dtype = (torch.float32, torch.bfloat16)[entry]
    comparison.check(name, "cpu", parity.Shape(sizes=(2, 130, 301 + entry), dtype=dtype, terms=2))


@pytest.mark.parametrize("name", EMULATED)
def test_results_do_not_depend_on_the_order_of_threads_and_blocks(library, in_place_of_cpu, name):
    arguments = parity.TABLE[name].arguments(parity.Shape(sizes=(3, 33, 401)))
    first = comparison.run(name, "cpu", arguments)
    library.deepopt_turn_around()
    again = comparison.run(name, "cpu", arguments)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_momenta_that_begin_off_16_bytes_are_written_alike(library):
    given = parity.TABLE["multi_scale_write"].arguments(parity.Shape(sizes=(2, 4, 8)))
    off = torch.cat([torch.zeros(1), given[2].reshape(-1)])[1:].view(2, 4, 8)
    assert off.data_ptr() % 16
    results = [emulated("multi_scale_write")(*given[:2], g, *given[3:]) for g in (given[2], off)]
    assert all(map(torch.equal, *results))


def adamw_lists(params, seed=0):
    made = torch.Generator().manual_seed(seed)

    def like(p):
        dtype = torch.promote_types(p.dtype, torch.float32)
        return torch.randn(p.shape, generator=made).to(dtype)

    grads = [like(p).to(p.dtype) for p in params]
    steps = [torch.tensor(float(index % 3)) for index in range(len(params))]
    return [params, grads, [like(p) for p in params], [like(p).square() for p in params], steps]


RATES = (1e-2, 0.9, 0.99, 1e-8, 0.1, False)


def both(library, lists, *rest, steps="device"):
    """The lists after the emulated kernels, after the CPU's, and the number of launches."""
    if "cpu" in UNAVAILABLE:
        pytest.skip(UNAVAILABLE["cpu"])
    ours, theirs = parity.mapped(lists, torch.clone), parity.mapped(lists, torch.clone)
    before = library.deepopt_launches()
    for step in ours[4] if steps == "host" else []:
        library.deepopt_on_host(ctypes.c_void_p(step.data_ptr()))
    emulated("adamw_")(*ours, *rest)
    library.deepopt_on_host(None)
    launches = library.deepopt_launches() - before
    with backend("cpu"):
        OPERATORS["adamw_"](*theirs, *rest)
    return ours, theirs, launches


@pytest.mark.parametrize("steps", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adamw_has_the_bits_of_the_cpu_and_few_launches(library, dtype, steps):
    """300 tensors of all sizes around a vector and a chunk, 50 in a launch (46 in double).

    Steps on the device are counted up by one launch more.
    """
    sizes = [*range(290), 16383, 16384, 16385, 40000]
    lists = adamw_lists([torch.randn(size).to(dtype) for size in sizes])
    ours, theirs, launches = both(library, lists, [], [], *RATES, steps=steps)
    for mine, other in zip(parity.tensors(ours), parity.tensors(theirs), strict=True):
        assert torch.equal(mine, other)
    assert launches == (7 if dtype == torch.float64 else 6) + (steps == "device")


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
@pytest.mark.parametrize("layout", ["rows", "columns", "gaps"])
def test_bfloat16_is_rounded_to_the_bits_of_the_cpu(library, rounding, layout):
    shape = parity.Shape(sizes=(2, 65, 301), dtype=torch.bfloat16, rounding=rounding, layout=layout)
    lists = adamw_lists([shape.matrices(torch.bfloat16), torch.randn(77).bfloat16()])
    lows, seeds = parity.rounding_arguments(shape, lists[0])
    ours, theirs, _ = both(library, [*lists, lows], seeds, *RATES)
    for mine, other in zip(parity.tensors(ours), parity.tensors(theirs), strict=True):
        assert torch.equal(mine, other)


def test_step_counts_that_are_off_by_dtype_are_refused(library):
    lists = adamw_lists([torch.randn(3), torch.randn(4)])
    lists[4][1] = lists[4][1].double()
    with pytest.raises(RuntimeError, match="steps must be float32 or float64, all alike"):
        emulated("adamw_")(*lists, [], [], *RATES)


def test_more_terms_than_a_launch_takes(library):
    tensors = [torch.randn(2, 33, 35 + k % 2)[:, :, :35] for k in range(11)]
    tensors[9] = torch.randn(2, 35, 33).mT
    factors = torch.randn(11, 2, 33)
    exact = sum(f.double()[..., None] * x.double() for f, x in zip(factors, tensors, strict=True))
    assert (emulated("combine")(tensors, factors) - exact).abs().max() < 2e-5


def test_more_units_than_shared_memory_takes(in_place_of_cpu):
    """Weights come in groups of 64 units."""
    shape = parity.Shape(sizes=(2, 5, 40), terms=2)
    for name in ("coordinate_mlp", "coordinate_mlp_gradient"):
        arguments = parity.TABLE[name].arguments(shape)
        arguments[4] = 0.1 * shape.normal(2, 70, 3)
        double = comparison.in_double(name, arguments)
        exact = OPERATORS[name].reference(*double)
        assert torch.allclose(emulated(name)(*arguments).double(), exact, rtol=1e-4, atol=1e-6)
