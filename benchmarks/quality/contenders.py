"""The optimizers that are compared, and how each is made from the same five settings."""

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

import deepopt
from benchmarks.quality.workload import Unavailable
from deepopt.hope.cms import chunk_groups
from deepopt.hope.optimizers import LR_SCALES
from deepopt.memory import Covariance, Linear
from deepopt.optim import Continuum


class Setting(NamedTuple):
    """What is tuned, the same for every optimizer.

    Attributes:
        lr: peak learning rate of the matrices, on AdamW's scale.
        aux: learning rate of everything else (embeddings, heads, vectors), in units of ``lr``.
        weight_decay: decoupled weight decay, of all parameters.
        beta: retention of the momentum; None for the optimizer's own default (0.9 for SGD).
        own: 0 or 1, the value of the optimizer's own knob; 0 is its default.
    """

    lr: float
    aux: float = 1.0
    weight_decay: float = 0.01
    beta: float | None = 0.9
    own: int = 0

    def __str__(self) -> str:
        beta = "its own" if self.beta is None else f"{self.beta:g}"
        return (
            f"lr {self.lr:.3g}, rest x {self.aux:g}, decay {self.weight_decay:g}, "
            f"beta {beta}, own {self.own}"
        )


@dataclass(frozen=True)
class Contender:
    """An optimizer.

    Attributes:
        name: for ``deepopt.create_optimizer``; with a dot, a class of an installed package.
        knob: the two values of a knob of its own, as arguments; the first is its default.
        options: further arguments.
        scale: learning rate in units of AdamW's; the decay is divided by it, so that as much is
            forgotten per step.
        momentum: its argument for ``Setting.beta`` where that is not ``betas[0]``.
        rate_decays: False where the rate stays at its peak, because the optimizer averages the
            weights instead.
        own_rate: it multiplies its rate by an estimate of its own; the decay stays as it is.
        motion: ``deepopt.Motion`` wraps it, and takes the two values of the knob.
    """

    name: str
    knob: tuple[dict[str, Any], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    momentum: str = ""
    # repr=False keeps these out of the configuration's hash: lines from before them stay valid.
    rate_decays: bool = field(default=True, repr=False)
    own_rate: bool = field(default=False, repr=False)
    motion: bool = field(default=False, repr=False)


@dataclass(frozen=True)
class WithoutLookAhead(Covariance):
    """The covariance memory without the look-ahead of its read."""

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        return super().read(state, state["momentum"], retention)


@dataclass(frozen=True)
class WithoutCovariance(Linear):
    """The linear memory with updates as large as the covariance memory's."""

    gain: ClassVar[float] = Covariance.gain


SIZES = ({"update_rms": None}, {"update_rms": 0.2})
ABLATIONS = {
    f"DeepMomentum, covariance, {name}": Contender(
        "deep_momentum", sizes, {"memory": "covariance", **options}
    )
    for name, sizes, options in (
        ("no covariance", SIZES, {"memory": WithoutCovariance()}),
        ("no look-ahead", SIZES, {"memory": WithoutLookAhead()}),
        ("no gain", SIZES, {"memory": Covariance(gain=1.0)}),
        ("rows as they are", SIZES, {"row_norm": False}),
        ("rank as it is", SIZES, {"rms_cap": 1.0}),
        ("size 0.2", SIZES[::-1], {}),
    )
}
"""The default without one of its parts."""
CONTENDERS: dict[str, Contender] = {
    "AdamW": Contender("adamw", ({"beta2": 0.999}, {"beta2": 0.99})),
    "SGD": Contender(
        "sgd",
        ({"nesterov": False}, {"nesterov": True}),
        scale=LR_SCALES["SGD"],
        momentum="momentum",
    ),
    "Muon": Contender("muon", ({"nesterov": True}, {"nesterov": False}), momentum="momentum"),
    "NorMuon": Contender(
        "deep_momentum",
        ({"row_norm": True}, {"row_norm": False}),
        {"memory": "linear", "update_rms": 0.2},
    ),
    **{
        f"DeepMomentum, {memory}": Contender("deep_momentum", SIZES, {"memory": memory})
        for memory in ("linear", "delta", "covariance", "mlp")
    },
    **{
        f"DeepMomentum, covariance, share {share}": Contender(
            "deep_momentum", SIZES, {"memory": "covariance", "momentum_share": share}
        )
        for share in (0.15, 0.3)
    },
    "DeepMomentum, delta and motion": Contender(
        "deep_momentum",
        ({"ahead": 10.0, "average": 0.0}, {"ahead": 0.0, "average": 1.0}),
        {"memory": "delta"},
        motion=True,
    ),
    "M3": Contender("m3", ({"mix": "post"}, {"mix": "pre"})),
    "SOAP": Contender("pytorch_optimizer.SOAP", ({"beta2": 0.95}, {"beta2": 0.99})),
    "AdEMAMix": Contender(
        "pytorch_optimizer.AdEMAMix",
        ({"beta3": 0.9999}, {"beta3": 0.999}),
        {"weight_decouple": True, "alpha": 5.0, "t_alpha_beta3": "steps"},
    ),
    "Schedule-Free": Contender(
        "pytorch_optimizer.ScheduleFreeAdamW",
        ({"beta2": 0.999}, {"beta2": 0.99}),
        rate_decays=False,
    ),
    "Prodigy": Contender(
        "pytorch_optimizer.Prodigy",
        ({"d_coef": 1.0}, {"d_coef": 2.0}),
        {"safeguard_warmup": True},
        scale=1000.0,
        own_rate=True,
    ),
    "Lion": Contender("pytorch_optimizer.Lion", ({"beta2": 0.99}, {"beta2": 0.98}), scale=0.2),
    **ABLATIONS,
}
"""NorMuon is the linear memory at Muon's fixed size with rows normalized; the value 1 of its own
knob is Muon with the coefficients of Polar Express.

Rates in units of AdamW's are those that the optimizers' authors advise: SOAP, AdEMAMix and
Schedule-Free take AdamW's, Lion a fifth of it with five times the decay, and Prodigy 1 where AdamW
has its 1e-3. Prodigy estimates one rate for all parameters, so that ``Setting.aux`` changes
nothing. AdEMAMix warms its slow momentum up over all steps of the run (``"steps"``)."""

DEFAULT = "DeepMomentum, covariance"
PARTS = {
    "the covariance": "DeepMomentum, covariance, no covariance",
    "the look-ahead of its read": "DeepMomentum, covariance, no look-ahead",
    "the gain of its updates": "DeepMomentum, covariance, no gain",
    "the normalization of rows": "DeepMomentum, covariance, rows as they are",
    "the correction of lacking rank": "DeepMomentum, covariance, rank as it is",
    "the measured size (a fixed 0.2)": "DeepMomentum, covariance, size 0.2",
}
"""Every part of the default, and the contender that lacks it."""
RIVALS = ("AdamW", "Muon", "NorMuon")
"""Those that the others are compared with, and whose loss is measured at several budgets."""
MEMORIES = ("DeepMomentum, linear", "DeepMomentum, delta", DEFAULT)
MAIN = (*RIVALS, *MEMORIES)
"""The optimizers of the standard tier."""


def package(contender: str) -> str | None:
    """The package that an optimizer comes from, with its installed version; None for our own.

    Raises:
        Unavailable: it is not installed.
    """
    name, dot, _ = CONTENDERS[contender].name.rpartition(".")
    if not dot:
        return None
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"it needs {name}, which is not installed: pip install --no-deps {name}")
    return f"{name} {importlib.metadata.version(name)}"


def build(
    model: nn.Module, contender: str, setting: Setting, steps: int, tokens: int = 1
) -> Continuum:
    """The optimizer of ``model``; every group has its peak rate as ``initial_lr``.

    Args:
        model: to train. Levels in it (Hope's) learn at the end of their chunks.
        contender: a key of ``CONTENDERS``.
        setting: what is tuned.
        steps: optimizer steps of the run.
        tokens: number of tokens in a step's batch, which the chunks count.

    Raises:
        ValueError: it has no use for the model.
    """
    entry = CONTENDERS[contender]
    options = {**entry.options, **entry.knob[setting.own]}
    options = {key: steps if value == "steps" else value for key, value in options.items()}
    options |= retention(entry, setting.beta, options)
    groups = chunk_groups(model, deepopt.param_groups(model), tokens)
    for group in groups:
        rate = setting.lr * entry.scale * (setting.aux if group["path"] == "elementwise" else 1.0)
        group.update(lr=rate, initial_lr=rate)
        group["weight_decay"] = setting.weight_decay / (1.0 if entry.own_rate else entry.scale)
    if package(contender):
        name, _, cls = entry.name.rpartition(".")
        return Continuum(getattr(importlib.import_module(name), cls)(groups, **options))
    around = {key: options.pop(key) for key in ("ahead", "average") if entry.motion}
    rest = (setting.lr, setting.weight_decay)
    made = deepopt.create_optimizer(groups, entry.name, *rest, **options)
    if entry.motion:
        motion = deepopt.Motion(made, **around)
        for mode in ("train", "eval"):  # which training.switch calls
            setattr(made, mode, getattr(motion, mode))
    return Continuum(made)


def retention(entry: Contender, beta: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the momentum's retention; ``beta2`` and ``beta3`` leave the options."""
    others = [options.pop(key) for key in ("beta2", "beta3") if key in options]
    if entry.name == "sgd":  # its own default is no momentum
        return {entry.momentum: 0.9 if beta is None else beta}
    if beta is None:
        return {}
    found: dict[str, Any] = {entry.momentum: beta} if entry.momentum else {}
    if entry.name.endswith("AdEMAMix"):
        others.insert(0, 0.999)
    return {**found, "betas": (beta, *(others or [0.999]))}  # torch's Muon has AdamW beside it
