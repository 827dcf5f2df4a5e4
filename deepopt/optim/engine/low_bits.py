"""How float32 steps are rounded into bfloat16 parameters, on every path: a group's ``rounding``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepopt.optim.engine import State

ROUNDINGS = ("nearest", "stochastic", "exact")


def check_rounding(group: dict[str, Any]) -> None:
    """Check a group's rounding.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a flag that the rounding does not support.
    """
    rounding = group["rounding"]
    if rounding not in ROUNDINGS:
        raise ValueError(f"Invalid rounding: {rounding!r}; choose from {ROUNDINGS}")
    if rounding != "nearest" and group["differentiable"]:
        raise RuntimeError(
            f"`differentiable` does not support rounding={rounding!r}; use rounding='nearest'"
        )
    if rounding == "stochastic" and group["capturable"]:
        raise RuntimeError(
            "`capturable` does not support rounding='stochastic', because its random bits come "
            "from step counts on the host; use rounding='exact'"
        )


def check_dtypes(group: dict[str, Any]) -> None:
    """Raise ValueError for a parameter whose dtype the group's rounding does not cover."""
    if group["rounding"] == "nearest":
        return
    for param in group["params"]:
        if param.dtype == torch.float16:
            raise ValueError(
                f"Invalid rounding: {group['rounding']!r} for a float16 parameter of shape "
                f"{tuple(param.shape)}; it is for bfloat16, so use rounding='nearest', or keep the "
                "parameters in bfloat16 or float32"
            )


def keeps_low(param: Tensor, group: dict[str, Any]) -> bool:
    """Whether ``state["low"]`` of ``param`` is the optimizer's; elsewhere it is the user's."""
    return group["rounding"] == "exact" and param.dtype == torch.bfloat16


def lows_and_seeds(
    params: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]
) -> tuple[list[Tensor], list[int]]:
    """The low bits and the random seeds with which a group's parameters are rounded in a step.

    Low bits are kept in ``state["low"]``, which is made here, for bfloat16 parameters only. A seed
    depends on the step count and the parameter's size alone, so that a parameter is rounded the
    same whatever else is stepped.
    """
    if group["rounding"] == "nearest" or all(p.dtype != torch.bfloat16 for p in params):
        return [], []
    if group["rounding"] == "stochastic":
        counts = [int(state["step"]) for state in states]
        # An operator takes integers of 63 bits.
        return [], [((p.numel() << 32) + t) % 2**63 for p, t in zip(params, counts, strict=True)]
    for param, state in zip(params, states, strict=True):
        if keeps_low(param, group) and "low" not in state:
            state["low"] = torch.zeros_like(param, dtype=torch.int16)
    none = params[0].new_zeros(0, dtype=torch.int16)
    pairs = zip(params, states, strict=True)
    return [state["low"] if keeps_low(param, group) else none for param, state in pairs], []
