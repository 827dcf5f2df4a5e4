"""Layer inputs, for rules that need more than the gradient (Eq 54, Eq 55, Eq 56, Eq 57)."""

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from deepopt._compat import disable_dynamo, is_distributed

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Sample:
    """A bounded sample of a parameter's inputs since the last step.

    Attributes:
        limit: the most rows that are kept.
        groups: the convolution's groups; 1 for a linear layer.
        process_group: the group of replicas whose rows also count; None without replicas.
        rows: (groups, r, n), or None.
        keys: (r,), one per row. If there are more than ``limit`` rows, those with the smallest keys
            are kept.
    """

    limit: int
    groups: int
    process_group: Any = None
    rows: Tensor | None = None
    keys: Tensor | None = None

    def add(self, rows: Tensor, keys: Tensor) -> None:
        if self.rows is not None and self.keys is not None:
            rows, keys = torch.cat([self.rows, rows], 1), torch.cat([self.keys, keys])
        if len(keys) > self.limit:
            kept = _smallest(keys, self.limit)
            rows, keys = rows[:, kept], keys[kept]
        self.rows, self.keys = rows, keys


# By parameter. Not an attribute of it, so that samples are neither copied nor saved with a model.
# The keys are weak: a sample goes when its parameter goes.
_samples: Any = WeakTensorKeyDictionary()


class InputCapture:
    """Hooks that record layer inputs until they are removed; made by :func:`capture_inputs`."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Record no more. What has been recorded still counts at the next step."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "InputCapture":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def capture_inputs(model: nn.Module, rows: int = 512) -> InputCapture:
    """Record what the linear and convolutional layers of ``model`` see, for the optimizer's step.

    For ``DeltaGradientDescent``, which uses up at a step what was recorded since the last one::

        capture = deepopt.capture_inputs(model)     # or: with deepopt.capture_inputs(model): ...
        optimizer = deepopt.DeltaGradientDescent(model.parameters())
        ...                                         # train as always
        capture.remove()

    An input counts when the backward pass goes through its layer: forward passes without one
    (evaluation, ``no_grad``) leave no trace, a checkpointed one counts once, and what several
    passes accumulate before a step is averaged, as their gradients are. A layer that is used twice
    and layers that share a weight put their inputs together.

    Args:
        model: its ``nn.Linear`` and ``nn.Conv1d`` to ``nn.Conv3d`` are recorded, with every
            position of a sequence or an image as a row of inputs (a convolution's patch). Modules
            that use a layer's weight without calling the layer escape, as do weights that are
            computed from others (parametrizations), transposed convolutions, recurrent layers and
            embeddings. Replicas average what they see: give the ``DistributedDataParallel``
            module, not the one inside, or they drift apart; but the one inside for a
            ``ZeroRedundancyOptimizer``, where each parameter has one owner.
        rows: most input rows that are kept per layer between two steps; of more, an evenly spread
            sample is kept (default: 512).

    Memory: ``rows`` rows of floats per layer until the step, and as many per forward pass until
    its backward pass; never the whole input.

    Under ``torch.compile`` each recorded layer is a graph break. Record before the first compiled
    call: code that is compiled already does not see the hooks.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``rows`` is less than 1, or there is no layer to record.
        RuntimeError: the weight of such a layer is a DTensor. If FSDP2 or tensor parallelism comes
            after the capture, ``DeltaGradientDescent`` says so at its first step.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"Invalid rows: {rows!r}; a whole number of at least 1 is needed")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    if not layers:
        names = ", ".join(layer.__name__ for layer in LAYERS)
        raise ValueError(f"model has no layer to record; it needs one of {names}")
    replicas = model.process_group if isinstance(model, DistributedDataParallel) else None
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is not None and is_distributed(weight):
            raise RuntimeError(
                "capture_inputs does not support DTensor parameters (FSDP2, tensor parallelism), "
                f"but the weight of layer {name!r} is one: give a part of the model that has none, "
                "or replicate it by DistributedDataParallel"
            )
    for layer in layers.values():
        if isinstance(weight := layer._parameters.get("weight"), nn.Parameter):
            _samples[weight] = _Sample(rows, _groups(layer), replicas)
    hook = functools.partial(_after_forward, rows)
    return InputCapture([x.register_forward_hook(hook, with_kwargs=True) for x in layers.values()])


def seen_inputs(param: Tensor) -> Tensor | None:
    """What ``param`` has seen since it was last forgotten, scaled such that mean x xᵀ = XᵀX.

    Returns:
        X of shape (groups, r, n), at least float32, or None if nothing was recorded. A collective
        operation for parameters that were recorded through ``DistributedDataParallel``.
    """
    sample = _samples.get(param)
    if sample is None:
        return None
    if sample.process_group is not None:
        return _gathered(param, sample)
    rows = sample.rows
    if rows is None:
        return None
    return rows.to(torch.promote_types(rows.dtype, torch.float32)) / rows.shape[1] ** 0.5


def forget_inputs(param: Tensor) -> None:
    """Drop what was recorded for ``param``, because a step has used it."""
    if (sample := _samples.get(param)) is not None:
        sample.rows = sample.keys = None


def _gathered(param: Tensor, sample: _Sample) -> Tensor:
    """The rows of all replicas: up to an equal share of the limit from each, padded with zeros."""
    world = sample.process_group.size()
    share = -(-sample.limit // world)
    dtype = torch.promote_types(param.dtype, torch.float32)
    ours = param.new_zeros(sample.groups, share, math.prod(param.shape[1:]), dtype=dtype)
    rows, keys = sample.rows, sample.keys
    if rows is not None and keys is not None:
        kept = _smallest(keys, min(share, len(keys)))
        ours[:, : len(kept)] = rows[:, kept].to(dtype) / (len(kept) * world) ** 0.5
    everyone = [torch.empty_like(ours) for _ in range(world)]
    torch.distributed.all_gather(everyone, ours, group=sample.process_group)
    return torch.cat(everyone, 1)


@disable_dynamo
def _after_forward(
    limit: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook: record the layer's inputs once the backward pass reaches its output."""
    # Under functional_call, replicas and parametrizations, the weight is not a parameter.
    weight = layer._parameters.get("weight")
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return
    if is_distributed(weight):  # it has become a DTensor since capture_inputs
        return
    # Subclasses may name their input differently, take more inputs, and return more outputs.
    inputs = _first_tensor(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)
    output = _first_tensor(output)
    if inputs is None or output is None or not output.requires_grad or not output.numel():
        return
    rows, keys = _rows(layer, inputs.detach(), limit)

    def add_rows(_: Tensor) -> None:
        if weight not in _samples:  # the layer belongs to a copy of the model, which has its hooks
            _samples[weight] = _Sample(limit, _groups(layer))
        _samples[weight].add(rows, keys)

    output.register_hook(add_rows)


def _first_tensor(value: Any) -> Tensor | None:
    return next((x for x in tree_leaves(value) if isinstance(x, Tensor)), None)


def _groups(layer: nn.Module) -> int:
    return getattr(layer, "groups", 1)


def _rows(layer: nn.Module, inputs: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """At most ``limit`` of the inputs of a layer, (groups, r, n), and their keys (r,)."""
    if isinstance(layer, nn.Linear):
        inputs = torch.atleast_2d(inputs)
        lead = inputs.shape[:-1]
    else:
        inputs = _patches(layer, inputs)
        lead = inputs.shape[: inputs.ndim // 2]
    # Multiples of the golden ratio modulo 1, as integers. Any stretch of them is spread evenly, and
    # they resonate with no period of sequences or images.
    keys = torch.arange(math.prod(lead), device=inputs.device) * 2654435769 % 2**32
    picks = _smallest(keys, min(limit, len(keys)))
    chosen = inputs[torch.unravel_index(picks, lead)]
    return chosen.reshape(len(picks), _groups(layer), -1).transpose(0, 1), keys[picks]


def _smallest(keys: Tensor, count: int) -> Tensor:
    return keys.topk(count, largest=False, sorted=False).indices


def _patches(layer: Any, inputs: Tensor) -> Tensor:
    """What a convolution multiplies its kernel with, (N, *positions, channels, *kernel): a view."""
    dims = len(layer.kernel_size)
    if inputs.ndim == dims + 1:
        inputs = inputs.unsqueeze(0)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode)
    for dim in range(dims):
        span = (layer.kernel_size[dim] - 1) * layer.dilation[dim] + 1
        inputs = inputs.unfold(2 + dim, span, layer.stride[dim])[..., :: layer.dilation[dim]]
    return inputs.movedim(1, dims + 1)
