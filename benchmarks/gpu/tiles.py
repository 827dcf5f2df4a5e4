"""Which tiles are fastest, and whether cuBLAS is: what csrc/triton/tiles.py is made from."""

import argparse
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.gpu.clock import Clock, captured
from benchmarks.gpu.rows import write_line
from benchmarks.timing import quartiles

Call = Callable[[], Any]
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


class Product(NamedTuple):
    """A product, our kernel's call and torch's, and the tiles that are tried."""

    name: str
    shape: tuple[int, int, int]
    chooser: str
    """The function that chooses the tile, in its module: "symmetric.symmetric_tile"."""
    tiles: tuple[tuple[int, ...], ...]
    ours: Call
    torchs: Call


def products(device: torch.device) -> Iterator[Product]:
    triton = importlib.import_module("deepopt.ops.triton")
    choosers = ("symmetric.symmetric_tile", "split.split_tile", "delta.erase_tile")
    sides = ((48, 768, 768), (12, 768, 3072), (12, 1600, 1600), (12, 1600, 6400), (12, 192, 768))
    for shape in sides:
        x = (torch.randn(shape, device=device) / shape[2] ** 0.5).half()
        d = x.new_ones(shape[0], shape[1], shape[1])
        ours, torchs = partial(triton.symmetric_product, x, x), partial(torch.bmm, x, x.mT)
        yield Product("X Xᵀ, float16", shape, choosers[0], SYMMETRIC, ours, torchs)
        ours, torchs = (
            partial(triton.symmetric_product, x, x, d),
            partial(torch.baddbmm, d, x, x.mT),
        )
        yield Product("X Xᵀ + D, float16", shape, choosers[0], SYMMETRIC, ours, torchs)
    for shape in sides[:2]:
        b = torch.randn(shape, device=device)
        a = b @ b.mT
        ours, torchs = partial(triton.split_product, a, b, bounded=True), partial(torch.bmm, a, b)
        yield Product("A B, split float32", shape, choosers[1], SPLIT, ours, torchs)
    for shape in ((12, 768, 768), (12, 768, 3072), (12, 3072, 768)):
        momentum, grad = torch.randn(2, *shape, device=device)
        short = min(shape[1:])
        a = torch.randn(shape[0], shape[1], short, device=device).bfloat16()
        b = torch.randn(shape[0], short, shape[2], device=device).bfloat16()
        one = torch.ones(shape[0], device=device)
        ours = partial(triton.erase, momentum, grad, a, b, one, 0.9)
        torchs = partial(torch.baddbmm, momentum, a.float(), b.float())
        yield Product("erase, bfloat16", shape, choosers[2], ERASE, ours, torchs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    clock = Clock("cuda")
    tile_of = importlib.import_module("deepopt.ops.triton.tiles").Tile
    for product in products(clock.device):
        about = {"device": "cuda", "operator": product.name, "shape": product.shape}
        for tile in (*product.tiles, None):
            line = {"kind": "tile", **about, "what": str(tile or "cuBLAS")}
            chosen = mock.Mock(return_value=tile_of(*tile) if tile else None)
            call = product.ours if tile else product.torchs
            try:
                with mock.patch(f"deepopt.ops.triton.{product.chooser}", chosen):
                    call()
                    play = captured(call) or call
                    line["work"] = quartiles([clock.work(play, 1e-4) for _ in range(7)])
            except Exception as error:  # a tile that does not fit
                line |= {"kind": "no tile", "note": f"{type(error).__name__}: {str(error)[:200]}"}
            write_line(arguments.out, line)


if __name__ == "__main__":
    main()
