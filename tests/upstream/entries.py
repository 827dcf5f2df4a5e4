"""deepopt's optimizers as entries of torch's own optimizer tests, and theirs only.

A pytest plugin: it must be imported before the upstream test file, which reads the list of
optimizers when it is imported itself.
"""

from typing import Any

import torch
from torch.testing._internal import common_optimizers as upstream

import deepopt

# The decay that is on by default must not show in upstream's test that zero gradients move nothing:
# where it is not named, the rate is small, as upstream makes it for AdamW itself.
INPUTS = (
    ({"lr": 1e-4}, "default decay"),
    ({"lr": 1e-2, "weight_decay": 0.01}, "non-default lr"),
    ({"lr": torch.tensor(1e-4)}, "tensor lr"),
    ({"weight_decay": 0.1}, "weight decay"),
    ({"weight_decay": 0.1, "maximize": True}, "maximize"),
    ({"weight_decay": 0, "memory": "linear", "betas": (0.8, 0.9)}, "linear memory"),
    ({"weight_decay": 0, "memory": "delta", "row_norm": False}, "delta memory"),
)

ERRORS = (
    ({"lr": 1e-2, "betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"lr": 1e-2, "weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    ({"eps": -1}, ValueError, "Invalid epsilon value: -1"),
    (
        {"lr": torch.tensor(0.001), "foreach": True},
        ValueError,
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
)


def inputs(device: str, dtype: Any = None) -> list[upstream.OptimizerInput]:
    return [
        upstream.OptimizerInput(params=None, kwargs=dict(kwargs), desc=desc)
        for kwargs, desc in INPUTS
    ]


def error_inputs(device: str, dtype: Any) -> list[upstream.ErrorOptimizerInput]:
    found = upstream.get_error_inputs_for_all_optims(device, dtype)
    if upstream._get_device_type(device) == "cpu":
        param = torch.nn.Parameter(torch.randn(2, 3, device=device, dtype=dtype))
        found += [
            upstream.ErrorOptimizerInput(
                upstream.OptimizerInput(params=[param], kwargs=dict(kwargs), desc=message),
                error_type=kind,
                error_regex=message,
            )
            for kwargs, kind, message in ERRORS
        ]
    return found


upstream.optim_db[:] = [
    upstream.OptimizerInfo(
        deepopt.DeepMomentum,
        optim_inputs_func=inputs,
        optim_error_inputs_func=error_inputs,
        scheduler_inputs=upstream.optim_db[-1].scheduler_inputs,
        supported_impls=("foreach", "differentiable", "fused"),
        not_og_supported_flags=(),
        supports_fused_on=("cpu", "cuda", "xpu", "mps"),
        supports_complex=True,
        has_capturable_arg=False,
    )
]
