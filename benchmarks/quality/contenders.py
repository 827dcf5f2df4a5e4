"""The optimizers that are compared, and how each is made from the same five settings."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

import deepopt
from deepopt.hope.optimizers import RATES


class Setting(NamedTuple):
    """What is tuned, the same for every optimizer.

    Attributes:
        lr: peak learning rate of the matrices, on AdamW's scale.
        aux: learning rate of everything else (embeddings, heads, vectors), in units of ``lr``.
        weight_decay: decoupled weight decay, of all parameters.
        beta: retention of the momentum.
        own: 0 or 1, the value of the optimizer's own knob; 0 is its default.
    """

    lr: float
    aux: float = 1.0
    weight_decay: float = 0.01
    beta: float = 0.9
    own: int = 0

    def __str__(self) -> str:
        return (
            f"lr {self.lr:.3g}, rest x {self.aux:g}, decay {self.weight_decay:g}, "
            f"beta {self.beta:g}, own {self.own}"
        )


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        name: for ``deepopt.create_optimizer``.
        knob: the two values of a knob of its own, as arguments; the first is its default.
        options: further arguments.
        scale: learning rate in units of AdamW's.
        momentum: its argument for ``Setting.beta`` where that is not ``betas[0]``.
    """

    name: str
    knob: tuple[dict[str, Any], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    momentum: str = ""


SIZES = ({"update_rms": None}, {"update_rms": 0.2})
CONTENDERS: dict[str, Contender] = {
    "AdamW": Contender("adamw", ({"beta2": 0.999}, {"beta2": 0.99})),
    "SGD": Contender(
        "sgd", ({"nesterov": False}, {"nesterov": True}), scale=RATES["SGD"], momentum="momentum"
    ),
    "Muon": Contender("muon", ({"nesterov": True}, {"nesterov": False}), momentum="momentum"),
    "NorMuon": Contender(
        "deep_momentum",
        ({"row_norm": True}, {"row_norm": False}),
        {"memory": "linear", "update_rms": 0.2},
    ),
    **{
        f"DeepMomentum, {memory}": Contender("deep_momentum", SIZES, {"memory": memory})
        for memory in ("linear", "delta", "covariance")
    },
    "M3": Contender("m3", ({"mix": "post"}, {"mix": "pre"})),
}
"""NorMuon is the linear memory at Muon's fixed size with rows normalized; the value 1 of its own
knob is Muon with the coefficients of Polar Express."""

DEFAULT = "DeepMomentum, delta"
RIVALS = ("AdamW", "NorMuon")
"""Those that the others are held against, and whose loss is measured at several budgets."""


def build(model: nn.Module, contender: str, setting: Setting) -> torch.optim.Optimizer:
    """The optimizer of ``model``; every group has its peak rate as ``initial_lr``.

    Raises:
        ValueError: it has no use for the model.
    """
    entry = CONTENDERS[contender]
    options = {**entry.options, **entry.knob[setting.own]}
    if entry.momentum:
        options[entry.momentum] = setting.beta
    if entry.name != "sgd":  # torch's Muon has AdamW beside it
        options["betas"] = (setting.beta, options.pop("beta2", 0.999))
    groups = [dict(group) for group in deepopt.param_groups(model)]
    for group in groups:
        rate = setting.lr * entry.scale * (setting.aux if group["path"] == "elementwise" else 1.0)
        group.update(lr=rate, initial_lr=rate)
        group["weight_decay"] = setting.weight_decay / entry.scale
    return deepopt.create_optimizer(groups, entry.name, setting.lr, setting.weight_decay, **options)
