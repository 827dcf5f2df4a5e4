"""Which parameter takes which path through an optimizer, by shape, name and group.

- ``matrix``: the parameter is one matrix, its first dimension by all others (a convolution is
  out x in·k·k, a transposed one in x out·k·k, a grouped one a single matrix over all groups).
- ``stack``: a stack of matrices in its last two dimensions (heads, experts).
- ``elementwise``: anything else, by AdamW.

A matrix that holds several, one below the other, is cut into ``split`` equal ones along its rows.
What modules tell of their parameters is in ``modules.py``.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from deepopt._arguments import is_int

Path = Literal["matrix", "stack", "elementwise"]
PATHS: tuple[str, ...] = ("auto", "matrix", "stack", "elementwise")

SMALLEST_SIDE = 16
"""Below it a matrix is too small for an orthogonal update to differ usefully from Adam's."""
WIDEST_ASPECT = 16
"""With a larger aspect ratio, a matrix of unknown use is taken for a table (vocabulary x width)."""

_TABLES = re.compile(r"(^|[._])(embed\w*|emb|wte|wpe|pos|positions?|positional|table)([._]|$)")
_HEADS = re.compile(
    r"(^|\.)(lm_head|head|head\.fc|classifier|embed_out|unembed|logits|output_projection)"
    r"(\.weight)?$|^(fc|output|out|score)(\.weight)?$"
)
_FUSED = {
    3: re.compile(r"(^|[._])(\w*qkv\w*|c_attn|query_key_value|in_proj(_weight)?)(\.weight)?$"),
    2: re.compile(r"(^|[._])(gate_up_proj|w12)(\.weight)?$"),
}
_LORA = re.compile(r"(^|\.)lora[._](embedding_)?([ab]|down|up)(\.|$).*", re.IGNORECASE)
_WRAPPERS = re.compile(
    r"(^base_model\.model|(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
    r"|base_layer|original_module|modules_to_save\.\w+))(?=\.|$)"
)


class Route(NamedTuple):
    """Where a parameter goes, and why.

    Attributes:
        path: its path.
        split: number of matrices that each of its matrices is cut into.
        reason: in a few words.
        doubt: what a warning may be about: "embedding" for an embedding on the matrix path, "small"
            and "wide" for a matrix on the element-wise path because of its shape alone, "bare" for
            a matrix whose module has lost its type, or "".
    """

    path: Path
    split: int = 1
    reason: str = ""
    doubt: str = ""

    @property
    def label(self) -> str:
        """The path, followed by the split if the parameter is split: "matrix/3"."""
        return f"{self.path}/{self.split}" if self.split > 1 else self.path


def sides(param: Tensor, path: Path, split: int = 1) -> tuple[int, int]:
    """Rows and columns of the matrices that :func:`matrices` would make of ``param``."""
    if path == "stack":
        return param.shape[-2] // split, param.shape[-1]
    return math.prod(param.shape[:1]) // split, math.prod(param.shape[1:])  # a scalar: 1 x 1


def matrices(tensor: Tensor, path: Path, split: int = 1) -> Tensor:
    """``tensor`` as a batch of matrices (B, m, n), a view where its strides allow one."""
    return tensor.reshape(-1, *sides(tensor, path, split))


# -- by shape and name -----------------------------------------------------------------------


def route(param: Tensor, name: str = "", split: int = 1) -> Route:
    """The route of a parameter of which only the shape and perhaps the name is known."""
    return _route_shape(param.shape, param.is_complex(), name, split)


@functools.lru_cache(2**16)  # functional() makes an optimizer, which asks, at every step
def _route_shape(shape: torch.Size, is_complex: bool, name: str, split: int) -> Route:
    param = torch.empty(shape, device="meta", dtype=torch.cfloat if is_complex else torch.float)
    if vector := non_matrix_route(param):
        return vector
    for is_named, reason in (
        (is_named_like_a_table, "named like a table"),
        (is_named_like_a_head, "named like a head"),
    ):
        if is_named(name):
            return Route("elementwise", 1, reason)
    # Kernels are shorter than matrices: (8, 64, 64) are eight experts, (64, 64, 3) is a Conv1d.
    path: Path = "stack" if len(shape) == 3 and min(shape[1:]) >= SMALLEST_SIDE else "matrix"
    is_factor = is_lora_factor(name)
    reason = "LoRA factor" if is_factor else "by shape"
    found = unless_small(param, name, Route(path, split, reason))
    if found.path == "elementwise" or is_factor:
        return found
    short, long = sorted(sides(param, path))
    if path == "stack" and len(param) == 1:
        return Route("elementwise", 1, "a stack of one, like a table", "wide")
    if long > WIDEST_ASPECT * short:
        return Route("elementwise", 1, f"aspect over {WIDEST_ASPECT}, like a table", "wide")
    return found._replace(reason=found.reason + fusion_hint(name, param, split))


def non_matrix_route(param: Tensor) -> Route | None:
    """The element-wise route of a parameter that cannot be a matrix; None for any other."""
    if param.ndim < 2:
        return Route("elementwise", 1, "vector" if param.ndim else "scalar")
    return Route("elementwise", 1, "complex") if param.is_complex() else None


def unless_small(param: Tensor, name: str, wanted: Route) -> Route:
    """``wanted``, or the element-wise path if its matrices have a short side."""
    check_rows(param, name, wanted.path, wanted.split)
    if min(sides(param, wanted.path, wanted.split)) >= SMALLEST_SIDE:
        return wanted
    after = f" after split={wanted.split}" if wanted.split > 1 else ""
    return Route("elementwise", 1, f"side under {SMALLEST_SIDE}{after}", "small")


def fusion_hint(name: str, param: Tensor, split: int) -> str:
    """A hint for the reason: the name suggests a fused matrix, but not how it lies in memory."""
    for parts, names in _FUSED.items():
        if split == 1 and param.ndim == 2 and len(param) % parts == 0 and names.search(name):
            return f"; fused? see split={parts}"
    return ""


# -- names -----------------------------------------------------------------------------------


@functools.lru_cache(2**16)
def is_named_like_a_table(name: str) -> bool:
    """Whether a parameter is called like an embedding (``wte``, ``pos_embed``, ...)."""
    return bool(_TABLES.search(name) or _TABLES.search(_plain(name)))


@functools.lru_cache(2**16)
def is_named_like_a_head(name: str) -> bool:
    """Whether a module or parameter is called like an output layer (``lm_head``, ...)."""
    return bool(_HEADS.search(_plain(name)))


def is_lora_factor(name: str) -> bool:
    """Whether a module or parameter is called like a factor of a low-rank update."""
    return bool(_LORA.search(name))


def unwrapped(name: str) -> str:
    """``name`` without what DDP, FSDP, ``torch.compile`` and PEFT put into it."""
    return _WRAPPERS.sub("", name).lstrip(".")


def _plain(name: str) -> str:
    """``name`` unwrapped; for a LoRA factor, the name of the weight that it adapts."""
    return _LORA.sub("", unwrapped(name))


# -- of an optimizer's groups ----------------------------------------------------------------


Routed: TypeAlias = tuple[Tensor, str, Route]
"""A parameter, its name (or "") and its route."""


def routed(group: Mapping[str, Any]) -> Iterator[Routed]:
    """Every parameter of an optimizer's group with its name (or "") and its route."""
    params, path, split = group["params"], group["path"], group.get("split", 1)
    reasons = group.get("reasons")
    if reasons is None or len(reasons) != len(params):  # not made by param_groups, or changed since
        reasons = [""] * len(params)
    names = _names(group)
    for param, name, reason in zip(params, names, reasons, strict=True):
        if path == "auto":
            yield param, name, route(param, name, split)
            continue
        doubt = ""
        if not reason:
            reason = "path of the group"
            is_table = param.ndim == 2 and is_named_like_a_table(name)
            doubt = "embedding" if is_table and path != "elementwise" else ""
        yield param, name, Route(path, 1 if path == "elementwise" else split, reason, doubt)


def routes(group: Mapping[str, Any]) -> list[Route]:
    """The routes of a group's parameters, in order, without reasons where its path is given."""
    path, split = group["path"], group.get("split", 1)
    if path != "auto":
        return [Route(path, 1 if path == "elementwise" else split)] * len(group["params"])
    return [route for _, _, route in routed(group)]


def _names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters; empty strings unless there is one for each."""
    names = group.get("param_names") or []
    # ZeroRedundancyOptimizer gives each rank a part of "params", but all of "param_names".
    unnamed = len(names) != len(group["params"])
    return [""] * len(group["params"]) if unnamed else list(names)


def check_group(group: Mapping[str, Any], min_dims: Mapping[str, int]) -> None:
    """Raise ValueError for the first parameter that a group's path or split does not fit.

    Args:
        group: an optimizer's group.
        min_dims: the fewest dimensions of a parameter, for each path that needs any.
    """
    check_split(group.get("split", 1))
    for param, name in zip(group["params"], _names(group), strict=True):
        check_initialized(param, name)
    needed, forced = min_dims.get(group["path"], 0), group["path"] in min_dims
    for param, name, found in routed(group):
        if param.ndim < needed or (forced and param.is_complex()):
            raise ValueError(
                f"Invalid path: {group['path']!r} for {param_text(param, name)} and {param.dtype}; "
                f"it needs real matrices of at least {needed} dimensions, use path='auto' or "
                "'elementwise'"
            )
        check_rows(param, name, found.path, found.split)


def check_split(split: Any) -> None:
    """Raise ValueError unless ``split`` is a number of matrices."""
    if not is_int(split) or split < 1:
        raise ValueError(
            f"Invalid split: {split!r}; it must be a whole number of at least 1, the number of "
            "equal matrices that lie one below the other in a parameter"
        )


def check_rows(param: Tensor, name: str, path: Path, split: int) -> None:
    """Raise ValueError unless ``split`` divides the rows of ``param``."""
    if split > 1 and (rows := sides(param, path)[0]) % split:
        raise ValueError(
            f"Invalid split: {split} for {param_text(param, name)}: its {rows} rows cannot be cut "
            f"into {split} equal matrices; give a divisor of {rows}, or leave split out"
        )


def param_text(param: Tensor, name: str) -> str:
    """How messages name a parameter."""
    return f"parameter {name or '(unnamed)'} of shape {tuple(param.shape)}"


def check_initialized(param: Any, name: str) -> None:
    """Raise ValueError for a parameter of a lazy module that has not run yet."""
    if is_lazy(param):
        raise ValueError(
            f"Invalid params: {name or '(unnamed)'} of a lazy module has no shape yet; run the "
            "model once on an example, then make the groups or the optimizer"
        )
