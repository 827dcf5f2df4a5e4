"""The coordinate MLP's operators on their kernels against plain torch."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.speed.case import Found, Setting, Target
from benchmarks.speed.race import race, ratio, seconds_of
from benchmarks.timing import Contender
from deepopt import ops

CoordinateMlpRow = TypedDict(
    "CoordinateMlpRow",
    {
        "contender": str,
        "FLOPs of a tanh": int,
        "GFLOP/s": float,
        "of the float32 products' rate": float,
    },
)


def coordinate_mlp(
    gradient: bool, shape: tuple[int, int, int] = (12, 768, 768), seconds: float = 15.0
) -> Callable[[Setting], Found]:
    """The operator, or its gradient, on its kernel against plain torch."""
    count = work.coordinate_mlp_gradient if gradient else work.coordinate_mlp

    def run(setting: Setting) -> Found:
        device, features, elements = setting.device, 2, math.prod(shape)
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        base, target = drawn(*shape), drawn(*shape)
        keys = [drawn(*shape) for _ in range(features)]
        weights = drawn(shape[0], work.HIDDEN, features + 1)
        scales, ones = drawn(shape[0], features), torch.ones(shape[0], device=device)

        def forced(backend: str) -> Callable[[], Any]:
            def step() -> None:
                with ops.backend(backend):
                    if gradient:
                        ops.coordinate_mlp_gradient(base, ones, keys, scales, weights, target, ones)
                    else:
                        ops.coordinate_mlp(base, ones, keys, scales, weights)

            return step

        phases = count(elements, features)
        backends = {"reference": "reference", "kernel": "cpu" if device == "cpu" else "cuda"}
        racers = {
            name: functools.partial(Contender, name, forced(backend), phases, phases)
            for name, backend in backends.items()
        }
        line = race(racers, seconds, setting)
        details: list[CoordinateMlpRow] = []
        for name in backends:
            for tanh in (1, work.TANH_OPERATIONS):
                flops = work.total_flops(count(elements, features, tanh))
                rate = flops / seconds_of(line, name)
                details.append(
                    {
                        "contender": name,
                        "FLOPs of a tanh": tanh,
                        "GFLOP/s": rate / 1e9,
                        "of the float32 products' rate": rate / line["rates"]["float32"],
                    }
                )
        return {**line, "details": details}

    return run


def peak_share(contender: str, tanh: int) -> Target:
    def value(line: Found) -> float:
        found = {(d["contender"], d["FLOPs of a tanh"]): d for d in line["details"]}
        return found[contender, tanh]["of the float32 products' rate"]

    what = f"{contender}: share of the float32 peak, a tanh counted as {tanh} FLOPs"
    return Target(what, value, 0.3, at_least=True)


MLP_TARGETS = (
    ratio("kernel", "reference", 1 / 8),
    *(peak_share("kernel", tanh) for tanh in (1, work.TANH_OPERATIONS)),
)
