"""What a step did to every parameter. Nothing here runs unless it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deepopt import routing
from deepopt.optim.engine.sharding import whole

if TYPE_CHECKING:
    from deepopt.optim.base import MemoryOptimizer


class Diagnosis(NamedTuple):
    """What one step did to one parameter.

    Attributes:
        path: "matrix", "stack" or "elementwise".
        parameter: root mean square of the parameter before the step.
        update: root mean square of its change, weight decay included.
        ratio: update / parameter; about lr where the optimizer sets the size, and usually between
            1e-4 and 1e-2.
        cosine: the cosine between the change and the direction of descent.
        memory: what the memory reports of itself, by name: "erased", the share of the momentum that
            a step of the delta memory erases; "slow weight", that of M3's slow momentum.
        condition_number: the largest singular value of the change over its smallest one, as the
            mean over the parameter's matrices; None unless it was asked for, and on the
            element-wise path.
    """

    path: str
    parameter: float
    update: float
    ratio: float
    cosine: float
    memory: dict[str, float]
    condition_number: float | None = None

    def scalars(self) -> dict[str, float]:
        """All numbers by name, as loggers take them."""
        named = {"parameter": self.parameter, "update": self.update, "ratio": self.ratio}
        named |= {"cosine": self.cosine, **self.memory}
        condition = self.condition_number
        return named if condition is None else {**named, "condition_number": condition}


@contextmanager
def watch(optimizer: "MemoryOptimizer", condition_number: bool) -> Iterator[dict[str, Diagnosis]]:
    """See :meth:`deepopt.DeepMomentum.diagnostics`."""
    diagnoses: dict[str, Diagnosis] = {}
    before: list[Tensor] = []

    def remember(*_: Any) -> None:
        before[:] = [param.detach().clone() for param in _params(optimizer)]

    def compare(*_: Any) -> None:
        # Gradients are read after the step, because a closure computes them inside it. The step
        # does not change them.
        diagnoses.clear()
        groups = optimizer.param_groups
        rows = [(index, *row) for index, g in enumerate(groups) for row in routing.routed(g)]
        for number, ((index, param, name, route), old) in enumerate(zip(rows, before, strict=True)):
            if param.grad is None:
                continue
            sign = 1 if groups[index]["maximize"] else -1
            report = optimizer._report(groups[index], param, route)
            key = name or f"parameter {number}"
            key = f"{key} of group {index}" if key in diagnoses else key
            diagnoses[key] = _diagnose(
                old, param.detach(), sign * param.grad.detach(), route, report, condition_number
            )
        before.clear()

    hooks = (
        optimizer.register_step_pre_hook(remember),
        optimizer.register_step_post_hook(compare),
    )
    try:
        yield diagnoses
    finally:
        for hook in hooks:
            hook.remove()


def _params(optimizer: "MemoryOptimizer") -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.no_grad()
def _diagnose(
    old: Tensor,
    new: Tensor,
    descent: Tensor,
    route: routing.Route,
    report: dict[str, Tensor],
    condition_number: bool,
) -> Diagnosis:
    old, new, descent = (_exact(x) for x in (old, new, descent))
    change = new - old
    parameter, update = _rms(old), _rms(change)
    # Scaled first, because squares of tiny changes would underflow.
    unit_change, unit_descent = _scaled(change), _scaled(descent)
    norms = (unit_change.norm() * unit_descent.norm()).item()
    condition = None
    if condition_number and route.path != "elementwise" and change.numel():
        values = torch.linalg.svdvals(routing.matrices(change, route.path, route.split))
        condition = (values[:, 0] / values[:, -1].clamp_min(1e-300)).mean().item()
    return Diagnosis(
        route.path,
        parameter,
        update,
        update / parameter if parameter else float("inf") if update else 0.0,
        (unit_change * unit_descent).sum().item() / norms if update and norms else 0.0,
        {name: whole(value).double().mean().item() for name, value in report.items()},
        condition,
    )


def _exact(tensor: Tensor) -> Tensor:
    """All entries, in float64 on the host."""
    tensor = whole(tensor)
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.to("cpu", torch.float64)


def _scaled(tensor: Tensor) -> Tensor:
    """The tensor divided by its largest entry."""
    return tensor / max(tensor.abs().max().item(), 1e-300) if tensor.numel() else tensor


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0
