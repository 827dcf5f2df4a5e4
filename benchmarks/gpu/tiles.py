"""Which tiles are fastest, and whether cuBLAS is: what the matrix kernels' choices are made from."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu.clock import Clock, captured, quartiles
from benchmarks.gpu.rows import write_line
from deepopt.ops.triton.delta import erase_kernel
from deepopt.ops.triton.split import split_kernel
from deepopt.ops.triton.symmetric import symmetric_kernel

SHAPES = ((48, 768, 768), (12, 768, 3072), (12, 1600, 1600), (12, 1600, 6400), (12, 192, 768))
"""(matrices, side, depth)."""
# Rows, columns, depth, warps, stages.
SYMMETRIC = (
    (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 128, 32, 8, 4),
    (128, 128, 128, 8, 2), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3),
)  # fmt: skip
ERASE = (
    (128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3), (64, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
)  # fmt: skip
SPLIT = (
    (128, 128, 32, 8, 3), (128, 128, 64, 8, 2), (128, 64, 32, 4, 3), (128, 64, 64, 4, 3),
    (64, 64, 32, 4, 4), (128, 128, 32, 4, 3),
)  # fmt: skip
Call = Callable[[], Any]


def blocks(tile: tuple[int, ...]) -> dict[str, int]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, tile, strict=True))


def symmetric(x: Tensor, addend: Tensor | None) -> Iterator[tuple[str, Call]]:
    batch, size, depth = x.shape
    out = x.new_empty(batch, size, size)
    kernel = symmetric_kernel.fn if hasattr(symmetric_kernel, "configs") else symmetric_kernel
    for tile in SYMMETRIC:
        count = triton.cdiv(size, tile[0])
        grid = (batch * count * (count + 1) // 2,)

        def call(tile: tuple[int, ...] = tile, grid: tuple[int] = grid) -> None:
            kernel[grid](
                x, x, out if addend is None else addend, out, 1.0, 1.0, 0.0, batch, size, depth,
                *x.stride(), *x.stride(), HAS_ADDEND=addend is not None, **blocks(tile),
            )  # fmt: skip

        yield str(tile), call
    if addend is None:
        yield "cuBLAS", lambda: torch.bmm(x, x.mT)
    else:
        yield "cuBLAS", lambda: torch.baddbmm(addend, x, x.mT)


def erase(batch: int, m: int, n: int, device: torch.device) -> Iterator[tuple[str, Call]]:
    momentum, grad, out = (torch.randn(batch, m, n, device=device) for _ in range(3))
    a = torch.randn(batch, m, min(m, n), device=device).bfloat16()
    b = torch.randn(batch, min(m, n), n, device=device).bfloat16()
    numbers = torch.ones(batch, device=device)
    slots = triton.cdiv(m, 32) * triton.cdiv(n, 32)
    norms = torch.zeros(batch, 2, slots, device=device)
    kernel = erase_kernel.fn if hasattr(erase_kernel, "configs") else erase_kernel
    for tile in ERASE:
        grid = (batch * triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]),)

        def call(tile: tuple[int, ...] = tile, grid: tuple[int] = grid) -> None:
            kernel[grid](
                a, b, momentum, grad, numbers, numbers, out, norms, batch, m, n, a.shape[-1],
                slots, *a.stride(), *b.stride(), **blocks(tile),
            )  # fmt: skip

        yield str(tile), call
    yield "cuBLAS and lerp", lambda: torch.baddbmm(out, a.float(), b.float())


def split(batch: int, m: int, n: int, device: torch.device) -> Iterator[tuple[str, Call]]:
    a = torch.randn(batch, m, m, device=device)
    b, out = torch.randn(batch, m, n, device=device), torch.empty(batch, m, n, device=device)
    for tile in SPLIT:
        grid = (batch * triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]),)

        def call(tile: tuple[int, ...] = tile, grid: tuple[int] = grid) -> None:
            split_kernel[grid](a, b, out, batch, m, n, m, *a.stride(), *b.stride(), **blocks(tile))

        yield str(tile), call
    yield "cuBLAS, float32", lambda: torch.bmm(a, b)
    exact = a[:4].double() @ b[:4].double()
    for name, found in (("split", out[:4]), ("cuBLAS", a[:4] @ b[:4])):
        print(f"{name}: off by {(found.double() - exact).norm() / exact.norm():.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    clock = Clock("cuda")
    device = clock.device
    cases: list[tuple[str, tuple[int, ...], float, Iterator[tuple[str, Call]]]] = []
    for shape, addend in itertools.product(SHAPES, (False, True)):
        if addend and shape[1] != shape[2]:
            continue
        x = torch.randn(shape, device=device).half() / shape[2] ** 0.5
        flops = 2.0 * shape[0] * shape[1] ** 2 * shape[2]
        added = x.new_ones(shape[0], shape[1], shape[1]) if addend else None
        name = "X Xᵀ + D, float16" if addend else "X Xᵀ, float16"
        cases.append((name, shape, flops, symmetric(x, added)))
    for shape in ((48, 768, 768), (12, 768, 3072)):
        flops = 2.0 * shape[0] * shape[1] ** 2 * shape[2]
        cases.append(("A B, split float32", shape, flops, split(*shape, device)))
    for batch, m, n in ((12, 768, 768), (12, 768, 3072), (12, 3072, 768)):
        cases.append(
            (
                "erase, bfloat16",
                (batch, m, n),
                2.0 * batch * m * n * min(m, n),
                erase(batch, m, n, device),
            )
        )
    for name, shape, flops, calls in cases:
        for tile, call in calls:
            where = {"kind": "tile", "device": "cuda", "operator": name, "shape": shape}
            try:
                call()
                play = captured(call) or call
                seconds = quartiles([clock.work(play, 1e-4) for _ in range(7)])
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                write_line(
                    arguments.out, {**where, "what": tile, "kind": "tile failed", "note": reason}
                )
                continue
            rate = flops / seconds.median / 1e12
            write_line(
                arguments.out, {**where, "what": tile, "work": seconds, "tflops": round(rate)}
            )


if __name__ == "__main__":
    main()
