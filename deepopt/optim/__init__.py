"""One file per ``torch.optim.Optimizer``; ``base.py`` owns what torch asks of all of them."""

from deepopt.optim.deep_momentum import DeepMomentum
from deepopt.optim.routing import param_groups

__all__ = ["DeepMomentum", "param_groups"]
