"""How a step's time grows with the number of parameters."""

import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch

from benchmarks.speed.case import Found, Setting, Target
from benchmarks.speed.optimizers import LR, Shapes, contender, deep, deep_adamw, gradients
from benchmarks.timing import clock_of, interleave

MILLIONS = (1, 3, 10, 30, 100, 300)

ScalingRow = TypedDict("ScalingRow", {"parameters": int, "ms": float, "ns per parameter": float})


def scaling(
    optimizer: str, millions: Sequence[float] = MILLIONS, minute: float = 60.0, side: int = 768
) -> Callable[[Setting], Found]:
    """Step times against the number of parameters, as far as a minute per point and the memory
    allow, and their exponent."""

    def run(setting: Setting) -> Found:
        device, clock = setting.device, clock_of(setting.device)
        details: list[ScalingRow] = []
        for million in millions[:3] if setting.quick else millions:
            elements = int(million * 1e6)
            shapes: Shapes = [(elements,)]
            make = deep_adamw(LR)
            if optimizer == "delta":
                shapes = [(side, side)] * max(1, round(elements / side**2))
                make = deep("delta")
            elements = sum(math.prod(shape) for shape in shapes)
            if details:
                expected = details[-1]["ms"] / 1e3 * elements / details[-1]["parameters"]
                if 5 * expected > minute or 48 * elements > free_bytes(device):
                    break
            stepped = contender("", make, gradients(shapes, torch.float32, device), (), ())
            (times,) = interleave([stepped], setting.seconds(minute / 20), device, most=50)
            details.append(
                {
                    "parameters": elements,
                    "ms": times[clock] * 1e3,
                    "ns per parameter": times[clock] * 1e9 / elements,
                }
            )
            del stepped
        return {"clock": clock, "details": details, "exponent": exponent(details)}

    return run


def exponent(details: Sequence[ScalingRow]) -> float:
    """The exponent of the power law through the points, by least squares of their logarithms."""
    if len(details) < 2:
        return math.nan
    sizes = [math.log(point["parameters"]) for point in details]
    times = [math.log(point["ms"]) for point in details]
    return statistics.linear_regression(sizes, times).slope


def free_bytes(device: str) -> float:
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


LINEAR = Target("exponent of the step time, minus 1", lambda line: abs(line["exponent"] - 1), 0.05)
