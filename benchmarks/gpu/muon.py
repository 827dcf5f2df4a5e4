"""Muon on stacks of one shape in plain torch, compiled: the fastest that torch alone offers.

Keller Jordan's formulation (https://kellerjordan.github.io/posts/muon/) with the batching of dion:
every Newton-Schulz step is three batched products, and inductor fuses what lies between them.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def updated(momentum: Tensor, grad: Tensor, retention: float) -> tuple[Tensor, Tensor]:
    """The new momentum, and its look-ahead made orthogonal, in bfloat16; shape (B, m, n)."""
    momentum = momentum.lerp(grad, 1 - retention)
    x = grad.lerp(momentum, retention).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return momentum, x.mT if tall else x


class CompiledMuon(Optimizer):
    """Steps matrices with decoupled weight decay, at the root mean square of AdamW's updates."""

    def __init__(self, params: Any, lr: float, retention: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "retention": retention, "weight_decay": weight_decay})
        on_gpu = self.param_groups[0]["params"][0].is_cuda
        self._updated = torch.compile(updated, dynamic=False) if on_gpu else updated

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for shape, params in by_shape.items():
                state = self.state[params[0]]
                grads = torch.stack([param.grad for param in params if param.grad is not None])
                if not state:
                    state["momentum"] = torch.zeros_like(grads)
                momentum, update = self._updated(state["momentum"], grads, group["retention"])
                state["momentum"].copy_(momentum)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                size = -0.2 * math.sqrt(max(shape)) * group["lr"]
                torch._foreach_add_(params, list(update.float().unbind()), alpha=size)
