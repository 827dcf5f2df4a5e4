"""The stages of ``make gpu``, in the order of their value.

A stage is a command with a time limit. In a rehearsal, without a GPU, another command takes its
place, which runs as much of it as a CPU can.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

PYTHON = sys.executable
BASE = [
    PYTHON,
    "-m",
    "pytest",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:benchmark",
    "--tb=short",
    "-rfE",
    "--durations=5",
]
"""pytest without plugins that warn where warnings are errors."""


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Args:
        name: the stage's name, also that of its log.
        what: what it shows, in a few words.
        command: the command; "{out}" stands for the folder of the results.
        seconds: its time limit.
        rehearsal: the command in a rehearsal.
        environment: additional environment variables.
        needs: a program or environment variable without which the stage is skipped.
        expected: how it must end.
    """

    name: str
    what: str
    command: Sequence[str]
    seconds: float
    rehearsal: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    expected: str = "passed"


def pytest(*arguments: str, jobs: int = 0) -> list[str]:
    """pytest on some files; ``jobs`` processes of it, where xdist is there."""
    return [*BASE, *(["-n", str(jobs)] if jobs and xdist() else []), *arguments]


def xdist() -> bool:
    import importlib.util

    return importlib.util.find_spec("xdist") is not None


def module(name: str, *arguments: str) -> list[str]:
    return [PYTHON, "-m", f"benchmarks.gpu.{name}", *arguments]


def timing(name: str, *races: str, quick: bool = False) -> list[str]:
    rehearsed = ["--device", "cpu", "--quick"] if quick else []
    return module(name, "--out", "{out}", *rehearsed, *races)


ON_GPU = [
    "tests/optim/test_on_gpu.py", "tests/hope/test_on_gpu.py", "tests/distributed/test_on_gpu.py",
]  # fmt: skip
CONTRACT = "tests/optim/contract"
SANITIZED = ["tests/ops/test_parity.py", "-k", "same_bit_for_bit and (cuda or triton)"]
MANY_CORES = ("gpt2-small", "adamw-large")
"""What is timed on the CPU too."""
COMPILERS = str(max(1, min(16, os.cpu_count() or 1)))


def sanitizer(tool: str) -> Stage:
    return Stage(
        tool,
        f"compute-sanitizer {tool}: every operator on the GPU",
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest(*SANITIZED)],
        60,
        pytest("tests/ops/test_parity.py", "-k", "same_bit_for_bit and cuda and frobenius"),
        needs="compute-sanitizer",
    )


STAGES = (
    Stage(
        "build",
        "the extensions for this card, and what they bring",
        module("build"),
        150,
        module("build"),
        {"MAX_JOBS": COMPILERS},
    ),
    Stage(
        "parity",
        "every operator on cuda and triton against float64",
        pytest("tests/ops/test_parity.py", "-k", "cuda or triton", jobs=8),
        90,
        pytest("tests/ops/test_cuda_emulation.py", "-k", "frobenius or library"),
    ),
    Stage(
        "kernels",
        "Triton's kernels at the sizes they are for; graphs and streams",
        pytest("tests/triton/test_on_gpu.py", "tests/ops/test_cuda.py", jobs=4),
        90,
        pytest("tests/triton/emulated.py", "-k", "symmetric_product_is"),
    ),
    Stage(
        "steps",
        "steps, graphs, scaling, rounding, checkpoints; Hope; FSDP2 on NCCL",
        pytest(*ON_GPU, jobs=8),
        90,
        pytest(*ON_GPU, "-k", "DeltaMomentum-default or hope or linear"),
    ),
    Stage(
        "elementwise",
        "the element-wise path against torch's fused AdamW",
        timing("races", "adamw-large", "adamw-bf16", "adamw-400"),
        45,
        timing("races", "adamw-large", "adamw-bf16", "adamw-400", quick=True),
    ),
    Stage(
        "matrices",
        "memories at GPT-2-small's matrices against torch's Muon",
        timing("races", "gpt2-small"),
        75,
        timing("races", "gpt2-small", quick=True),
    ),
    Stage(
        "operators",
        "each kernel's share of bandwidth or of the tensor cores' rate",
        timing("operators"),
        60,
        timing("operators", quick=True),
    ),
    Stage(
        "tiles",
        "which tiles the matrix kernels should use",
        module("tiles", "--out", "{out}"),
        45,
        module("tiles", "--help"),
    ),
    Stage(
        "training",
        "tokens per second: GPT-2-small with three optimizers; Hope and a Transformer",
        timing("training"),
        110,
        timing("training", quick=True),
    ),
    Stage(
        "matrices-xl",
        "memories at GPT-2-XL's matrices against torch's Muon",
        timing("races", "gpt2-xl"),
        60,
        timing("races", "gpt2-xl", quick=True),
    ),
    Stage(
        "compiled",
        "GPT-2-small's matrices against a Muon compiled by inductor",
        timing("races", "gpt2-small-compiled"),
        90,
        timing("races", "gpt2-small-compiled", quick=True),
    ),
    Stage(
        "contract",
        "what torch asks of an optimizer, with parameters on the GPU",
        pytest(CONTRACT, "-k", "not recompile", jobs=12),
        120,
        pytest(CONTRACT, "-k", "repr"),
        {"DEEPOPT_TEST_DEVICE": "cuda"},
    ),
    Stage(
        "upstream",
        "PyTorch's own optimizer tests on the GPU",
        pytest("tests/upstream"),
        120,
        pytest("tests/upstream"),
        {"DEEPOPT_TEST_DEVICE": "cuda"},
        needs="DEEPOPT_TORCH_TESTS",
    ),
    sanitizer("memcheck"),
    sanitizer("racecheck"),
    Stage(
        "many-cores",
        "the CPU's steps on all cores of this machine",
        [*timing("races", *MANY_CORES), "--device", "cpu"],
        60,
        timing("races", *MANY_CORES, quick=True),
        {"OMP_NUM_THREADS": COMPILERS},
    ),
)

PLANTED = tuple(
    Stage(f"planted-{how}", f"a planted {how}", [], limit, module("planted", how), expected=status)
    # A busy machine takes seconds to import torch, so only the hang has a short limit.
    for how, status, limit in (
        ("failure", "FAILED", 60),
        ("hang", "TIMED OUT", 4),
        ("crash", "CRASHED", 60),
    )
)
"""What a rehearsal must report as it is."""
