"""Overheads: Python's share in small steps, and memory beyond parameters, gradients and state."""

import math
from typing import TypedDict

import torch

from benchmarks import work
from benchmarks.speed import optimizers
from benchmarks.speed.case import Found, Setting, Target
from benchmarks.speed.optimizers import LR, Make, Shapes, deep, deep_adamw, gradients, parameters
from benchmarks.timing import peak_bytes, profiled, timed

BucketsRow = TypedDict(
    "BucketsRow",
    {
        "memory": str,
        "buckets": int,
        "µs per bucket": float,
        "operators per bucket": float,
        "µs in operators": float,
        "µs in Python, at least": float,
        "at most": float,
    },
)
MemoryRow = TypedDict(
    "MemoryRow",
    {
        "optimizer": str,
        "MB of a bucket": float,
        "peak of one, in buckets": float,
        "of 2 times the matrices": float,
        "of 2 shapes": float,
        "growth": float,
    },
)


def buckets(setting: Setting, count: int = 40, repeats: int = 10) -> Found:
    """Python's share in a step of many tiny tensors, each of a shape, and so a bucket, of its own.

    The time in torch's operators, and deepopt's, comes from profiles, which lengthen the step. How
    much of that falls into the operators is not known: if all, Python's share is what the profile
    has outside of them; if none, the step's time without a profile minus theirs. The fastest of
    all repeats counts.
    """
    shapes = [(8 + index, 16 + index) for index in range(count)]
    grads = gradients(shapes, torch.float32, setting.device)
    details: list[BucketsRow] = []
    for memory in ("linear", "delta", "mlp"):
        optimizer = deep(memory)(parameters(grads))
        optimizer.step()
        plain = min(timed(optimizer.step, setting.device)[1] for _ in range(5 * repeats)) * 1e6
        profiles = [profiled(optimizer.step) for _ in range(repeats)]
        whole, own = min(profiles, key=lambda profile: profile[0])
        inside = sum(time for time, _ in own.values())
        details.append(
            {
                "memory": memory,
                "buckets": count,
                "µs per bucket": plain / count,
                "operators per bucket": sum(calls for _, calls in own.values()) / count,
                "µs in operators": inside / count,
                "µs in Python, at least": max(0.0, plain - inside) / count,
                "at most": (whole - inside) / count,
            }
        )
    return {"details": details}


def python_overhead(memory: str) -> Target:
    def value(line: Found) -> float:
        return next(d["at most"] for d in line["details"] if d["memory"] == memory)

    return Target(f"{memory}: µs of Python per bucket, at most", value, 20.0)


def memory(
    setting: Setting,
    shapes: tuple[tuple[int, int], tuple[int, int]] = ((512, 1024), (1024, 512)),
    count: int = 8,
) -> Found:
    """What a step takes beyond parameters, gradients and state: of matrices that are one bucket, of
    as many times more of the same shape, and of as many buckets of different shapes."""
    known = optimizers.matrix_optimizers("cpu")
    makers = {
        "DeepMomentum, element-wise": deep_adamw(LR),
        **{name: made.make for name, made in known.items() if name not in optimizers.OTHERS},
    }
    bucket = count * math.prod(shapes[0]) * work.FLOAT
    details: list[MemoryRow] = []
    for name, make in makers.items():

        def peak(chosen: Shapes, make: Make = make) -> float:
            optimizer = make(parameters(gradients(chosen, torch.float32, "cpu")))
            optimizer.step()
            return peak_bytes(optimizer.step) / bucket

        one = max(peak([shape] * count) for shape in shapes)
        more, others = peak([shapes[0]] * count * len(shapes)), peak([*shapes] * count)
        details.append(
            {
                "optimizer": name,
                "MB of a bucket": bucket / 1e6,
                "peak of one, in buckets": one,
                "of 2 times the matrices": more,
                "of 2 shapes": others,
                "growth": max(more, others) / max(one, 1e-9),
            }
        )
    return {"details": details}


def growth(line: Found) -> float:
    return max(
        d["growth"]
        for d in line["details"]
        if d["optimizer"] not in ("DeepMomentum, element-wise", "torch Muon")
    )
