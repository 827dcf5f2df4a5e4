"""The optimizers that are timed, and the tensors that they step."""

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from benchmarks import work
from benchmarks.timing import Contender
from benchmarks.work import Work
from deepopt import DMGD, M3, DeepMomentum
from deepopt.optim import output_map

Shapes = Sequence[tuple[int, ...]]
Make = Callable[[list[nn.Parameter]], Optimizer]

LR = 1e-4
RARE = 4
"""Rounds to a turn of the slow contenders that no target needs."""
OTHERS = ("pytorch_optimizer Muon", "heavyball Muon")
"""Optimizers of other packages: what they raise is a result."""


def gradients(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=device).to(dtype) * 0.01 for shape in shapes
    ]


def parameters(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
    for param, grad in zip(found, grads, strict=True):
        param.grad = grad
    return found


def contender(
    name: str, make: Make, grads: Sequence[Tensor], phases: Work, least: Work, period: int = 1
) -> Contender:
    """An optimizer with parameters of its own; those of other packages get their own gradients,
    which they may write to or drop."""
    every = RARE if name in (*OTHERS, "DMGD coordinate") else 1
    if name not in OTHERS:
        step = make(parameters(grads)).step
        return Contender(name, step, phases, least, period, every=every)
    params = parameters([grad.clone() for grad in grads])
    optimizer = make(params)

    def prepare() -> None:
        for param, grad in zip(params, grads, strict=True):
            if param.grad is None:
                param.grad = grad.clone()

    return Contender(name, optimizer.step, phases, least, period, prepare, every)


def other_muon(params: list[nn.Parameter]) -> Optimizer:
    package = importlib.import_module("pytorch_optimizer")  # slow to import, not a dependency
    return package.Muon([{"params": params, "use_muon": True}], lr=LR, ns_steps=work.NS_STEPS)


def heavyball_muon(params: list[nn.Parameter]) -> Optimizer:
    if torch.get_num_threads() > 1:
        raise RuntimeError("timed on one thread alone, because it compiles for minutes")
    return importlib.import_module("heavyball").Muon(params, lr=LR)


def torch_muon(params: list[nn.Parameter]) -> Optimizer:
    return Muon(params, lr=LR, ns_steps=work.NS_STEPS)


def m3(params: list[nn.Parameter]) -> Optimizer:
    return M3(params, lr=LR, path="matrix")


def dmgd(granularity: str) -> Make:
    return lambda params: DMGD(params, lr=LR, granularity=granularity)


def deep(memory: str) -> Make:
    return lambda params: DeepMomentum(params, lr=LR, memory=memory, path="matrix")


def deep_adamw(lr: float) -> Make:
    return lambda params: DeepMomentum(params, lr=lr, path="elementwise")


def products_dtype(m: int, n: int, device: str) -> str:
    """The dtype in which DeepMomentum orthogonalizes a float32 matrix of m x n."""
    return str(output_map.products_dtype(torch.empty(m, n, device=device))).removeprefix("torch.")


def muon_work(m: int, n: int, least: bool) -> Work:
    return work.muon(m, n, least=least)


class MatrixOptimizer(NamedTuple):
    """How an optimizer of matrices is made, and what its step costs.

    Args:
        make: makes it from parameters.
        rule: its work for a matrix of m x n, by m, n and whether the least is asked for.
        period: steps after which its work repeats.
    """

    make: Make
    rule: Callable[..., Work]
    period: int = 1


def matrix_optimizers(device: str) -> dict[str, MatrixOptimizer]:
    """All of them by name."""

    def counted(rule: Callable[[int, int, str, bool], Work]) -> Callable[..., Work]:
        return lambda m, n, least: rule(m, n, products_dtype(m, n, device), least)

    def same(rule: work.Rule) -> Callable[..., Work]:
        return lambda m, n, least: rule(m, n)

    return {
        "torch Muon": MatrixOptimizer(torch_muon, muon_work),
        "DeepMomentum linear": MatrixOptimizer(deep("linear"), counted(work.linear)),
        "DeepMomentum delta": MatrixOptimizer(deep("delta"), counted(work.delta)),
        "DeepMomentum covariance": MatrixOptimizer(
            deep("covariance"), counted(work.covariance), work.PERIOD
        ),
        "DeepMomentum mlp": MatrixOptimizer(deep("mlp"), counted(work.mlp)),
        "M3": MatrixOptimizer(m3, counted(work.m3), work.PERIOD),
        "DMGD row": MatrixOptimizer(dmgd("row"), same(work.dmgd_row)),
        "DMGD coordinate": MatrixOptimizer(dmgd("coordinate"), same(work.dmgd_coordinate)),
        "pytorch_optimizer Muon": MatrixOptimizer(other_muon, muon_work),
        "heavyball Muon": MatrixOptimizer(heavyball_muon, muon_work),
    }
