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
    non_matrix_route,
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


_BARE = (
    "Module", "InterpreterModule", "UnflattenedModule",  # of exported programs
    "RecursiveScriptModule", "TracedModule", "TopLevelTracedModule",  # of torch.jit
)  # fmt: skip
"""torch's classes that replace the type of a module, so that it can no longer be told."""


def module_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module; for a scripted module, that of the torch layer it was made from."""
    cls, original = type(module), getattr(module, "original_name", None)  # set by torch.jit
    if not isinstance(original, str):
        return cls
    layer = getattr(nn, original, None)
    if isinstance(layer, type) and issubclass(layer, nn.Module):
        return layer
    return _type_by_sizes(module) or cls


def _type_by_sizes(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer that a scripted subclass extends, known by the size attributes it kept."""
    weights = dict(module.named_parameters(recurse=False))

    def has(weight: str, *sizes: str) -> bool:
        shape = tuple(getattr(module, size, None) for size in sizes)
        return weight in weights and weights[weight].shape == shape

    if has("weight", "num_embeddings", "embedding_dim"):
        return nn.Embedding
    if has("weight", "out_features", "in_features"):
        return nn.Linear
    if has("weight", "out_features", "in1_features", "in2_features"):
        return nn.Bilinear
    if "in_proj_weight" in weights and hasattr(module, "num_heads"):
        return nn.MultiheadAttention
    if "weight" in weights and hasattr(module, "in_channels") and hasattr(module, "out_channels"):
        return {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}.get(weights["weight"].ndim)
    if "weight_hh" in weights and hasattr(module, "hidden_size"):
        rows, columns = weights["weight_hh"].shape
        return {4: nn.LSTMCell, 3: nn.GRUCell, 1: nn.RNNCell}.get(rows // columns)
    return None


def route_model(
    model: nn.Module, overrides: Mapping[str, Path], splits: Mapping[str, int]
) -> list[tuple[str, Tensor, Route]]:
    """Name, parameter and route of every parameter; see :func:`deepopt.param_groups`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    for argument, value, example in (("overrides", overrides, "'matrix'"), ("split", splits, "3")):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"Invalid {argument}: {value!r} is not a dict; give one whose keys are names or "
                f"patterns of parameters, such as {{'*.qkv.weight': {example}}}"
            )
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
        kind = module_type(module)
        for key, param in holder.named_parameters(recurse=False):
            pattern = split_by.get(param)
            split, words = _parts(module, local or key)
            if pattern is not None:
                split, words = splits[pattern], kind.__name__
            name = f"{prefix}.{key}".lstrip(".")
            found = _route_owned(param, name, module, heads, split, words)
            if pattern is not None and found.path != "elementwise":
                found = found._replace(reason=f"{found.reason}, split {pattern!r}")
            uses.setdefault(param, []).append(found)
            parts[param] = split
            if issubclass(kind, _TABLE_MODULES):
                embeddings.add(param)
    if not uses:
        raise ValueError("model has no parameters")
    routes = {param: _in_all_uses(found) for param, found in uses.items()}
    for pattern, path in overrides.items():
        chosen = _matching(model, pattern, "overrides")
        if path not in PATHS[1:]:
            raise ValueError(f"Invalid overrides: {pattern!r}: {path!r} is none of {PATHS[1:]}")
        for target in chosen:
            if path == "elementwise":
                routes[target] = Route(path, 1, f"override {pattern!r}")
                continue
            if path == "stack" and target.ndim < 3:
                raise ValueError(
                    f"Invalid overrides: {pattern!r}: a stack needs three dimensions or more, but "
                    f"the shape is {tuple(target.shape)}; use 'matrix'"
                )
            check_rows(target, pattern, path, parts[target])
            doubt = "embedding" if target in embeddings else ""
            routes[target] = Route(path, parts[target], f"override {pattern!r}", doubt)
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
    kind = module_type(module)
    if vector := non_matrix_route(param):
        return vector
    if issubclass(kind, _TABLE_MODULES):
        return Route("elementwise", 1, "embedding")
    if issubclass(kind, _NORMS):
        return Route("elementwise", 1, "norm")
    if module in heads:
        return Route("elementwise", 1, heads[module])
    if _stores_input_first(module) and split > 1:
        raise ValueError(
            f"Invalid split: {split} for parameter {name}: a Conv1D is stored as in x out, so its "
            "parts lie side by side and not one below the other; leave it whole, or make it an "
            "nn.Linear"
        )
    if issubclass(kind, _HIDDEN) or _stores_input_first(module):
        hint = fusion_hint(name, param, split) if issubclass(kind, nn.Linear) else ""
        return unless_small(param, name, Route("matrix", split, words + hint))
    bare = kind.__name__ in _BARE and kind.__module__.startswith("torch.")
    if param.ndim == 2 or bare:  # if the type is lost, more dimensions may be a convolution's
        found = route(param, name, split)
        doubtful = bare and found.path == "matrix" and found.reason.startswith("by shape")
        if doubtful:
            return found._replace(doubt="bare", reason=f"{found.reason}; type lost")
        return found
    if is_named_like_a_table(name):
        return Route("elementwise", 1, "named like a table")
    if math.prod(param.shape[:-2]) == 1:
        return Route("elementwise", 1, "a stack of one, like a table", "wide")
    return unless_small(param, name, Route("stack", split, f"matrices of {words}"))


def _parts(module: nn.Module, local: str) -> tuple[int, str]:
    """How many matrices a parameter of one of torch's own layers holds, and what they are.

    Only torch's own layers count: their layout is part of their definition. The shape of a Linear
    layer does not tell whether it is fused, and its name does not tell how.
    """
    kind = module_type(module)
    if issubclass(kind, nn.MultiheadAttention) and local == "in_proj_weight":
        return 3, f"q, k, v of {kind.__name__}"
    if local.startswith(("weight_ih", "weight_hh")):
        if issubclass(kind, nn.LSTM | nn.LSTMCell):
            return 4, f"gates of {kind.__name__}"
        if issubclass(kind, nn.GRU | nn.GRUCell):
            return 3, f"gates of {kind.__name__}"
    return 1, kind.__name__


def _stores_input_first(module: nn.Module) -> bool:
    """Whether it is the Conv1D of Hugging Face's GPT-2, a linear layer; known by its name."""
    names = {base.__name__ for base in type(module).__mro__}
    return "Conv1D" in names or getattr(module, "original_name", "") == "Conv1D"


def _heads(model: nn.Module) -> dict[nn.Module, str]:
    """The output heads of a model, and how each was recognized."""
    modules = [(name, m, module_type(m)) for name, m in model.named_modules()]
    tables = [w for _, m, kind in modules if issubclass(kind, _TABLE_MODULES) for w in _weights(m)]
    heads: dict[nn.Module, str] = {}
    for name, module, kind in modules:
        if not issubclass(kind, nn.Linear | nn.modules.conv._ConvNd):
            continue
        if any(weight is table for weight in _weights(module) for table in tables):
            heads[module] = "tied head"
        elif is_named_like_a_head(name):
            heads[module] = "named like a head"
    layers = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
    inner = {inside for _, m, kind in modules if issubclass(kind, layers) for inside in m.modules()}
    hidden = [
        (m, kind)
        for name, m, kind in modules
        if issubclass(kind, _HIDDEN) and m not in inner and not is_lora_factor(name)
    ]
    linears = [m for m, kind in hidden if issubclass(kind, nn.Linear) and _weights(m)]
    has_last = len(linears) > 1 or (len(hidden) > 1 and hidden[-1][0] in linears)
    if not heads and has_last:
        # The layers of a stack share their shapes; a head has its own, or the vocabulary's height.
        last = _weights(linears[-1])[0]
        alike = sum(_weights(m)[0].shape == last.shape for m in linears)
        if any(len(table) == len(last) for table in tables):
            heads[linears[-1]] = "last linear layer, as tall as an embedding"
        elif alike == 1:
            heads[linears[-1]] = "last linear layer, of its own shape"
    return heads


def _weights(module: nn.Module) -> list[Tensor]:
    """What a layer multiplies by: its ``weight``, or failing that its own matrices."""
    # Reading a parametrized weight computes it. In training mode this can change buffers, as that
    # of spectral norm does.
    parts = [m for name, m in module.named_modules() if name.startswith("parametrizations")]
    in_training = [part for part in parts if part.training]
    try:
        for part in in_training:
            part.training = False
        weight = getattr(module, "weight", None)
    except Exception:  # a property that raises
        weight = None
    finally:
        for part in in_training:
            part.training = True
    if isinstance(weight, Tensor):
        return [weight]
    return [param for param in module.parameters(recurse=False) if param.ndim > 1]


def _matching(model: nn.Module, pattern: str, argument: str) -> list[Tensor]:
    """Parameters whose name, with or without its wrappers, is or matches ``pattern``."""
    if not isinstance(pattern, str):
        raise TypeError(
            f"Invalid {argument}: the key {pattern!r:.60} is not a string; give names or patterns "
            "of parameters, such as '*.qkv.weight'"
        )
    chosen: list[Tensor] = [
        param
        for name, param in model.named_parameters(remove_duplicate=False)
        if fnmatchcase(name, pattern) or fnmatchcase(unwrapped(name), pattern)
    ]
    if not chosen:
        raise ValueError(f"Invalid {argument}: {pattern!r}: it matches no parameter")
    return chosen
