"""W8: ill-conditioned linear regression with noise, whose optimum is known."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.quality.datasets import generator
from benchmarks.quality.workload import workload

SIDE, BATCH = 64, 64
NOISES = (0.0, 0.3, 3.0)
"""Noise of the outputs, in units of their own standard deviation: a matrix for each."""
CONDITION = 1e4
"""Condition of the Hessian, a Kronecker product: a matrix of the inputs and one of the outputs."""


class Batch(NamedTuple):
    """Inputs (BATCH, SIDE) and outputs (len(NOISES), BATCH, SIDE) of the matrices."""

    inputs: Tensor
    outputs: Tensor


class Problem(NamedTuple):
    """The sought matrix and bias, and square roots of the Hessian's two factors."""

    weight: Tensor
    bias: Tensor
    inputs: Tensor
    outputs: Tensor


@functools.cache
def problem() -> Problem:
    """One for all seeds: rotations at random, singular values in geometric progression."""
    random = generator(0, -1)

    def root() -> Tensor:
        q = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=random)).Q
        return q @ torch.logspace(0, -math.log10(CONDITION) / 4, SIDE).diag() @ q.T

    inputs, outputs = root(), root()
    weight = torch.randn(SIDE, SIDE, generator=random) / SIDE**0.5
    return Problem(weight, torch.randn(SIDE, generator=random) / SIDE**0.5, inputs, outputs)


def data(seed: int, step: int) -> Batch:
    random, sought = generator(seed, step), problem()
    inputs = torch.randn(BATCH, SIDE, generator=random) @ sought.inputs
    exact = inputs @ sought.weight.T + sought.bias
    noise = torch.randn(len(NOISES), BATCH, SIDE, generator=random)
    size = (sought.inputs @ sought.weight.T).square().sum(0).mean().sqrt()
    return Batch(inputs, exact + size * torch.tensor(NOISES)[:, None, None] * noise)


def model() -> nn.Module:
    return nn.ModuleList(nn.Linear(SIDE, SIDE) for _ in NOISES)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error in the metric of the outputs' factor, summed over the matrices."""
    found = torch.stack([layer(batch.inputs) for layer in model])  # type: ignore[attr-defined]
    return ((found - batch.outputs) @ problem().outputs).square().mean((1, 2)).sum()


@torch.no_grad()
def metrics(model: nn.Module) -> dict[str, float]:
    """By how much each expected loss exceeds its optimum, in units of the zero matrix's."""
    sought = problem()

    def excess(weight: Tensor, bias: Tensor) -> float:
        from_weight = sought.outputs @ (weight - sought.weight) @ sought.inputs
        from_bias = sought.outputs @ (bias - sought.bias)
        return (from_weight.square().sum() + from_bias.square().sum()).item()

    zero = excess(torch.zeros(SIDE, SIDE), torch.zeros(SIDE))
    found = {
        f"noise_{noise:g}": excess(layer.weight, layer.bias) / zero
        for noise, layer in zip(NOISES, model, strict=True)  # type: ignore[call-overload]
    }
    return {"val_loss": math.prod(found.values()) ** (1 / len(found)), **found}


WORKLOAD = workload(
    data=data,
    model=model,
    loss=loss,
    metrics=metrics,
    steps=400,
    seeds=5,
    about="regression on three 64 x 64 matrices of condition 10,000 without noise, with some and "
    "with much, batches of 64; val_loss is the geometric mean of what the expected losses exceed "
    "the optimum by, 1 for the zero matrix",
)
