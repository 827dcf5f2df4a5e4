"""The element-wise path of every optimizer: AdamW, by our kernel if there is one, else by torch."""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepopt._compat import adam, scalar_dtype
from deepopt.ops import adamw_
from deepopt.ops.rounding import roundings, store_rounded, to_fp32
from deepopt.optim.engine import State
from deepopt.optim.engine.low_bits import lows_and_seeds

if TYPE_CHECKING:
    from deepopt.optim.engine.buckets import Bucket, Kind

DTYPE = operator.attrgetter("dtype")
KEYS = dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.empty(0, device="meta"))
"""The tensors of a state, by name. Only the names count, because shapes differ by parameter."""


def state_dtype(param: Tensor) -> torch.dtype:
    """State is at least float32: an average in bfloat16 stops moving after 256 small steps."""
    if param.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return param.dtype


def dense(param: Tensor) -> Tensor:
    """An ordinary tensor with the numbers of a parameter of a user's tensor class.

    Such a class may store less than its dtype says (as quantized ones do), return itself from views
    and lack operators. Only copies from it and into it can be relied on: loading a checkpoint needs
    them too.
    """
    return torch.empty(param.shape, dtype=state_dtype(param), device=param.device).copy_(param)


def init(param: Tensor, group: dict[str, Any]) -> State:
    """The state that AdamW keeps for ``param``, in float32 for narrower parameters."""
    on_device = group["fused"] or group["capturable"]
    device = param.device if on_device else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=scalar_dtype(bool(group["fused"])), device=device),
        "exp_avg": torch.zeros_like(param, dtype=state_dtype(param)),
        "exp_avg_sq": torch.zeros_like(param, dtype=state_dtype(param)),
    }


def step(bucket: "Bucket", states: list[State], found_inf: Tensor | None = None) -> None:
    """One step of AdamW; if ``found_inf`` is 1, nothing changes.

    The kernel runs where `_has_kernel` says so, for tensors of any strides. It has the bits of
    torch's fused AdamW, except for the second moments beyond the last whole vector. Narrower
    parameters are stepped in float32 and rounded once. Elsewhere torch's implementation runs, with
    torch's bits if the state has the parameter's dtype.
    """
    params, grads, group = bucket.params, bucket.grads, bucket.group
    fused = bool(group["fused"])
    # Only torch's fused kernels skip on the device; for all others the host looks at found_inf.
    if found_inf is not None and not (fused and found_inf.device.type != "cpu"):
        if found_inf.item():
            return
        found_inf = None
    if found_inf is None and _has_kernel(bucket.kind, group):
        _step_by_kernel(params, grads, states, group)
    elif bucket.kind.wrapped:
        for param, grad, state in zip(params, grads, states, strict=True):
            copy = dense(param)
            _step_by_torch([copy], [grad], [state], group, found_inf)
            param.copy_(copy)
    else:
        _step_by_torch(params, grads, states, group, found_inf)


def _has_kernel(kind: "Kind", group: dict[str, Any]) -> bool:
    if group["foreach"] is not None or group["differentiable"] or kind.wrapped or kind.distributed:
        return False
    if group["capturable"] and kind.device.type != "cuda":  # counts are read on the device
        return False
    if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
        return False
    return adamw_.has_backend(kind.device.type)


def _step_by_kernel(
    params: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
) -> None:
    if list(map(DTYPE, grads)) != list(map(DTYPE, params)):  # param.grad_dtype allows any
        grads = [
            grad if grad.dtype == param.dtype else grad.to(state_dtype(param))
            for param, grad in zip(params, grads, strict=True)
        ]
    exp_avgs, exp_avg_sqs = ([state[key] for state in states] for key in KEYS)
    lists = params, grads, exp_avgs, exp_avg_sqs
    if any(map(Tensor.is_complex, params)):  # stepped as pairs of reals, as torch does
        lists = _as_reals(params), _as_reals(grads), _as_reals(exp_avgs), _as_reals(exp_avg_sqs)
    lows, seeds = lows_and_seeds(params, states, group)
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    # fmt: off
    adamw_(
        *lists, [state["step"] for state in states], lows, seeds,
        lr, float(beta1), float(beta2), group["eps"], group["weight_decay"], group["maximize"],
    )
    # fmt: on


def _as_reals(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def _step_by_torch(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[State],
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    fused = bool(group["fused"])
    rounding_of = roundings(params, *lows_and_seeds(params, states, group))
    stepped = [
        to_fp32(param, state_dtype(param), rounding)
        for param, rounding in zip(params, rounding_of, strict=True)
    ]
    grads = list(grads)
    if fused:  # gradient and state cannot be laid out like a tensor with gaps: step a dense copy
        stepped = [
            w if torch.empty_like(w).stride() == w.stride() else w.contiguous() for w in stepped
        ]
    for index, (param, state) in enumerate(zip(stepped, states, strict=True)):
        if grads[index].dtype != param.dtype:
            grads[index] = grads[index].to(param.dtype)
        if fused:
            # torch's fused CPU kernel ignores strides: it needs all tensors in one memory order.
            if grads[index].stride() != param.stride():
                grads[index] = torch.empty_like(param).copy_(grads[index])
            for key in KEYS:
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
    for param, new, rounding in zip(params, stepped, rounding_of, strict=True):
        if new is not param:
            store_rounded(param, new, rounding)
