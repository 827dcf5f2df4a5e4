"""The element-wise path of every optimizer: torch's own AdamW."""

from typing import Any

import torch
from torch import Tensor

from deepopt._compat import adam, check_fused, scalar_dtype
from deepopt.optim.stacking import State


def state_dtype(param: Tensor) -> torch.dtype:
    """State is at least float32: an average in bfloat16 stops moving after 256 small steps."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


def init(param: Tensor, group: dict[str, Any]) -> State:
    """The state that AdamW keeps for ``param``, in float32 for narrower parameters."""
    if group["fused"]:
        check_fused(param)
    step_device = param.device if group["fused"] else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=scalar_dtype(bool(group["fused"])), device=step_device),
        "exp_avg": torch.zeros_like(param, dtype=state_dtype(param)),
        "exp_avg_sq": torch.zeros_like(param, dtype=state_dtype(param)),
    }


def step(params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """One step of AdamW, bit for bit torch's where the state has the parameter's dtype.

    Narrower parameters are stepped in float32 and rounded once.
    """
    fusible: dict[bool, list[tuple[Tensor, State]]] = {True: [], False: []}
    for param, state in zip(params, states, strict=True):
        # torch's fused CPU kernel walks through all tensors in the parameter's memory order.
        same_order = state["exp_avg"].stride() == param.stride()
        fusible[bool(group["fused"]) and same_order].append((param, state))
    for fused, chosen in fusible.items():
        if chosen:
            _adamw([param for param, _ in chosen], [state for _, state in chosen], group, fused)


def _adamw(params: list[Tensor], states: list[State], group: dict[str, Any], fused: bool) -> None:
    wide = [param.to(state_dtype(param)) for param in params]
    grads = [param.grad for param in params if param.grad is not None]
    for index, (param, grad) in enumerate(zip(wide, grads, strict=True)):
        if grad.dtype != param.dtype:
            grads[index] = grad.to(param.dtype)
        if fused and grad.stride() != param.stride():
            grads[index] = torch.empty_like(param).copy_(grad)
    beta1, beta2 = group["betas"]
    adam(
        wide,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False if group["fused"] else group["foreach"],
        fused=fused if group["fused"] else group["fused"],
        differentiable=group["differentiable"],
        has_complex=any(param.is_complex() for param in params),
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
    for param, stepped in zip(params, wide, strict=True):
        if stepped is not param:
            param.copy_(stepped)
