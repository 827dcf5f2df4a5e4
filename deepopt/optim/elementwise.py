"""The element-wise path of every optimizer: torch's own AdamW."""

from typing import Any

import torch
from torch import Tensor

from deepopt._compat import adam, scalar_dtype
from deepopt.optim.stacking import State


def state_dtype(param: Tensor) -> torch.dtype:
    """State is at least float32: an average in bfloat16 stops moving after 256 small steps."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


def init(param: Tensor, group: dict[str, Any]) -> State:
    """The state that AdamW keeps for ``param``, in float32 for narrower parameters."""
    on_device = group["fused"] or group["capturable"]
    device = param.device if on_device else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=scalar_dtype(bool(group["fused"])), device=device),
        "exp_avg": torch.zeros_like(param, dtype=state_dtype(param)),
        "exp_avg_sq": torch.zeros_like(param, dtype=state_dtype(param)),
    }


def step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW, bit for bit torch's where the state has the parameter's dtype.

    Narrower parameters are stepped in float32 and rounded once. Where ``found_inf`` is 1, nothing
    changes.
    """
    fused = bool(group["fused"])
    if found_inf is not None and not fused:
        if found_inf.item():  # torch's other implementations leave the skipping to the caller
            return
        found_inf = None
    wide = [param.to(state_dtype(param)) for param in params]
    grads = list(grads)
    if fused:  # nothing can be laid out like a tensor with gaps: it is stepped in a dense copy
        wide = [w if torch.empty_like(w).stride() == w.stride() else w.contiguous() for w in wide]
    for index, (param, state) in enumerate(zip(wide, states, strict=True)):
        if grads[index].dtype != param.dtype:
            grads[index] = grads[index].to(param.dtype)
        if fused:
            # torch's fused CPU kernel walks through all tensors in the parameter's memory order.
            if grads[index].stride() != param.stride():
                grads[index] = torch.empty_like(param).copy_(grads[index])
            for key in ("exp_avg", "exp_avg_sq"):
                if state[key].stride() != param.stride():
                    state[key] = torch.empty_like(param).copy_(state[key])
    beta1, beta2 = group["betas"]
    adam(
        wide,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=False if fused else group["foreach"],
        fused=group["fused"],
        capturable=group["capturable"],
        differentiable=group["differentiable"],
        found_inf=found_inf,
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
