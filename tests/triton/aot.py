"""Compiles every kernel for one GPU and prints what the machine code uses, as JSON.

``python tests/triton/aot.py cuda:90``: needs triton, but neither a GPU nor a driver.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepopt.ops.triton.delta import erase_kernel
from deepopt.ops.triton.scaling import CHUNK, OPTIONS, divide_kernel, norm_kernel
from deepopt.ops.triton.split import split_kernel
from deepopt.ops.triton.symmetric import symmetric_kernel
from deepopt.ops.triton.tiles import ERASE, EXACT, LARGE, SMALL, SPLIT, Tile, adapted

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What the launcher finds in whole numbers: those that 16 divides, and strides of one.
STRIDES = {f"{x}_{axis}" for x in "ab" for axis in ("batch", "row", "column")}
SIZES = {"batch", "size", "depth", "m", "n", "slots", "length"}
POINTERS = {"out_ptr": "fp32", "momentum_ptr": "fp32", "grad_ptr": "fp32", "norms_ptr": "fp32"}


def compiled(kernel: Any, types: dict[str, str], unit: set[str], constants: dict[str, Any],
             options: dict[str, int], target: GPUTarget) -> Any:  # fmt: skip
    """The kernel as the launcher would compile it for tensors of these types and strides."""
    function = kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    constants = {**constants, **dict.fromkeys(unit, 1)}
    constants |= {name: size for name, size in options.items() if name.isupper()}
    signature, hints = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + types.get(name, POINTERS.get(name, "fp32"))
        else:
            signature[name] = "i32" if name in STRIDES | SIZES else "fp32"
        whole = name in STRIDES | SIZES - {"batch", "slots"}
        if signature[name] != "constexpr" and (whole or name.endswith("_ptr")):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    launch = {name: number for name, number in options.items() if not name.isupper()}
    return triton.compile(source, target=target, options=launch)


ON_NVIDIA = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE
)
ON_AMD = re.compile(r"^\t([a-z]+_[a-z0-9_]+)", re.MULTILINE)


def looped(code: str) -> str:
    """The lines of a disassembly that a branch leads back over: loops, and what lies between."""
    lines, labels, found = code.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = number
        elif (target := re.search(r"(?:BRA|branch).*?(\.L\w+)", line)) and target[1] in labels:
            found += lines[labels[target[1]] : number]
    return "\n".join(found)


def used_on_nvidia(kernel: Any) -> dict[str, Any]:
    """Registers, spills and instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def tool(*command: str) -> str:
            command = (str(TOOLS / command[0]), *command[1:], file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        code = tool("nvdisasm", "-c", "-ndf")
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return {
        "registers": int(numbers["REG"]),
        "spills": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "instructions": Counter(ON_NVIDIA.findall(code)),
        "looped": Counter(ON_NVIDIA.findall(looped(code))),
    }


def used_on_amd(kernel: Any) -> dict[str, Any]:
    """The same of AMD's assembly."""
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "instructions": Counter(ON_AMD.findall(code)),
        "looped": Counter(ON_AMD.findall(looped(code))),
    }


def cases(target: GPUTarget) -> Iterator[tuple[str, Any]]:
    """(name, compiled kernel) for every kernel, type and tile that the package launches."""

    def compile(kernel: Any, tile: Tile, types: dict[str, str], unit: set[str],
                **constants: bool) -> tuple[str, Any]:  # fmt: skip
        major = int(target.arch) // 10 if target.backend == "cuda" else 0
        tile = adapted(tile, target.backend, major)
        layout = "".join(sorted(name[0] for name in unit if name.endswith("row")))
        blocks = f"{tile.rows}x{tile.columns}x{tile.depth}"
        name = f"{kernel.fn.__name__} {'/'.join(types.values())} {blocks} {layout}".strip()
        return name, compiled(kernel, types, unit, constants, tile.options(), target)

    # Sizes that the tile divides, and sizes that only 16 divides.
    even, masked = {"EVEN": True, "EVEN_K": True}, {"EVEN": False, "EVEN_K": False}
    rows, columns = {"a_column", "b_column"}, {"a_row", "b_row"}

    def square(dtype: str) -> dict[str, str]:
        return dict.fromkeys(("a_ptr", "b_ptr", "addend_ptr", "out_ptr"), dtype)

    single = {"a_ptr": "fp32", "b_ptr": "fp32"}
    yield compile(symmetric_kernel, LARGE, square("bf16"), rows, HAS_ADDEND=True, **even)
    yield compile(symmetric_kernel, SMALL, square("bf16"), rows, HAS_ADDEND=True, **even)
    yield compile(symmetric_kernel, LARGE, square("fp16"), columns, HAS_ADDEND=False, **masked)
    yield compile(symmetric_kernel, EXACT, square("fp32"), rows, HAS_ADDEND=True, **even)
    mixed = ERASE._replace(stages=3)
    yield compile(erase_kernel, mixed, {"a_ptr": "fp32", "b_ptr": "bf16"}, rows, **even)
    yield compile(erase_kernel, ERASE, {"a_ptr": "bf16", "b_ptr": "bf16"}, rows, **masked)
    yield compile(erase_kernel, EXACT, single, rows, **even)
    yield compile(split_kernel, SPLIT, single, rows, HAS_UNITS=False, **even)
    yield compile(split_kernel, SPLIT, single, columns, HAS_UNITS=True, **masked)
    chunk = {"CHUNK": CHUNK, **OPTIONS}
    yield "norm_kernel fp32 chunk", compiled(norm_kernel, {}, set(), {}, chunk, target)
    types = {"out_ptr": "fp16"}
    yield "divide_kernel fp32/fp16 chunk", compiled(divide_kernel, types, set(), {}, chunk, target)


def main(backend: str, architecture: str) -> None:
    """Print Triton's version and {name: usage} of all kernels for one target."""
    if backend == "cuda":
        target, used = GPUTarget("cuda", int(architecture), 32), used_on_nvidia
    else:
        target, used = GPUTarget("hip", architecture, 64), used_on_amd
    print(json.dumps([triton.__version__, {name: used(kernel) for name, kernel in cases(target)}]))


if __name__ == "__main__":
    main(*sys.argv[1].split(":"))
