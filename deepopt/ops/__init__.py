"""Numeric primitives, batched over a leading dimension of matrices. They import torch alone."""

from pathlib import Path

from deepopt.ops.adamw import adamw_
from deepopt.ops.apply_update import apply_update_
from deepopt.ops.combine import combine, row_products
from deepopt.ops.coordinate_mlp import coordinate_mlp, coordinate_mlp_gradient
from deepopt.ops.delta_write import delta_write
from deepopt.ops.gram_average import gram_average
from deepopt.ops.horizons_write import horizons_write
from deepopt.ops.inverse_power import inverse_power
from deepopt.ops.matmul import matmul
from deepopt.ops.multi_scale_write import multi_scale_write
from deepopt.ops.newton_schulz import newton_schulz, polar_express
from deepopt.ops.norms import frobenius, normalized, root_mean_square, running_root
from deepopt.ops.operator import backend
from deepopt.ops.orthogonal_update import (
    ScaleArguments,
    adam_ratio,
    adam_size,
    orthogonal_size,
    orthogonal_update,
    rms_gain,
    row_gains,
    scale_update,
)
from deepopt.ops.ridge import ridge

__all__ = [
    "ScaleArguments",
    "adam_ratio",
    "adam_size",
    "adamw_",
    "apply_update_",
    "backend",
    "combine",
    "coordinate_mlp",
    "coordinate_mlp_gradient",
    "delta_write",
    "frobenius",
    "gram_average",
    "horizons_write",
    "inverse_power",
    "matmul",
    "multi_scale_write",
    "newton_schulz",
    "normalized",
    "orthogonal_size",
    "orthogonal_update",
    "polar_express",
    "ridge",
    "rms_gain",
    "root_mean_square",
    "row_gains",
    "row_products",
    "running_root",
    "scale_update",
]

# In a checkout the Triton kernels lie in csrc/triton; an installation has them beside this file.
if (_sources := Path(__file__).resolve().parents[2] / "csrc").joinpath("triton").is_dir():
    __path__.append(str(_sources))
