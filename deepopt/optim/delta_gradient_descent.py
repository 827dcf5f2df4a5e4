"""DeltaGradientDescent: gradient descent that erases what the present inputs recall.

Plain gradient descent (Eq 7, Eq 8, Eq 9, Eq 29, Eq 30, Eq 31, Eq 58) adds the outer product of a
local error and a layer's input to the weight. Here the weight is regressed on its inputs (Eq 54,
Eq 55, Eq 56, Eq 57; their derivation is Eq 112, Eq 113, Eq 114, Eq 115, Eq 116, Eq 117, Eq 118,
Eq 119, Eq 120, Eq 121): see ``_regression_step``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt import routing
from deepopt._compat import is_distributed
from deepopt._warnings import warn
from deepopt.memory import Gradient, Memory
from deepopt.ops.ridge import ridge, widened
from deepopt.optim.base import Bucket, Group, MemoryOptimizer, arguments_of
from deepopt.optim.engine.adamw_path import dense, state_dtype
from deepopt.optim.engine.buckets import PLAIN, param_label
from deepopt.optim.layer_inputs import forget_inputs, seen_inputs

RULES = ("implicit", "scalar", "literal")
GRADIENT = Gradient()


class DeltaGradientDescent(MemoryOptimizer):
    r"""Gradient descent with a delta rule on the weights (Eq 54, Eq 55, Eq 56, Eq 57).

    A linear layer's weight W is an associative memory that maps inputs x to their local errors.
    Plain gradient descent stores them one by one; here W is regressed on them (Eq 56), so that a
    write also erases what W recalled at the same inputs. With G the gradient of the loss, C the
    mean of :math:`x x^\top` over the inputs of the step and d the ``decay_scale``:

    .. math::
        W_{t+1} &= \text{argmin}_W\ \langle W, G\rangle
        + \frac d2\, \text{mean}_x \|W x\|^2 + \frac1{2\gamma} \|W - W_t\|^2 \\
        &= (W_t - \gamma G)\,(I + \gamma d\, C)^{-1}
        \qquad\text{(rule="implicit")} \\
        W_{t+1} &= W_t\,(I - \gamma' d\, C) - \gamma' G, \qquad
        \gamma' = \frac{\gamma}{1 + \gamma d\ \text{mean}\|x\|^2}
        \qquad\text{(rule="scalar")} \\
        W_{t+1} &= W_t\,(I - \gamma' d\, C) - \gamma' G, \qquad
        \gamma' = \frac{\gamma}{1 + \gamma}
        \qquad\text{(rule="literal", Eq 57)}

    For one input and d = 1 the first two are Eq 56's exact solution for every :math:`\|x\|`; the
    third, as printed, is so for :math:`\|x\| = 1` alone, and diverges where
    :math:`\gamma' d\, \lambda_{\max}(C) > 2`. The first two are stable for every rate; "implicit"
    shortens the step only along the inputs, "scalar" everywhere, and solves no linear system.
    Rounding errors of the gradient also have components orthogonal to the inputs. "implicit" leaves
    those, times gamma, as plain gradient descent does.

    **Not the loss's minimum.** With d = 1 the fixed point for :math:`\frac12\|Wx - t\|^2` is
    :math:`Wx = t/2`, in general :math:`t/(1+d)`: as printed it is the rule of a memory that has to
    forget (Hope uses it so). For training, use a small d. The erasure is then a weight decay of
    strength d that acts only along the directions of the inputs.

    The gradient holds no inputs: ``deepopt.capture_inputs(model)`` records them. A parameter
    without recorded inputs (an embedding, say, or every parameter in ``deepopt.functional``) and
    every vector is stepped by plain gradient descent :math:`W - \gamma G`. ``maximize`` negates
    the gradient, not the erasure. A step in a CUDA graph needs inputs recorded in the same graph.

    Args:
        params: as in ``DeepMomentum``; with ``deepopt.param_groups(model)`` embeddings, heads,
            norms and biases take AdamW, which needs a learning rate of its own.
        lr: learning rate, gamma; a float or a 1-element tensor. It is of the size of torch SGD's,
            which is not AdamW's (default: 1e-3).
        betas: AdamW's, on the element-wise path; the rule itself has no momentum
            (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator, on the element-wise path alone (default: 1e-8).
        weight_decay: decoupled weight decay besides the erasure (default: 0).
        rule: "implicit", "scalar" or "literal", as above (default: "implicit").
        decay_scale: d, at least 0; None for 1 with "literal", the paper's value, and for 1e-3
            otherwise (default: None).
        path: "matrix" steps every parameter by this rule; "auto", "stack" and "elementwise" as
            in ``DeepMomentum`` (default: "matrix").
        [flags]

    State per parameter: 0 floats (2 on the element-wise path); the recorded inputs besides, at most
    ``capture_inputs(rows=...)`` rows per layer.

    Cost per m x n matrix and r rows, s and S the smaller and the larger of r and n: 4rmn FLOPs; for
    "implicit" at most 8rmn + 6s²S + s³/3, in float64 where the device has it.

    Warns:
        UserWarning: once per optimizer, if a parameter of two or more dimensions has no inputs, as
            DTensors never have.

    Raises:
        ValueError: an argument out of range, named with its value.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, Eq 54, Eq 55, Eq 56,
    Eq 57 and App. C.
    """

    _min_dims: ClassVar[dict[str, int]] = {"matrix": 0, "stack": 3}
    _warned = False
    _transforms_gradients = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rule: Literal["implicit", "scalar", "literal"] = "implicit",
        decay_scale: float | None = None,
        path: str = "matrix",
        rounding: str = "nearest",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments_of(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if group["rule"] not in RULES:
            raise ValueError(f"Invalid rule: {group['rule']!r}; choose from {RULES}")
        scale = group["decay_scale"]
        if scale is not None and not 0.0 <= scale < float("inf"):
            raise ValueError(
                f"Invalid decay_scale: {scale}; it must be a number from 0 on, or None"
            )

    def _transform_gradients(self, grads: list[Tensor | None], group: Group) -> list[Tensor | None]:
        return [
            self._gradient(param, grad, route.path, group)
            for param, grad, route in zip(
                group["params"], grads, routing.routes(group), strict=True
            )
        ]

    def _gradient(
        self, param: Tensor, grad: Tensor | None, path: routing.Path, group: Group
    ) -> Tensor | None:
        """What ``param`` is stepped with, from its gradient and the inputs it was seen with."""
        if grad is None or grad.is_sparse or path == "elementwise":
            return grad
        if param.ndim < 2 or not param.numel():
            return grad
        scale = group["decay_scale"]
        if scale is None:
            scale = 1.0 if group["rule"] == "literal" else 1e-3
        inputs = seen_inputs(param)
        if inputs is None and scale and not self._warned:
            self._warned = True
            warn(_advice(param, group))
        if inputs is None or not scale:
            return grad
        # base steps against what is returned here, and negates it first to ascend.
        ascend, lr = group["maximize"], group["lr"]
        step = _regression_step(-grad if ascend else grad, param, inputs, lr, scale, group["rule"])
        return -step if ascend else step

    def _step_buckets(
        self, buckets: Sequence[Bucket], states: dict[Tensor, Any], found_inf: Tensor | None = None
    ) -> None:
        super()._step_buckets(buckets, states, found_inf)
        for bucket in buckets:  # now, and not where they are read: a refused step uses up nothing
            for param in bucket.params:
                forget_inputs(param)

    def _memory(self, group: Group) -> Memory:
        return GRADIENT


def _regression_step(
    grad: Tensor, param: Tensor, inputs: Tensor, lr: float | Tensor, scale: float, rule: str
) -> Tensor:
    """What ``lr`` multiplies: (W_t - W_{t+1}) / lr."""
    dtype = state_dtype(param)
    shape = (len(inputs), -1, inputs.shape[-1])  # a convolution's groups have inputs of their own
    weights = param if type(param) in PLAIN else dense(param)
    rows, weight, descent = (x.to(dtype).reshape(shape) for x in (inputs, weights, grad))
    rate = lr.to(param.device).squeeze() if isinstance(lr, Tensor) else lr
    if rule == "implicit":
        # Large inputs make large gradients, most of which the solution takes away again.
        rows, weight, descent = widened(rows), widened(weight), widened(descent)
        descent, solved = ridge(descent, rows, rate * scale)
        step = descent + scale * ((weight @ rows.mT) @ solved)
    else:
        step = descent + scale * ((weight @ rows.mT) @ rows)
        size = scale * rows.square().sum((-2, -1), keepdim=True) if rule == "scalar" else 1.0
        step = step / (1 + rate * size)
    return step.to(dtype).reshape(param.shape)


def _advice(param: Tensor, group: Group) -> str:
    if is_distributed(param):
        remedy = (
            "the inputs of DTensors (FSDP2, tensor parallelism) cannot be captured: replicate the "
            "model by DistributedDataParallel"
        )
    else:
        remedy = "record them by deepopt.capture_inputs(model) before the forward pass"
    return (
        f"DeltaGradientDescent has captured no inputs for {param_label(group, param)}: it is "
        "stepped by plain gradient descent, as are all other parameters without captured inputs; "
        f"{remedy}, or give decay_scale=0"
    )
