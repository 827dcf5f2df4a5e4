"""AdamW on lists of tensors: the rule of the element-wise path."""

from collections.abc import Sequence

from torch import Tensor

from deepopt.ops.operator import operator
from deepopt.ops.rounding import roundings, store_rounded, to_fp32


@operator(
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] lows, int[] seeds, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize) -> ()"
)
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lows: Sequence[Tensor],
    seeds: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    r"""One step of AdamW for every parameter, in place, in the dtype of its state.

    .. math::
        m &\leftarrow m + (1-\beta_1)(g - m), \qquad v \leftarrow \beta_2 v + (1-\beta_2)\, g^2 \\
        p &\leftarrow (1-\gamma\lambda)\, p - \frac{\gamma}{1-\beta_1^t}\,
        \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    Args:
        params: of any strides.
        grads: of their shapes and, for the kernels, of their dtypes or the state's; strides may
            differ.
        exp_avgs: m, float32 or for float64 parameters float64.
        exp_avg_sqs: v.
        steps: t before this step, one number each, on the CPU or, for CUDA kernels, on the device;
            each is counted up.
        lows: as for :func:`apply_update_`.
        seeds: as for :func:`apply_update_`.
        lr: γ.
        beta1: retention of m.
        beta2: retention of v.
        eps: ε.
        weight_decay: λ, decoupled.
        maximize: ascend.
    """
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True)
    choices = roundings(params, lows, seeds)
    for (param, grad, exp_avg, exp_avg_sq, step), rounding in zip(tensors, choices, strict=True):
        step += 1
        t = step.item()
        grad = (-grad if maximize else grad).to(exp_avg.dtype)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**t) ** 0.5).add_(eps)
        value = to_fp32(param, exp_avg.dtype, rounding).mul(1 - lr * weight_decay)
        store_rounded(
            param, value.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**t)), rounding
        )
