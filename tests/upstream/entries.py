"""deepopt's optimizers as entries of torch's own optimizer tests, and torch's AdamW beside them.

A pytest plugin: it must be imported before the upstream test file, which reads the list of
optimizers when it is imported itself.
"""

import functools
import re
from typing import Any

import torch
from torch.testing._internal import common_optimizers as upstream

from deepopt.optim.registry import REGISTRY
from deepopt.routing import rules
from tests.optim.contract.inputs import INPUTS, Inputs


def set_smallest_side(side: int) -> None:
    rules.SMALLEST_SIDE = side
    rules._route_shape.cache_clear()


def with_usual_routes(test: Any) -> Any:
    @functools.wraps(test)
    def with_them(*args: Any, **kwargs: Any) -> None:
        set_smallest_side(USUAL_SIDE)
        try:
            test(*args, **kwargs)
        finally:
            set_smallest_side(1)

    return with_them


# Upstream's matrices, of 10 x 5 and less, would otherwise all be stepped by AdamW.
USUAL_SIDE = rules.SMALLEST_SIDE
set_smallest_side(1)
assert rules.route(torch.empty(10, 5)).path == "matrix"
# Complex tensors go to AdamW, and upstream compares them with their real views: let those go too.
COMPLEX = upstream.DecorateInfo(with_usual_routes, "TestOptimRenewed", "test_complex")


def inputs_of(ours: Inputs) -> Any:
    """Constructor inputs as upstream wants them: without flags, and all of them descending."""

    def inputs(device: str, dtype: Any = None) -> list[upstream.OptimizerInput]:
        # Decay by default must not show in upstream's test that zero gradients move nothing:
        # where it is not named, the rate is small, as upstream makes it for AdamW itself.
        chosen: list[dict[str, Any]] = [{"lr": 1e-4}]
        # foreach refuses a tensor without capturable, and capturable a CPU, as in torch. Only the
        # tests that set foreach or fused themselves name a dtype; test_tensor_lr covers fused.
        if upstream._get_device_type(device) in upstream.CUDA_CONFIG_GPUS:
            chosen += [{"lr": torch.tensor(1e-4), "capturable": True}]
        elif dtype is None:
            chosen += [{"lr": torch.tensor(1e-4)}]
        chosen += [{"lr": 1e-2, "weight_decay": 0.01}, {"weight_decay": 0.1, "maximize": True}]
        # Upstream's quadratics are steep, uphill above all, and not every rule is stable there; and
        # its state-dict hooks look for rates of 0.002 and 0.003, which no input may start from.
        chosen += [{"weight_decay": 0.0, **options, "lr": 1e-4} for options in ours.options]
        return [
            upstream.OptimizerInput(params=None, kwargs=dict(kwargs), desc=str(kwargs))
            for kwargs in chosen
        ]

    return inputs


def errors_of(ours: Inputs) -> Any:
    def error_inputs(device: str, dtype: Any) -> list[upstream.ErrorOptimizerInput]:
        found = upstream.get_error_inputs_for_all_optims(device, dtype)
        if upstream._get_device_type(device) == "cpu":
            param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
            found += [
                upstream.ErrorOptimizerInput(
                    upstream.OptimizerInput(params=[param], kwargs=dict(kwargs), desc=message),
                    error_type=kind,
                    error_regex=re.escape(message),
                )
                for kwargs, kind, message in ours.all_errors
            ]
        return found

    return error_inputs


ADAMW = next(info for info in upstream.optim_db if info.optim_cls is torch.optim.AdamW)

upstream.optim_db[:] = [
    ADAMW,  # what test_upstream.py measures the others by
    *(
        upstream.OptimizerInfo(
            entry.cls,
            optim_inputs_func=inputs_of(INPUTS[name]),
            optim_error_inputs_func=errors_of(INPUTS[name]),
            scheduler_inputs=ADAMW.scheduler_inputs,
            supported_impls=("foreach", "differentiable", "fused"),
            not_og_supported_flags=(),
            supports_fused_on=("cpu", "cuda", "xpu", "mps"),
            supports_complex=entry.cls([torch.zeros(1)]).defaults["path"] == "auto",
            has_capturable_arg=True,
            decorators=(COMPLEX,),
        )
        for name, entry in REGISTRY.items()
        if not entry.wraps
    ),
]
