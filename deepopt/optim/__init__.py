"""One file per ``torch.optim.Optimizer``; ``base.py`` owns what torch asks of all of them."""

from deepopt.optim.continuum import Continuum
from deepopt.optim.deep_momentum import DeepMomentum
from deepopt.optim.delta_gradient_descent import DeltaGradientDescent
from deepopt.optim.delta_momentum import DeltaMomentum
from deepopt.optim.dmgd import DMGD
from deepopt.optim.factory import create_optimizer
from deepopt.optim.functional import functional
from deepopt.optim.layer_inputs import capture_inputs
from deepopt.optim.m3 import M3
from deepopt.optim.motion import Motion
from deepopt.optim.preconditioned_momentum import PreconditionedMomentum
from deepopt.optim.registry import optimizers
from deepopt.routing import param_groups, routing_table

__all__ = [
    "DMGD",
    "M3",
    "Continuum",
    "DeepMomentum",
    "DeltaGradientDescent",
    "DeltaMomentum",
    "Motion",
    "PreconditionedMomentum",
    "capture_inputs",
    "create_optimizer",
    "functional",
    "optimizers",
    "param_groups",
    "routing_table",
]
