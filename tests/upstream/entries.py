"""deepopt's optimizers as entries of torch's own optimizer tests, and theirs only.

A pytest plugin: it must be imported before the upstream test file, which reads the list of
optimizers when it is imported itself.
"""

import re
from typing import Any

import torch
from torch.testing._internal import common_optimizers as upstream

from deepopt.optim.registry import COMMON_ERRORS, REGISTRY, Entry


def inputs_of(entry: Entry) -> Any:
    """Constructor inputs as upstream wants them: without flags, and all of them descending."""

    def inputs(device: str, dtype: Any = None) -> list[upstream.OptimizerInput]:
        # Decay by default must not show in upstream's test that zero gradients move nothing:
        # where it is not named, the rate is small, as upstream makes it for AdamW itself.
        chosen: list[dict[str, Any]] = [{"lr": 1e-4}, {"lr": torch.tensor(1e-4)}]
        chosen += [{"lr": 1e-2, "weight_decay": 0.01}, {"weight_decay": 0.1, "maximize": True}]
        chosen += [{"weight_decay": 0.0, **options} for options in entry.options]
        return [
            upstream.OptimizerInput(params=None, kwargs=dict(kwargs), desc=str(kwargs))
            for kwargs in chosen
        ]

    return inputs


def errors_of(entry: Entry) -> Any:
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
                for kwargs, kind, message in (*COMMON_ERRORS, *entry.errors)
            ]
        return found

    return error_inputs


SCHEDULERS = next(
    info for info in upstream.optim_db if info.optim_cls is torch.optim.AdamW
).scheduler_inputs

upstream.optim_db[:] = [
    upstream.OptimizerInfo(
        entry.cls,
        optim_inputs_func=inputs_of(entry),
        optim_error_inputs_func=errors_of(entry),
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "differentiable", "fused"),
        not_og_supported_flags=(),
        supports_fused_on=("cpu", "cuda", "xpu", "mps"),
        supports_complex=entry.cls([torch.zeros(1)]).defaults["path"] == "auto",
        has_capturable_arg=True,
    )
    for entry in REGISTRY.values()
]
