"""torch's private helpers, imported here and nowhere else.

They move between minor releases: whatever a release lacks gets its fallback in this file, so that
no other file knows torch versions apart.
"""

import sys

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused as check_fused
from torch.optim.optimizer import _get_scalar_dtype as scalar_dtype
from torch.optim.optimizer import _use_grad_for_differentiable as use_grad_for_differentiable

__all__ = [
    "adam",
    "check_fused",
    "is_distributed",
    "multiplies_bfloat16_faster",
    "scalar_dtype",
    "use_grad_for_differentiable",
]


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, as under FSDP2 and tensor parallelism."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether matrix products on ``device`` run natively in bfloat16, at a multiple of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False
