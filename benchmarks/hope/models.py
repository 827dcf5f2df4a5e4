"""The models that are compared: one name each, one configuration and one number of parameters.

Hope's configuration gives vocabulary, width, layers, heads and convolutions to all of them. The
baselines have its embedding, norms, head and initialization; their SwiGLU, and the CMS levels of
Hope-Attention, are as wide as they must be to have as many parameters as Hope.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hope.delta_net import GatedDeltaNet
from benchmarks.transformer import Output
from deepopt.hope import Hope, HopeConfig
from deepopt.hope.attention import Attention

Mixer = Callable[[HopeConfig], nn.Module]


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, mixer: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(dim), mixer
        self.mlp_norm, self.mlp = nn.RMSNorm(dim), SwiGLU(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Baseline(nn.Module):
    """A language model of pre-norm blocks, called like Hope.

    Args:
        config: sizes.
        mixer: makes what mixes the tokens of a block.
        hidden: width of the SwiGLU.
    """

    def __init__(self, config: HopeConfig, mixer: Mixer, hidden: int) -> None:
        super().__init__()
        dim = config.dim
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.blocks = nn.ModuleList(Block(mixer(config), dim, hidden) for _ in range(config.layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        for module in self.modules():  # as Hope starts
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(self.head.weight)
        for name, param in self.named_parameters():
            if name.endswith(("mixer.output.weight", "mlp.down.weight")):
                param.data.div_(math.sqrt(2 * config.layers))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return Output.of(self.head(self.norm(x)), targets)


def parameters(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def fitted(config: HopeConfig, model: Callable[[int], nn.Module]) -> int:
    """The hidden width at which a model's number of parameters is closest to Hope's.

    The number is linear in the width, so that two widths determine it.
    """
    with torch.device("meta"):
        target, first, second = map(parameters, (Hope(config), model(1), model(2)))
    return 1 + max(0, round((target - first) / (second - first)))


def fitted_width(config: HopeConfig, mixer: Mixer) -> int:
    """The width of the SwiGLU of a baseline with as many parameters as Hope."""
    return fitted(config, lambda hidden: Baseline(config, mixer, hidden))


class FullAttention(Attention):
    """Softmax attention over one text that is given whole."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def attention(config: HopeConfig) -> nn.Module:
    return FullAttention(config.dim, config.heads)


def hope_attention(config: HopeConfig) -> HopeConfig:
    """Hope with softmax attention instead of its memories, and as many parameters as with them."""

    def wide(hidden: int) -> HopeConfig:
        return dataclasses.replace(config, mixer="attention", cms_expansion=hidden / config.dim)

    return wide(fitted(config, lambda hidden: Hope(wide(hidden))))


def delta_net(config: HopeConfig) -> nn.Module:
    return GatedDeltaNet(config.dim, config.heads, config.conv_width)


def delta_net_2(config: HopeConfig) -> nn.Module:
    return GatedDeltaNet(config.dim, config.heads, config.conv_width, max_beta=2.0)


BASELINES: dict[str, Mixer] = {
    "Transformer++": attention,
    "gated DeltaNet": delta_net,
    "gated DeltaNet, beta < 2": delta_net_2,
}

DEFAULTS = HopeConfig()
ABLATIONS: dict[str, dict[str, Any]] = {
    # "gd" erases nothing, and max_inner_lr, which must be positive, leaves next to nothing to
    # write: all memories stay at their initial weights.
    "memories frozen": {"update": "gd", "max_inner_lr": 1e-12},
    "the printed layer (HopeConfig.paper)": {
        field.name: value
        for field in dataclasses.fields(HopeConfig)
        if (value := getattr(HopeConfig.paper(), field.name)) != getattr(DEFAULTS, field.name)
    },
    "DGD in place of the exact delta rule": {"update": "dgd"},
    "plain gradient descent": {"update": "gd"},
    "dot product objective": {"objective": "dot"},
    "erasure by eta": {"max_erase": None},
    "erasure at most 1": {"max_erase": 1.0},
    "eta per channel": {"per_channel": True},
    "retention to zero": {"retention": "zero"},
    "with momentum": {"momentum": True},
    "no projections of keys and values": {"projections": False},
    "linear memories": {"memory_hidden": 0, "projection_hidden": 0},
    "mem as wide as a head": {"memory_hidden": 32},
    "queries that do not turn": {"turns": False},
    "no convolutions": {"conv_width": 1},
    "chunks of 8": {"memory_chunk": 8, "projection_chunk": 8},
    "one CMS level of the same size": {"cms_chunks": (256,), "cms_expansion": 4},
    "CMS levels learn at every step": {"cms_chunks": (1, 1)},
    "nested CMS levels": {"cms_variant": "nested"},
    "CMS levels side by side": {"cms_variant": "independent"},
}
"""Hope with one part of the layer taken away or exchanged: fields of `HopeConfig`."""

HOPES = ("Hope", "Hope-Attention")
"""Both forms of the paper's model."""

NAMES = (*HOPES, *BASELINES, *(f"Hope, {name}" for name in ABLATIONS))


def config_of(name: str, config: HopeConfig) -> HopeConfig:
    """The configuration of the Hope of that name; `config` has the sizes of a task."""
    if name == "Hope-Attention":
        return hope_attention(config)
    return dataclasses.replace(config, **ABLATIONS.get(name.removeprefix("Hope, "), {}))


def build(name: str, config: HopeConfig) -> nn.Module:
    """The model of that name (one of `NAMES`) at the sizes of `config`."""
    if name in BASELINES:
        mixer = BASELINES[name]
        return Baseline(config, mixer, fitted_width(config, mixer))
    return Hope(config_of(_known(name), config))


def described(name: str, config: HopeConfig) -> str:
    """All that the model of that name is made from: a line of results counts while this holds."""
    if name not in BASELINES:
        return repr(config_of(_known(name), config))
    sizes = ("vocab_size", "dim", "layers", "heads", "conv_width")
    known = [f"{size}={getattr(config, size)}" for size in sizes]
    return ", ".join([*known, f"hidden={fitted_width(config, BASELINES[name])}"])


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"model={name!r}: must be one of {', '.join(NAMES)}")
    return name
