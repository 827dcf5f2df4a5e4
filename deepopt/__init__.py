"""Optimizers as associative memories: the reference implementation of *Nested Learning*.

``deepopt.DeepMomentum`` replaces ``torch.optim.AdamW`` at the same learning rate and weight decay.
``deepopt.optimizers()`` lists the paper's optimizers, ``deepopt.param_groups(model)`` routes
parameters by module type, ``deepopt.memory`` holds the memories a momentum can be, ``deepopt.hope``
is the paper's sequence model (imported on first use).
"""

import importlib
from types import ModuleType

from deepopt import memory
from deepopt.optim import (
    DMGD,
    M3,
    Continuum,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    Motion,
    PreconditionedMomentum,
    capture_inputs,
    create_optimizer,
    functional,
    optimizers,
    param_groups,
    routing_table,
)

__version__ = "0.1.0"
__all__ = [
    "DMGD",
    "M3",
    "Continuum",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "Motion",
    "PreconditionedMomentum",
    "__version__",
    "capture_inputs",
    "create_optimizer",
    "functional",
    "hope",
    "memory",
    "optimizers",
    "param_groups",
    "routing_table",
]


def __getattr__(name: str) -> ModuleType:
    if name == "hope":
        return importlib.import_module("deepopt.hope")
    raise AttributeError(f"module 'deepopt' has no attribute {name!r}")
