"""Correctness beside speed: errors of steps, and singular values of orthogonalized matrices."""

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from benchmarks import work
from benchmarks.speed.case import Found, Setting
from benchmarks.speed.optimizers import Make, Shapes, deep_adamw
from deepopt import ops
from deepopt.optim.output_map import Orthogonal

StridesRow = TypedDict("StridesRow", {"contender": str, "largest error": float})
Spread = TypedDict(
    "Spread",
    {
        "50% within": float,
        "90% within": float,
        "99% within": float,
        "all within": float,
        "smallest σ": float,
        "largest σ": float,
    },
)


class SingularValuesRow(Spread):
    """The singular values of one matrix, orthogonalized by one contender."""

    shape: str
    input: str
    contender: str


def strides(setting: Setting, shape: Sequence[int] = (64, 32, 3, 3), steps: int = 3) -> Found:
    """Parameters in channels-last order, gradients in torch's: the error of a few steps."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(steps)]

    def stepped(make: Make, dtype: torch.dtype, order: torch.memory_format) -> Tensor:
        value = start.to(dtype).to(setting.device, memory_format=order)
        param = nn.Parameter(value)
        optimizer = make([param])
        for grad in grads:
            param.grad = grad.to(setting.device, dtype)
            optimizer.step()
        return param.detach().double()

    def adamw(params: list[nn.Parameter]) -> Optimizer:
        return AdamW(params, lr=1e-2, foreach=False)

    exact = stepped(adamw, torch.float64, torch.contiguous_format)
    contenders: dict[str, Make] = {
        "AdamW default": adamw,
        "AdamW foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
        "AdamW fused": lambda p: AdamW(p, lr=1e-2, fused=True),
        "DeepMomentum": deep_adamw(1e-2),
    }
    details: list[StridesRow] = []
    for name, make in contenders.items():
        error = stepped(make, torch.float32, torch.channels_last) - exact
        details.append({"contender": name, "largest error": float(error.abs().max())})
    return {"details": details}


def singular_values(setting: Setting, shapes: Shapes = ((768, 768), (768, 3072))) -> Found:
    """How far from 1 the singular values σ of orthogonalized matrices are."""
    device = setting.device
    steps = work.NS_STEPS
    deep = Orthogonal(steps)

    def torchs(matrix: Tensor) -> Tensor:
        param = nn.Parameter(torch.zeros_like(matrix))
        param.grad = matrix
        Muon([param], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, ns_steps=steps).step()
        m, n = matrix.shape
        return -param.detach() / max(1.0, m / n) ** 0.5  # the learning rate's adjustment

    maps: dict[str, Callable[[Tensor], Tensor]] = {
        "torch Muon": torchs,
        "DeepMomentum": lambda matrix: deep.orthogonalize(matrix[None])[0],
        "DeepMomentum, in float32": lambda matrix: ops.newton_schulz(
            matrix[None], ops.polar_express(steps), torch.float32
        )[0],
    }
    details: list[SingularValuesRow] = []
    for shape in shapes:
        for name, matrix in inputs(*shape).items():
            for contender, orthogonal in maps.items():
                values = torch.linalg.svdvals(orthogonal(matrix.to(device)).double().cpu())
                spread = spread_of(values)
                size = " x ".join(map(str, shape))
                details.append({"shape": size, "input": name, "contender": contender, **spread})
    return {"details": details}


def spread_of(values: Tensor) -> Spread:
    """The distances from 1 within which so many of the singular values are, and their range."""
    error = (values - 1).abs()
    return {
        "50% within": float(error.quantile(0.5)),
        "90% within": float(error.quantile(0.9)),
        "99% within": float(error.quantile(0.99)),
        "all within": float(error.max()),
        "smallest σ": float(values.min()),
        "largest σ": float(values.max()),
    }


def inputs(m: int, n: int) -> dict[str, Tensor]:
    """Gaussian, and with singular values spread evenly over orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(m, n, generator=generator)
    left, _, right = torch.linalg.svd(gaussian.double(), full_matrices=False)
    made = {"gaussian": gaussian}
    for condition in (1e3, 1e6):
        values = torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)
        made[f"condition {condition:.0e}"] = ((left * values) @ right).float()
    return made


def farther(line: Found) -> float:
    """DeepMomentum's distance from 1 over torch's, at the quantile where that is worst.

    The largest distance does not count. It is that of the direction in which the input is weakest,
    and with singular values over many orders of magnitude no five steps can reach it.
    """
    rows = {(d["shape"], d["input"], d["contender"]): d for d in line["details"]}
    return max(
        row[column] / rows[shape, name, "torch Muon"][column]
        for (shape, name, contender), row in rows.items()
        if contender == "DeepMomentum"
        for column in ("50% within", "90% within", "99% within")
    )
