"""Optimizers as associative memories: the reference implementation of *Nested Learning*.

``deepopt.DeepMomentum`` replaces ``torch.optim.AdamW`` at the same learning rate and weight decay.
``deepopt.param_groups(model)`` routes parameters by module type, ``deepopt.memory`` holds the
memories a momentum can be, ``deepopt.hope`` is the paper's sequence model (imported on first use).
"""

import importlib
from types import ModuleType

from deepopt import memory
from deepopt.optim import (
    DeepMomentum,
    DeltaMomentum,
    PreconditionedMomentum,
    functional,
    optimizers,
    param_groups,
    routing_table,
    DeltaGradientDescent,
    capture_inputs,
    functional,
    optimizers,
    param_groups,
)
from deepopt.optim import DeepMomentum, create_optimizer, functional, optimizers, param_groups

__version__ = "0.1.0"
__all__ = [
    "DeepMomentum",
    "DeltaMomentum",
    "PreconditionedMomentum",
    "DeltaGradientDescent",
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
