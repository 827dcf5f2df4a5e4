"""One file per ``torch.optim.Optimizer``; ``base.py`` owns what torch asks of all of them."""

from deepopt.optim.deep_momentum import DeepMomentum
from deepopt.optim.functional import functional
from deepopt.optim.registry import optimizers
from deepopt.optim.routing import param_groups

__all__ = ["DeepMomentum", "functional", "optimizers", "param_groups"]
