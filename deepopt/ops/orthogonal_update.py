"""The whole output map in one call: Newton-Schulz, and what makes an update of it (Eq 52)."""

from typing import Any

import torch
from torch import Tensor

from deepopt.ops.newton_schulz import Coefficients, newton_schulz
from deepopt.ops.operator import operator
from deepopt.ops.resize import resize


def _supports(
    momentum: Tensor,
    coefficients: Coefficients,
    dtype: torch.dtype,
    beside: Tensor | None,
    weight: Tensor | None,
    *rest: Any,
) -> bool:
    updates = [momentum] if beside is None else [momentum, beside]
    has_kernel = newton_schulz.supports(momentum, coefficients, dtype)
    return has_kernel and resize.supports(updates, weight, momentum, *rest)


@operator(
    "(Tensor momentum, float[][] coefficients, ScalarType dtype, Tensor? beside, Tensor? weight, "
    "Tensor? gain, Tensor grad, Tensor step, "
    "Tensor? grad_norm, Tensor? row_moment, Tensor? row_weight, "
    "float beta1, float beta2, float rms_cap, float? update_rms) -> Tensor[]",
    _supports,
)
def orthogonal_update(
    momentum: Tensor,
    coefficients: Coefficients,
    dtype: torch.dtype,
    beside: Tensor | None,
    weight: Tensor | None,
    gain: Tensor | None,
    grad: Tensor,
    step: Tensor,
    grad_norm: Tensor | None,
    row_moment: Tensor | None,
    row_weight: Tensor | None,
    beta1: float | Tensor,
    beta2: float | Tensor,
    rms_cap: float,
    update_rms: float | None,
) -> list[Tensor]:
    """:func:`deepopt.ops.newton_schulz` of a momentum, and :func:`deepopt.ops.resize` of that.

    Together they need no memory between them: kernels resize in place.

    Args:
        momentum: shape (B, m, n).
        coefficients, dtype: as for ``newton_schulz``.
        beside: a second update, shape (B, m, n), or None.
        weight, gain, grad, step, grad_norm, row_moment, row_weight, beta1, beta2, rms_cap, \
        update_rms: as for ``resize``.

    Returns:
        The update, contiguous, and the new ``grad_norm``, ``row_moment`` and ``row_weight``, of
        those that are given.
    """
    update = newton_schulz(momentum, coefficients, dtype)
    return resize(
        [update] if beside is None else [update, beside],
        weight,
        momentum,
        gain,
        grad,
        step,
        grad_norm,
        row_moment,
        row_weight,
        beta1,
        beta2,
        rms_cap,
        update_rms,
    )
