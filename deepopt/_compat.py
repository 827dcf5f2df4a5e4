"""torch's private helpers, imported here and nowhere else.

They move between minor releases: whatever a release lacks gets its fallback in this file, so that
no other file depends on torch's version.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as has_global_hook
from torch.optim import Optimizer
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused as check_fused
from torch.optim.optimizer import _get_capturable_supported_devices as capturable_devices
from torch.optim.optimizer import _get_scalar_dtype as scalar_dtype
from torch.optim.optimizer import _use_grad_for_differentiable as use_grad_for_differentiable
from torch.overrides import _pop_mode_temporarily as without_function_mode

NoAutocast = torch._C._DisableAutocast
count_function_modes = torch._C._len_torch_function_stack

# Raises, as torch's optimizers do, where a graph is captured without capturable=True.
graph_capture_health_check = getattr(  # torch 2.12 and before: another name
    Optimizer,
    "_accelerator_graph_capture_health_check"
    if hasattr(Optimizer, "_accelerator_graph_capture_health_check")
    else "_cuda_graph_capture_health_check",
)

__all__ = [
    "NoAutocast",
    "adam",
    "capturable_devices",
    "check_fused",
    "constant_to_compile",
    "count_function_modes",
    "disable_dynamo",
    "graph_capture_health_check",
    "has_global_hook",
    "has_kernel",
    "in_forward_ad",
    "inside_transform",
    "is_distributed",
    "multiplies_bfloat16_faster",
    "scalar_dtype",
    "use_grad_for_differentiable",
    "without_function_mode",
]


def has_kernel(operator: str, dispatch_key: str) -> bool:
    """Whether a library has a kernel of its own for "namespace::operator" on a device type."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, dispatch_key)


def constant_to_compile(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator: torch.compile runs the function and does not look into it.

    ``torch.compiler.assume_constant_result`` is the same, but imports all of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_forward_ad() -> bool:
    """Whether tensors may have tangents. ``torch.no_grad`` does not switch these off."""
    return forward_ad._current_level >= 0


def inside_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is looking at operators."""
    return torch._C._functorch.peek_interpreter_stack() is not None or in_forward_ad()


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, as under FSDP2 and tensor parallelism."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


@functools.lru_cache
def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether matrix products on ``device`` run natively in bfloat16, at a multiple of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
