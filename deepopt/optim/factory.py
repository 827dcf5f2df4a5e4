"""An optimizer from its name, with timm's rules for weight decay and learning rates by layer."""

import inspect
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from deepopt._arguments import check_types, typed
from deepopt.optim.continuum import Continuum
from deepopt.optim.muon_and_adamw import MUON, MuonAndAdamW
from deepopt.optim.registry import REGISTRY
from deepopt.routing import Path
from deepopt.routing.groups import divided, param_groups
from deepopt.routing.rules import unwrapped

_MERGES_WITH_PREVIOUS = 99999
"""A timm matcher's last number for parameters that belong to the layer before, as a final norm."""


def create_optimizer(
    model_or_params: nn.Module | ParamsT | None = None,
    name: str | None = None,
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    layer_decay: float | None = None,
    *,
    overrides: Mapping[str, Path] | None = None,
    split: Mapping[str, int] | None = None,
    filter_bias_and_bn: bool = True,
    **options: Any,
) -> Any:
    r"""An optimizer by its name, of this package or torch's, in the manner of ``timm.optim``.

    A module is routed by :func:`deepopt.param_groups`, frozen parameters included. Anything else
    goes to the optimizer as it is.

    With ``layer_decay`` the learning rate of a parameter k layers below the top is

    .. math:: \gamma_k = \gamma \cdot \texttt{layer_decay}^k

    which is written into its group's ``lr``. Schedulers that multiply rates keep the ratios. One
    that sets rates needs a list: ``OneCycleLR(max_lr=[g["lr"] for g in optimizer.param_groups])``.
    If the model has a ``group_matcher``, as timm's models do, it defines the layers. Otherwise the
    first number in a parameter's name does (``encoder.layer.7``, ``h.7``), in the order of
    ``model.named_parameters()``. Parameters before the first numbered one (embeddings) are the
    bottom layer, those after the last (final norm, head) are the top, and others without a number
    belong to the layer before them.

    Args:
        model_or_params: a module, or parameters, named parameters or parameter groups.
        name: a key of ``deepopt.optimizers()`` or the name of a class of this package or of
            ``torch.optim``, in any case: "deep_momentum", "DeepMomentum", "adamw". "muon" is
            torch's for matrices beside AdamW for the rest. "continuum" wraps the optimizer that
            the option ``optimizer`` names, "deep_momentum" if it is left out; that gets all options
            but ``chunk``, ``reduce``, ``tokens`` and ``lifetime``.
        lr: learning rate, that of the top layer; None for the class's default (default: None).
        weight_decay: decoupled weight decay; None for the class's default (default: None).
        layer_decay: factor of the learning rate from one layer to the one below, in (0, 1]; None
            for one learning rate (default: None).
        overrides: for a module, paths by name or pattern, as for :func:`deepopt.param_groups`
            (default: None).
        split: for a module, numbers of matrices by name or pattern, as for
            :func:`deepopt.param_groups` (default: None).
        filter_bias_and_bn: for a module, no weight decay for parameters of at most one dimension,
            those called ``bias``, and the names in ``model.no_weight_decay`` if it has that, a
            method or a collection (default: True).
        options: further arguments of the class. ``path`` replaces the routing by module type.

    Returns:
        The optimizer; ``print`` shows its groups and their routing. Called without arguments, this
        function itself, as Hugging Face's ``Trainer`` asks of a factory of optimizers.

    Raises:
        ValueError: an unknown name; a ``layer_decay`` outside (0, 1], or for a model in which no
            layers are found; ``layer_decay``, ``overrides`` or ``split`` for something other than a
            module; ``overrides`` beside ``path``; or what the class refuses.
        TypeError: one of model and name without the other, a ``name`` that is not a string, an
            option that the class does not have, or one that is not a number or flag.
    """
    if model_or_params is None and name is None:
        return create_optimizer
    if model_or_params is None or name is None:
        missing = "model_or_params" if model_or_params is None else "name"
        raise TypeError(f"create_optimizer needs {missing}; choose a name from {_names()}")
    if not isinstance(name, str):
        raise TypeError(f"Invalid name: {name!r}; choose a text from {_names()}")
    numbers = {"lr": lr, "weight_decay": weight_decay, "layer_decay": layer_decay}
    check_types(typed(create_optimizer), {**numbers, "filter_bias_and_bn": filter_bias_and_bn})
    if overrides and "path" in options:
        raise ValueError(
            f"Invalid overrides: {overrides!r} beside path={options['path']!r}, which is for all "
            "parameters; give one of the two"
        )
    if name.replace("_", "").lower() == "continuum":
        names = ("chunk", "reduce", "tokens", "lifetime")
        wrapper: dict[str, Any] = {k: options.pop(k) for k in names if k in options}
        inner = create_optimizer(
            model_or_params,
            options.pop("optimizer", "deep_momentum"),
            lr,
            weight_decay,
            layer_decay,
            overrides=overrides,
            split=split,
            filter_bias_and_bn=filter_bias_and_bn,
            **options,
        )
        return Continuum(inner, **wrapper)
    cls = _resolve(name)
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"Invalid layer_decay: {layer_decay}; it must be above 0 and at most 1")
    for key, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None:
            options[key] = value
    _check_options(cls, options)
    if not isinstance(model_or_params, nn.Module):
        for_module = {"layer_decay": layer_decay, "overrides": overrides, "split": split}
        if needless := [key for key, value in for_module.items() if value is not None]:
            raise ValueError(
                f"Invalid {needless[0]}: {for_module[needless[0]]!r}; it needs the names and "
                "layers of a model: give the module itself"
            )
        return cls(model_or_params, **options)

    model = model_or_params
    routed: list[dict[str, Any]] = param_groups(model, overrides, split)
    if "path" in options:
        named = list(model.named_parameters())
        routed = [{"params": named, "reasons": [""] * len(named)}]
    layers: dict[str, int] = {} if layer_decay is None else _layers(model)
    undecayed = _undecayed(model) if filter_bias_and_bn else set()
    numbers_of_layers, groups = _by_layer(routed, layers, undecayed)
    optimizer = cls(groups, **options)
    if layer_decay is not None:
        top = max(layers.values())
        for layer, group in zip(numbers_of_layers, optimizer.param_groups, strict=True):
            group["lr"] = group["lr"] * layer_decay ** (top - layer)
    return optimizer


def _by_layer(
    routed: list[dict[str, Any]], layers: Mapping[str, int], undecayed: Set[str]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The groups of a routing, each divided by layer and by whether its parameters decay.

    Args:
        routed: groups of named parameters.
        layers: layers by name, from the bottom; all others are in layer 0.
        undecayed: names of parameters without weight decay.

    Returns:
        The layer of every new group, and the groups: in the routing's order, and within it from the
        bottom layer to the top.
    """
    parts = divided(routed, lambda entry: (layers.get(entry[0], 0), entry[0] in undecayed))
    for (_, (_, exempt)), part in parts.items():
        if exempt:
            part["weight_decay"] = 0.0
    order = sorted(parts)
    return [layer for _, (layer, _) in order], [parts[place] for place in order]


def _torch_classes() -> dict[str, Any]:
    """The classes of ``torch.optim`` that need no closure and take dense gradients."""
    classes = {n: c for n, c in vars(torch.optim).items() if isinstance(c, type)}
    for name in ("Optimizer", "LBFGS", "SparseAdam"):
        classes.pop(name)
    return {name.lower(): cls for name, cls in classes.items()}


def _names() -> str:
    return ", ".join([*REGISTRY, *sorted(_torch_classes())])


def _resolve(name: str) -> Any:
    known = {key.replace("_", ""): e.cls for key, e in REGISTRY.items() if not e.wraps}
    classes = _torch_classes() | {"muon": MuonAndAdamW} | known
    cls = classes.get(name.replace("_", "").lower())
    if cls is None:
        raise ValueError(f"Invalid name: {name!r}; choose from {_names()}")
    return cls


def _check_options(cls: Any, options: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that the class does not have."""
    parameters = inspect.signature(cls).parameters
    taken = parameters.keys() - {"params", "options"}
    if cls is MuonAndAdamW:
        taken |= {*MUON, *inspect.signature(torch.optim.AdamW).parameters} - {"params"}
    for key, value in options.items():
        if key not in taken:
            raise TypeError(
                f"Invalid {key}: {value!r}, which {cls.__name__} does not take; leave it out, or "
                f"choose from {', '.join(sorted(taken))}"
            )


def _undecayed(model: nn.Module) -> set[str]:
    listed = getattr(model, "no_weight_decay", None)
    listed = listed() if callable(listed) else listed
    if listed is not None and (isinstance(listed, str) or not isinstance(listed, Iterable)):
        raise TypeError(
            f"Invalid no_weight_decay of the model: {listed!r}; it must be a list or set of the "
            "names of parameters, or a method that returns one"
        )
    listed = set(listed or ())
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
            "model.group_matcher does not tell layers apart; give groups that have their own lr "
            "instead"
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
            layer_ids = matcher(name)
            return tuple(layer_ids) if isinstance(layer_ids, tuple | list) else (layer_ids,)
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
