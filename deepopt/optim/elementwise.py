"""The element-wise path of every optimizer: AdamW, by the kernel if there is one, else torch's."""

from typing import Any

import torch
from torch import Tensor

from deepopt._compat import adam, scalar_dtype
from deepopt.ops import adamw_
from deepopt.ops.rounding import roundings, store_rounded, to_fp32
from deepopt.optim.rounding import lows_and_seeds
from deepopt.optim.stacking import Joint, Joints, State, owns_storage

KEYS = ("exp_avg", "exp_avg_sq", "step")
SMALL = 2**14
"""Entries of a parameter up to which its state is joined with that of others."""


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
    joints: Joints,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW; where ``found_inf`` is 1, nothing changes.

    With ``foreach`` given it is torch's, bit for bit where the state has the parameter's dtype.
    Otherwise it is the kernel's, which has the bits of torch's fused one, but for second moments
    beyond the last whole vector, and serves tensors of any strides. Narrower parameters are stepped
    in float32 and rounded once. What it has joined is in ``joints``, for the steps to come.
    """
    fused = bool(group["fused"])
    if found_inf is not None and not (fused and found_inf.device.type != "cpu"):
        if found_inf.item():  # torch's other implementations leave the skipping to the caller
            return
        found_inf = None
    if found_inf is None and _has_kernel(params, group):
        grads = [  # a parameter's grad_dtype may be any
            grad if grad.dtype == param.dtype else grad.to(state_dtype(param))
            for param, grad in zip(params, grads, strict=True)
        ]
        own: list[list[Tensor]] = [[state[key] for state in states] for key in KEYS]
        joint = _joint(params, states, own, joints)
        if joint is not None:
            _step_by_kernel(params, grads, states, [[whole] for whole in joint.whole], group)
            return
        if len({param.device for param in params}) == 1:
            lists = [params, grads, *own[:2]]
            for index, param in enumerate(params):
                if param.is_complex():  # a pair of reals
                    lists = [list(tensors) for tensors in lists]
                    for tensors in lists:
                        tensors[index] = torch.view_as_real(tensors[index])
            _step_by_kernel(lists[0], lists[1], states, [*lists[2:], own[2]], group)
            return
    _step_by_torch(params, grads, states, group, found_inf)


def _has_kernel(params: list[Tensor], group: dict[str, Any]) -> bool:
    if group["foreach"] is not None or group["differentiable"]:
        return False
    if group["capturable"] and params[0].device.type != "cuda":  # counts are read on the device
        return False
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        return False
    plain = set(map(type, params)) <= {torch.Tensor, torch.nn.Parameter}
    return plain and adamw_.has_backend(params[0].device.type)


def _step_by_kernel(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    own: list[list[Tensor]],
    group: dict[str, Any],
) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    eps, weight_decay, maximize = group["eps"], group["weight_decay"], group["maximize"]
    lows, seeds = lows_and_seeds(params, states, group)
    # fmt: off
    adamw_(
        params, grads, own[0], own[1], own[2], lows, seeds,
        lr, float(beta1), float(beta2), eps, weight_decay, maximize,
    )
    # fmt: on


def _joint(
    params: list[Tensor], states: list[State], own: list[list[Tensor]], joints: Joints
) -> Joint | None:
    """The state of these parameters as one tensor per key, if it is that or can be made so.

    To hand many small tensors over costs more than their arithmetic.
    """
    joint = joints.get(id(states[0]))
    if joint is not None and joint.is_of([*own[0], *own[1], *own[2]]):
        return joint
    if not _can_be_joined(params, own):
        return None
    joints[id(states[0])] = _join(states, own)
    return joints[id(states[0])]


def _join(states: list[State], own: list[list[Tensor]]) -> Joint:
    """Join the state under ``KEYS``; ``states`` get the views."""
    whole = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in own]
    for key, tensors, joined in zip(KEYS, own, whole, strict=True):
        parts = joined.split([tensor.numel() for tensor in tensors])
        for state, tensor, part in zip(states, tensors, parts, strict=True):
            state[key] = part.view(tensor.shape)
    return Joint([state[key] for key in KEYS for state in states], whole)


def _can_be_joined(params: list[Tensor], own: list[list[Tensor]]) -> bool:
    # Views, as of an earlier joint, stay apart: each would keep all of its storage alive.
    return (
        len(params) > 1
        and all(map(owns_storage, [tensor for tensors in own for tensor in tensors]))
        and all(param.numel() <= SMALL and param.is_contiguous() for param in params)
        and len({(param.device, param.is_complex()) for param in params}) == 1
        and not params[0].is_complex()
        and all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in own)
        and all(tensor.is_contiguous() for tensors in own for tensor in tensors)
    )


def _step_by_torch(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    fused = bool(group["fused"])
    kept = roundings(params, *lows_and_seeds(params, states, group))
    stepped = [to_fp32(p, state_dtype(p), own) for p, own in zip(params, kept, strict=True)]
    grads = list(grads)
    if fused:  # nothing can be laid out like a tensor with gaps: it is stepped in a dense copy
        stepped = [
            w if torch.empty_like(w).stride() == w.stride() else w.contiguous() for w in stepped
        ]
    for index, (param, state) in enumerate(zip(stepped, states, strict=True)):
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
        stepped,
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
    for param, new, own in zip(params, stepped, kept, strict=True):
        if new is not param:
            store_rounded(param, new, own)
