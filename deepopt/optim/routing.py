"""Which parameter takes which path through an optimizer.

- ``matrix``: the parameter is one matrix, its first dimension by all others (a convolution is
  out x in·k·k, a transposed one in x out·k·k, a grouped one a single matrix over all groups).
- ``stack``: a stack of matrices in its last two dimensions (heads, experts).
- ``elementwise``: anything else, by torch's AdamW.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

Path = Literal["matrix", "stack", "elementwise"]
PATHS: tuple[str, ...] = ("auto", "matrix", "stack", "elementwise")

SMALLEST_SIDE = 16
"""Below it a matrix is too small for an orthogonal update to differ usefully from Adam's."""
WIDEST_ASPECT = 16
"""Above it a matrix of unknown use is taken for a table (vocabulary x width)."""

_TABLES = re.compile(r"(^|[._])(embed\w*|emb|wte|wpe|pos|positions?|positional|table)([._]|$)")
_HEADS = re.compile(
    r"(^|\.)(lm_head|head|classifier|embed_out|unembed|logits|output_projection)(\.weight)?$"
    r"|^(fc|output|out|score)(\.weight)?$"
)
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module)(?=\.)")
_HIDDEN_MODULES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)
_ADAMW_MODULES = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)
_TABLE_MODULES = (nn.Embedding, nn.EmbeddingBag)


def matrices(tensor: Tensor, path: Path) -> Tensor:
    """``tensor`` as a batch of matrices (B, m, n), a view where its strides allow one."""
    if path == "matrix":
        return tensor.reshape(1, math.prod(tensor.shape[:1]), -1)  # 1 row for a scalar
    return tensor.reshape(-1, *tensor.shape[-2:])


def route(param: Tensor, name: str = "") -> Path:
    """The path of a parameter of which only the shape and perhaps the name is known."""
    if param.is_complex() or param.ndim < 2 or _is_named_for_adamw(name):
        return "elementwise"
    # Kernels are shorter than matrices: (8, 64, 64) are eight experts, (64, 64, 3) is a Conv1d.
    path: Path = "stack" if param.ndim == 3 and min(param.shape[1:]) >= SMALLEST_SIDE else "matrix"
    short, long = sorted(sides(param, path))
    is_table = long > WIDEST_ASPECT * short or (path == "stack" and len(param) == 1)
    return "elementwise" if short < SMALLEST_SIDE or is_table else path


@functools.cache
def _is_named_for_adamw(name: str) -> bool:
    name = _WRAPPERS.sub("", name).lstrip(".")
    return bool(_TABLES.search(name) or _HEADS.search(name))


def param_groups(
    model: nn.Module, overrides: Mapping[str, Path] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of ``model``, routed by the type of the module that owns each parameter.

    - Weights of linear, convolutional, recurrent and attention layers: ``matrix``.
    - Parameters of more than two dimensions that a module of another type owns: ``stack``.
    - Embeddings, the output head, norms, biases, and whatever has a side under 16:
      ``elementwise``. A head is a layer that shares its weight with an embedding or is called
      like a head (``lm_head``, ``head``, ``classifier``, ...); failing these, it is the
      last of several linear layers if it is as tall as an embedding or no other has its shape.

    A shared parameter is listed once, and is ``elementwise`` if any of its uses is.

    Args:
        model: any module.
        overrides: paths by name or by shell pattern of names, ``{"blocks.*.gate.weight":
            "elementwise"}``, before the rules above; of several that match the last one counts
            (default: None).

    Returns:
        At most three groups ``{"params": [(name, parameter), ...], "path": path}``, to which
        per-group values (``lr``, ``weight_decay``, ...) can be added before the optimizer is made.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``model`` has no parameters, or an override matches none of them or is no path.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    heads = _heads(model)
    owners: dict[Tensor, list[Path]] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, ParametrizationList):  # it holds the weight of the layer around it
            module = model.get_submodule(module_name.split(".parametrizations.")[0])
        for name, param in model.get_submodule(module_name).named_parameters(
            module_name, recurse=False
        ):
            owners.setdefault(param, []).append(_route_owned(param, name, module, heads))
    paths: dict[Tensor, Path] = {
        param: "elementwise" if "elementwise" in p else p[0] for param, p in owners.items()
    }
    if not paths:
        raise ValueError("model has no parameters")
    for pattern, path in (overrides or {}).items():
        chosen = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not chosen or path not in PATHS[1:]:
            wrong = f"{path!r} is none of {PATHS[1:]}" if chosen else "it matches no parameter"
            raise ValueError(f"Invalid overrides: {pattern!r}: {wrong}")
        paths.update(dict.fromkeys(chosen, path))
    groups: list[dict[str, Any]] = [
        {
            "params": [(name, p) for name, p in model.named_parameters() if paths[p] == path],
            "path": path,
        }
        for path in ("matrix", "stack", "elementwise")
    ]
    return [group for group in groups if group["params"]]


def _route_owned(param: Tensor, name: str, module: nn.Module, heads: set[nn.Module]) -> Path:
    if isinstance(module, _ADAMW_MODULES) or module in heads or param.is_complex():
        return "elementwise"
    if isinstance(module, (*_HIDDEN_MODULES, nn.MultiheadAttention)):
        small = param.ndim < 2 or min(sides(param, "matrix")) < SMALLEST_SIDE
        return "elementwise" if small else "matrix"
    if param.ndim > 2 and not _TABLES.search(name) and math.prod(param.shape[:-2]) > 1:
        return "elementwise" if min(param.shape[-2:]) < SMALLEST_SIDE else "stack"
    return route(param, name) if param.ndim == 2 else "elementwise"


def _heads(model: nn.Module) -> set[nn.Module]:
    tables = [m.weight for m in model.modules() if isinstance(m, _TABLE_MODULES)]
    inner = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    linears = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and m not in inner
    ]
    heads: set[nn.Module] = {
        m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
        and (any(m.weight is table for table in tables) or _HEADS.search(_WRAPPERS.sub("", name)))
    }
    if not heads and len(linears) > 1:
        # The layers of a stack share their shapes; a head has its own, or the vocabulary's height.
        last = linears[-1][1]
        alike = sum(m.weight.shape == last.weight.shape for _, m in linears)
        if alike == 1 or any(len(table) == last.out_features for table in tables):
            heads = {last}
    return heads


def describe(groups: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The routing of an optimizer's groups, a line for each group, path and shape."""
    for index, group in enumerate(groups):
        lines: dict[tuple[Path, tuple[int, ...]], list[str]] = {}
        for param, name, path in routed(group):
            lines.setdefault((path, tuple(param.shape)), []).append(name)
        for (path, shape), names in lines.items():
            known = [name for name in names if name]
            shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
            size = " x ".join(map(str, shape)) or "scalar"
            yield f"group {index}  {path:<11}  {len(names):>4} of {size:<18}  {shown}".rstrip()


def routed(group: dict[str, Any]) -> Iterator[tuple[Tensor, str, Path]]:
    """Every parameter of a group with its name (or "") and its path."""
    names = group.get("param_names") or [""] * len(group["params"])
    for param, name in zip(group["params"], names, strict=True):
        yield param, name, route(param, name) if group["path"] == "auto" else group["path"]


def sides(param: Tensor, path: Path) -> tuple[int, int]:
    """Rows and columns of the matrices that :func:`matrices` would make of ``param``."""
    if path == "stack":
        return param.shape[-2], param.shape[-1]
    return math.prod(param.shape[:1]), math.prod(param.shape[1:])
