"""Every kernel alone, beside what bytes and FLOPs allow: ``python -m benchmarks.gpu.operators``."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.gpu.clock import Clock, captured, rates
from benchmarks.gpu.rows import write_line
from benchmarks.timing import quartiles
from benchmarks.work import Phase, Work
from deepopt import ops

BATCH = 12
SIDES = ((768, 768), (768, 3072), (3072, 768))
"""Matrices of one kind in GPT-2-small."""


@dataclass(frozen=True)
class Kernel:
    """An operator on stacks (B, m, n), and its least work."""

    name: str
    call: Callable[[dict[str, Any]], Any]
    work: Callable[[int, int, int], Work]
    """The least work for a stack of shape (B, m, n)."""


def one(bytes_per_entry: float, flops: float = 0.0) -> Callable[[int, int, int], Work]:
    """A pass with so many bytes and FLOPs per entry."""
    return lambda b, m, n: [Phase("pass", b * m * n * bytes_per_entry, b * m * n * flops)]


def stacked(rule: Callable[[int, int], Work]) -> Callable[[int, int, int], Work]:
    return lambda b, m, n: [phase.times(b) for phase in rule(m, n)]


def symmetric(b: int, m: int, n: int) -> Work:
    r, big = sorted((m, n))
    return [Phase("X Xᵀ", b * 2.0 * (r * big + r * r), b * 1.0 * r * r * big, "bfloat16")]


def gram(b: int, m: int, n: int) -> Work:
    r, big = sorted((m, n))
    return [Phase("gram", b * 4.0 * (r * big + 2 * r * r), b * 1.0 * r * r * big, "bfloat16")]


def split(b: int, m: int, n: int) -> Work:
    """Three products in half precision."""
    r, big = sorted((m, n))
    bytes_ = b * 4.0 * (r * r + 2 * r * big)
    return [Phase("product", bytes_, b * 6.0 * r * r * big, "bfloat16")]


def short(x: Tensor) -> Tensor:
    return x if x.shape[-2] <= x.shape[-1] else x.mT


def symmetric_product(x: Tensor) -> Tensor:
    """The kernel's, which takes no CPU tensors."""
    if not x.is_cuda:
        return x @ x.mT
    return importlib.import_module("deepopt.ops.triton").symmetric_product(x, x)


KERNELS: tuple[Kernel, ...] = (
    Kernel(
        "adamw_",
        lambda t: ops.adamw_(
            [t["x"]],
            [t["g"]],
            [t["m"]],
            [t["v"]],
            [t["host"]],
            [],
            [],
            1e-3,
            0.9,
            0.99,
            1e-8,
            0.1,
            False,
        ),
        one(28),
    ),
    Kernel(
        "apply_update_", lambda t: ops.apply_update_([t["x"]], [t["g"]], [], [], 1e-3, 0.1), one(12)
    ),
    Kernel("lerp (torch)", lambda t: t["m"].lerp(t["g"], 0.1), one(12)),
    Kernel("combine of 2", lambda t: ops.combine([t["m"], t["g"]], t["two"]), one(12)),
    Kernel("row_products of 2", lambda t: ops.row_products([t["m"], t["g"]]), one(8)),
    Kernel("frobenius", lambda t: ops.frobenius(t["g"]), one(4)),
    Kernel(
        "scale_update",
        lambda t: ops.scale_update(
            [t["x"]],
            ops.ScaleArguments(
                t["m"],
                t["g"],
                t["step"],
                0.9,
                0.99,
                1.5,
                grad_norm=t["one"],
                row_moment=t["rows"],
                row_weight=t["rows"],
            ),
        ),
        one(4 * 5),
    ),
    Kernel(
        "multi_scale_write",
        lambda t: ops.multi_scale_write(t["m"], t["v"], t["g"], t["step"], 0.9, 10, 0.99),
        one(24),
    ),
    Kernel(
        "horizons_write of 2",
        lambda t: ops.horizons_write(
            [t["m"], t["v"]], t["g"], t["pairs"], t["one"], t["phi"], t["step"], [0.9, 0.7]
        ),
        lambda b, m, n: [Phase("measure", b * m * n * 12.0), Phase("write", b * m * n * 24.0)],
    ),
    Kernel(
        "coordinate_mlp",
        lambda t: ops.coordinate_mlp(t["m"], t["one"], [t["m"], t["g"]], t["pairs"], t["weights"]),
        one(16, work.coordinate_mlp_flops(2, work.TANH_OPERATIONS)),
    ),
    Kernel(
        "coordinate_mlp_gradient",
        lambda t: ops.coordinate_mlp_gradient(
            t["m"], t["one"], [t["m"], t["g"]], t["pairs"], t["weights"], t["x"], t["one"]
        ),
        one(16, work.coordinate_mlp_gradient_flops(2, work.TANH_OPERATIONS)),
    ),
    Kernel(
        "newton_schulz, 5 steps",
        lambda t: ops.newton_schulz(t["g"], ops.polar_express(5), torch.bfloat16),
        stacked(lambda m, n: work.newton_schulz(m, n, least=True)),
    ),
    Kernel(
        "delta_write",
        lambda t: ops.delta_write(t["m"], t["g"], t["one"], t["one"], 0.3, 0.9),
        stacked(lambda m, n: work.delta_write(m, n, least=True)),
    ),
    Kernel(
        "gram_average",
        lambda t: ops.gram_average(
            t["gram"], t["g"], t["one"], t["one"], 0.05, t["g"].shape[1] <= t["g"].shape[2]
        ),
        gram,
    ),
    Kernel("X Xᵀ, bfloat16 (torch)", lambda t: short(t["half"]) @ short(t["half"]).mT, symmetric),
    Kernel("X Xᵀ, bfloat16", lambda t: symmetric_product(short(t["half"])), symmetric),
    Kernel("float32 product, r x r by G", lambda t: ops.matmul(*t["factors"]), split),
)


def inputs(shape: tuple[int, int, int], device: torch.device, seed: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(seed)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    b, m, _ = shape
    found: dict[str, Any] = {key: drawn(*shape) for key in ("x", "g", "m")}
    found["v"] = drawn(*shape).square()
    found["half"] = found["g"].bfloat16()
    keys = short(found["g"])
    found["factors"] = (keys @ keys.mT, keys.contiguous())
    found["gram"] = keys @ keys.mT / keys.shape[-1]
    found["one"] = torch.ones(b, device=device) * 4
    found["step"] = torch.full((b,), 7.0, device=device)
    found["two"] = drawn(2, b)
    found["rows"] = torch.ones(b, m, device=device)
    found["pairs"], found["weights"] = drawn(b, 2).abs(), drawn(b, work.HIDDEN, 3)
    found["phi"] = drawn(b, 2, 8)
    found["host"] = torch.tensor(7.0)
    return found


def measure(kernel: Kernel, shape: tuple[int, int, int], clock: Clock, repeats: int) -> list[float]:
    """Seconds per call, on inputs that take turns so that no cache holds them."""
    turns = 4 if clock.on_gpu else 1
    given = [inputs(shape, clock.device, seed) for seed in range(turns)]

    def calls() -> None:
        for each in given:
            kernel.call(each)

    for _ in range(3):
        calls()
    play = (captured(calls) if clock.on_gpu else None) or calls
    issue = clock.issue(play)
    return [clock.work(play, issue) / turns for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    clock = Clock(arguments.device)
    machine = rates(clock, arguments.quick)
    about = {"device": arguments.device, "quick": arguments.quick}
    write_line(arguments.out, {"kind": "rates", "race": "operators", **about, **machine._asdict()})
    for kernel in KERNELS:
        for m, n in ((64, 80),) if arguments.quick else SIDES:
            shape = (2 if arguments.quick else BATCH, m, n)
            where = {"kind": "operator", **about, "operator": kernel.name, "shape": shape}
            try:
                seconds = quartiles(measure(kernel, shape, clock, 2 if arguments.quick else 20))
            except Exception as error:  # one kernel less
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                write_line(arguments.out, {**where, "kind": "failed", "note": reason})
                continue
            phases = kernel.work(*shape)
            write_line(
                arguments.out,
                {
                    **where,
                    "work": seconds,
                    "bytes": work.total_bytes(phases),
                    "flops": work.total_flops(phases),
                    "predicted": work.roofline_seconds(phases, machine),
                },
            )


if __name__ == "__main__":
    with torch.no_grad():
        main()
