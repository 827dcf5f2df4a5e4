"""Which parameter of a model takes which path, by the module that owns it."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from deepopt.routing.rules import (
    PATHS,
    Path,
    Route,
    check_initialized,
    check_rows,
    check_split,
    fusion_hint,
    is_lora_factor,
    is_named_like_a_head,
    is_named_like_a_table,
    no_matrix,
    route,
    unless_small,
    unwrapped,
)

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_TABLE_MODULES = (nn.Embedding, nn.EmbeddingBag)
_HIDDEN = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)


def route_model(
    model: nn.Module, overrides: Mapping[str, Path], splits: Mapping[str, int]
) -> list[tuple[str, Tensor, Route]]:
    """Name, parameter and route of every parameter; see :func:`deepopt.param_groups`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    for name, param in model.named_parameters():
        check_initialized(param, name)
    for split in splits.values():
        check_split(split)
    split_by = {p: key for key in splits for p in _matching(model, key, "split")}
    heads = _heads(model)
    uses: dict[Tensor, list[Route]] = {}
    parts: dict[Tensor, int] = {}
    embeddings: set[Tensor] = set()
    for prefix, holder in model.named_modules():
        module, local = holder, ""
        if isinstance(holder, ParametrizationList):  # it holds the weight of the layer around it
            owner, _, local = prefix.rpartition("parametrizations.")
            module = model.get_submodule(owner.rstrip("."))
        for key, param in holder.named_parameters(recurse=False):
            pattern = split_by.get(param)
            split, words = _parts(module, local or key)
            if pattern is not None:
                split, words = splits[pattern], type(module).__name__
            name = f"{prefix}.{key}".lstrip(".")
            found = _route_owned(param, name, module, heads, split, words)
            if pattern is not None and found.path != "elementwise":
                found = found._replace(reason=f"{found.reason}, split {pattern!r}")
            uses.setdefault(param, []).append(found)
            parts[param] = split
            if isinstance(module, _TABLE_MODULES):
                embeddings.add(param)
    if not uses:
        raise ValueError("model has no parameters")
    routes = {param: _in_all_uses(found) for param, found in uses.items()}
    for pattern, path in overrides.items():
        chosen = _matching(model, pattern, "overrides")
        if path not in PATHS[1:]:
            raise ValueError(f"Invalid overrides: {pattern!r}: {path!r} is none of {PATHS[1:]}")
        for each in chosen:
            if path == "elementwise":
                routes[each] = Route(path, 1, f"override {pattern!r}")
                continue
            if path == "stack" and each.ndim < 3:
                raise ValueError(
                    f"Invalid overrides: {pattern!r}: a stack has three dimensions or more, and "
                    f"not the shape {tuple(each.shape)}; use 'matrix'"
                )
            check_rows(each, pattern, path, parts[each])
            doubt = "embedding" if each in embeddings else ""
            routes[each] = Route(path, parts[each], f"override {pattern!r}", doubt)
    return [(name, param, routes[param]) for name, param in model.named_parameters()]


def _in_all_uses(found: list[Route]) -> Route:
    """The route of a shared parameter: a head or embedding is one in all its uses."""
    elementwise = [use for use in found if use.path == "elementwise"]
    chosen = elementwise or found[:1]
    return chosen[0]._replace(reason="; ".join(dict.fromkeys(use.reason for use in chosen)))


def _route_owned(
    param: Tensor,
    name: str,
    module: nn.Module,
    heads: Mapping[nn.Module, str],
    split: int,
    words: str,
) -> Route:
    if vector := no_matrix(param):
        return vector
    if isinstance(module, _TABLE_MODULES):
        return Route("elementwise", 1, "embedding")
    if isinstance(module, _NORMS):
        return Route("elementwise", 1, "norm")
    if module in heads:
        return Route("elementwise", 1, heads[module])
    if _stores_input_first(module) and split > 1:
        raise ValueError(
            f"Invalid split: {split} for parameter {name}: a Conv1D is stored as in x out, so that "
            "its parts lie side by side and not one below the other; leave it whole, or make it an "
            "nn.Linear"
        )
    if isinstance(module, _HIDDEN) or _stores_input_first(module):
        hint = fusion_hint(name, param, split) if isinstance(module, nn.Linear) else ""
        return unless_small(param, name, Route("matrix", split, words + hint))
    if param.ndim == 2:
        return route(param, name, split)
    if is_named_like_a_table(name):
        return Route("elementwise", 1, "named like a table")
    if math.prod(param.shape[:-2]) == 1:
        return Route("elementwise", 1, "a stack of one, like a table", "wide")
    return unless_small(param, name, Route("stack", split, f"matrices of {words}"))


def _parts(module: nn.Module, local: str) -> tuple[int, str]:
    """How many matrices a parameter of one of torch's own layers holds, and what they are.

    Only torch's own: their layout is part of their definition. Of a Linear layer the shape does not
    tell whether it is fused, nor the name how.
    """
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention) and local == "in_proj_weight":
        return 3, f"q, k, v of {kind}"
    if local.startswith(("weight_ih", "weight_hh")):
        if isinstance(module, nn.LSTM | nn.LSTMCell):
            return 4, f"gates of {kind}"
        if isinstance(module, nn.GRU | nn.GRUCell):
            return 3, f"gates of {kind}"
    return 1, kind


def _stores_input_first(module: nn.Module) -> bool:
    """Whether it is the Conv1D of Hugging Face's GPT-2, a linear layer; known by its name."""
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """The output heads of a model, and how each was recognised."""
    modules = list(model.named_modules())
    tables = [m.weight for _, m in modules if isinstance(m, _TABLE_MODULES)]
    heads: dict[nn.Module, str] = {}
    for name, module in modules:
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        if any(module.weight is table for table in tables):
            heads[module] = "tied head"
        elif is_named_like_a_head(name):
            heads[module] = "named like a head"
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
    inner = {inside for _, m in modules if isinstance(m, layers) for inside in m.modules()}
    hidden = [
        m
        for name, m in modules
        if isinstance(m, _HIDDEN) and m not in inner and not is_lora_factor(name)
    ]
    linears = [m for m in hidden if isinstance(m, nn.Linear)]
    has_last = len(linears) > 1 or (len(hidden) > 1 and hidden[-1] in linears)
    if not heads and has_last:
        # The layers of a stack share their shapes; a head has its own, or the vocabulary's height.
        last = linears[-1]
        alike = sum(m.weight.shape == last.weight.shape for m in linears)
        if any(len(table) == last.out_features for table in tables):
            heads[last] = "last linear layer, as tall as an embedding"
        elif alike == 1:
            heads[last] = "last linear layer, of its own shape"
    return heads


def _matching(model: nn.Module, pattern: str, argument: str) -> list[Tensor]:
    """Parameters whose name, with or without its wrappers, is or matches ``pattern``."""
    chosen: list[Tensor] = [
        param
        for name, param in model.named_parameters(remove_duplicate=False)
        if fnmatchcase(name, pattern) or fnmatchcase(unwrapped(name), pattern)
    ]
    if not chosen:
        raise ValueError(f"Invalid {argument}: {pattern!r}: it matches no parameter")
    return chosen
