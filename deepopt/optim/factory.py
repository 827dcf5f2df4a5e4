"""An optimizer from its name, with timm's rules for weight decay and learning rates by layer."""

import re
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from deepopt.optim.registry import REGISTRY
from deepopt.routing.groups import param_groups
from deepopt.routing.rules import unwrapped

_MERGES_WITH_PREVIOUS = 99999
"""A timm matcher's last number for parameters that belong to the layer before, as a final norm."""


def create_optimizer(
    model_or_params: nn.Module | ParamsT,
    name: str,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    *,
    filter_bias_and_bn: bool = True,
    **options: Any,
) -> Optimizer:
    r"""An optimizer of this package by its name, in the manner of ``timm.optim``.

    A module is routed by :func:`deepopt.param_groups`, frozen parameters included. Anything else
    goes to the optimizer as it is.

    With ``layer_decay`` the learning rate of a parameter k layers below the top is

    .. math:: \gamma_k = \gamma \cdot \texttt{layer_decay}^k

    as its group's ``lr``, so that schedulers which multiply keep the ratios; one that sets a
    rate needs a list (``OneCycleLR(max_lr=[g["lr"] for g in optimizer.param_groups])``). Layers are
    those of ``model.group_matcher`` where there is one, as in timm's models. Elsewhere every number
    in the parameters' names that is the first of its name counts a layer (``encoder.layer.7``,
    ``h.7``), in the order of ``model.named_parameters()``; what comes before the first of them
    (embeddings) is the bottom layer, what comes between them belongs to the one before, and what
    comes after the last (final norm, head) is the top.

    Args:
        model_or_params: a module, or parameters, named parameters or parameter groups.
        name: a key of ``deepopt.optimizers()`` or the class's name, in any case: "deep_momentum",
            "DeepMomentum".
        lr: learning rate, that of the top layer; None for the class's default (default: None).
        weight_decay: decoupled weight decay; None for the class's default (default: None).
        layer_decay: factor of the learning rate from one layer to the one below, in (0, 1]; None
            for one learning rate (default: None).
        filter_bias_and_bn: for a module, no weight decay for parameters of at most one dimension,
            those called ``bias``, and the names in ``model.no_weight_decay()`` if it has that
            (default: True).
        options: further arguments of the class. ``path`` replaces the routing by module type.

    Returns:
        The optimizer; ``print`` shows its groups and their routing.

    Raises:
        ValueError: an unknown name; a ``layer_decay`` outside (0, 1], for something other than a
            module, or for a model in which no layers are found; or what the class refuses.
        TypeError: an option that the class does not have.
    """
    cls = _resolve(name)
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"Invalid layer_decay: {layer_decay}; it must be above 0 and at most 1")
    for key, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None:
            options[key] = value
    if not isinstance(model_or_params, nn.Module):
        if layer_decay is not None:
            raise ValueError("layer_decay needs the layers of a model: give the module itself")
        return cls(model_or_params, **options)

    model = model_or_params
    layers = {} if layer_decay is None else _layers(model)
    undecayed = _undecayed(model) if filter_bias_and_bn else set()
    routed: list[dict[str, Any]] = param_groups(model)
    if "path" in options:
        routed = [{"params": list(model.named_parameters())}]
    groups: dict[tuple[int, int, bool], dict[str, Any]] = {}
    for index, group in enumerate(routed):
        reasons = group.pop("reasons", [""] * len(group["params"]))
        for (param_name, param), reason in zip(group["params"], reasons, strict=True):
            exempt = param_name in undecayed
            place = (index, layers.get(param_name, 0), exempt)
            own = {"weight_decay": 0.0} if exempt else {}
            chosen = groups.setdefault(place, {**group, **own, "params": [], "reasons": []})
            chosen["params"].append((param_name, param))
            chosen["reasons"].append(reason)
    order = sorted(groups)  # the routing's, and within it from the bottom layer to the top
    optimizer = cls([groups[place] for place in order], **options)
    if layer_decay is not None:
        top = max(layers.values())
        for (_, layer, _), group in zip(order, optimizer.param_groups, strict=True):
            group["lr"] = group["lr"] * layer_decay ** (top - layer)
    return optimizer


def _resolve(name: str) -> Any:
    known = {key: entry.cls for key, entry in REGISTRY.items() if not entry.wraps}
    classes = {key.replace("_", ""): cls for key, cls in known.items()}
    cls = classes.get(name.replace("_", "").lower())
    if cls is None:
        raise ValueError(f"Invalid name: {name!r}; choose from {', '.join(known)}")
    return cls


def _undecayed(model: nn.Module) -> set[str]:
    listed = set(getattr(model, "no_weight_decay", set)())
    return {
        name
        for name, param in model.named_parameters()
        if param.ndim <= 1 or name.split(".")[-1] == "bias" or unwrapped(name) in listed
    }


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name; 0 is the bottom."""
    names = [name for name, _ in model.named_parameters()]
    matcher = getattr(model, "group_matcher", None)
    layers = _numbered(names) if matcher is None else _matched(names, matcher(coarse=False))
    if not any(layers.values()):
        raise ValueError(
            "layer_decay finds no layers: no parameter's name has a number between dots, and "
            "model.group_matcher tells none apart; give groups with an lr of their own instead"
        )
    return layers


def _numbered(names: list[str]) -> dict[str, int]:
    starts = [re.match(r"(.*?\.)??\d+(?=\.)", name) for name in names]
    blocks = list(dict.fromkeys(start[0] for start in starts if start))
    last = max((i for i, start in enumerate(starts) if start), default=-1)
    layers, current = {}, 0
    for i, (name, start) in enumerate(zip(names, starts, strict=True)):
        if start:
            current = blocks.index(start[0]) + 1
        layers[name] = len(blocks) + 1 if i > last and blocks else current
    bottom = min(layers.values(), default=0)  # 1 if there is nothing before the first block
    return {name: layer - bottom for name, layer in layers.items()}


def _matched(names: list[str], matcher: Any) -> dict[str, int]:
    """Layers by timm's convention for ``group_matcher``.

    A function from names to numbers, or a dict in the order of the layers, whose values are a
    regular expression, or pairs of one and further numbers. A layer is the number of the entry,
    the numbers that the expression captured, and the further ones; no match is the top.
    """
    rules: list[tuple[re.Pattern[str], int, Any]] = []
    if not callable(matcher):
        for order, spec in enumerate(matcher.values()):
            pairs = [(spec, None)] if isinstance(spec, str) else (spec or ())
            rules += [(re.compile(regex), order, further) for regex, further in pairs]

    def place(name: str) -> tuple[float, ...]:
        if callable(matcher):
            found = matcher(name)
            return tuple(found) if isinstance(found, tuple | list) else (found,)
        for regex, order, further in rules:
            if match := regex.match(name):
                captured = [float(text) for text in match.groups() if text is not None]
                return (order, *captured, *(further or ()))
        return (float("inf"),)

    places = {name: place(unwrapped(name)) for name in names}
    layer_of: dict[tuple[float, ...], int] = {}
    layer = -1
    for key in sorted(set(places.values())):
        if layer < 0 or key[-1] != _MERGES_WITH_PREVIOUS:
            layer += 1
        layer_of[key] = layer
    return {name: layer_of[key] for name, key in places.items()}
