"""Parameter groups: how they are made from a model and printed, and when a warning is due."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from deepopt._table import in_columns
from deepopt._warnings import warn
from deepopt.routing.modules import route_model
from deepopt.routing.rules import (
    PATHS,
    Path,
    Route,
    check_group,
    routed,
    sides,
)

Key = TypeVar("Key", bound=Hashable)

MIN_FLOATS = 10_000
"""A model with fewer floats in matrices is a toy, whose routing is not worth a warning."""
MAX_VECTOR = 2**16
"""Norms and biases are shorter: a longer vector is probably a flattened matrix."""
MAX_TABLES = 4
"""Up to this many parameters that only their aspect ratio sends to the element-wise path give no
warning: they are probably tables."""


def param_groups(
    model: nn.Module,
    overrides: Mapping[str, Path] | None = None,
    split: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of ``model``, routed by the type of the module that owns each parameter.

    - Weights of linear, convolutional, recurrent and attention layers: ``matrix``.
    - Parameters of more than two dimensions that a module of another type owns: ``stack``.
    - Matrices that a module of another type owns: ``elementwise`` if they are named like a table or
      a head, or are more than 16 times as long as wide, else ``matrix``.
    - Embeddings, the output head, norms, biases, and whatever has a side under 16:
      ``elementwise``. A head is a layer that shares its weight with an embedding or is called
      like a head (``lm_head``, ``head``, ``classifier``, ...); failing these, it is the last
      linear layer among several layers if it is as tall as an embedding or no other linear layer
      has its shape.
    - The fused q, k, v of ``nn.MultiheadAttention`` are split into 3 matrices, the gates of
      ``nn.LSTM`` into 4 and of ``nn.GRU`` into 3. Nothing else is split unless ``split`` says so.

    A shared parameter is listed once, and is ``elementwise`` if any of its uses is. Warnings
    tell, at most once each, of embeddings that are overridden to be matrices, of modules that have
    lost their type, of parameters that FSDP1 or ZeRO-3 has flattened, and of models of which more
    than half of at least 10,000 floats in matrices are element-wise by their shape alone.
    ``print(deepopt.routing_table(groups))`` shows every decision and its reason, and
    ``docs/routing.md`` has the rules in full.

    Args:
        model: any module.
        overrides: paths by name or by shell pattern of names, ``{"blocks.*.gate.weight":
            "elementwise"}``, before the rules above; of several that match the last one counts
            (default: None).
        split: the number of equal matrices that lie one below the other (along dim 0; in a stack
            along dim -2) in a parameter, by name or pattern: 3 for a fused q, k, v, 3 * heads for
            one matrix per head; parameters that match but are not matrices, such as biases,
            stay whole; of several that match the last one counts (default: None).

    Returns:
        One group ``{"params": [(name, parameter), ...], "path": path, "split": split, "reasons":
        [...]}`` per path and split, to which per-group values (``lr``, ``weight_decay``, ...) can
        be added before the optimizer, of this package or another, is made.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or ``overrides`` or ``split`` not a dict with
            strings for keys.
        ValueError: ``model`` has no parameters or some without a shape (lazy modules), an override
            or a split matches none of them or is not a path or number, or a split does not divide
            the rows.
    """
    routes = route_model(
        model, {} if overrides is None else overrides, {} if split is None else split
    )
    warn_of_doubts([(param, name, found) for name, param, found in routes])
    return _grouped(routes)


def _grouped(routes: Sequence[tuple[str, Tensor, Route]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, int], dict[str, Any]] = {}
    for name, param, (path, split, reason, _) in routes:
        group = groups.setdefault(
            (PATHS.index(path), split),
            {"params": [], "path": path, "split": split, "reasons": []},
        )
        group["params"].append((name, param))
        group["reasons"].append(reason)
    return [groups[key] for key in sorted(groups)]


def divided(
    groups: Iterable[Mapping[str, Any]], key: Callable[[Any], Key]
) -> dict[tuple[int, Key], dict[str, Any]]:
    """Groups, each divided by what ``key`` says of its parameters, or pairs of name and parameter.

    A part has all else that its group has, and the reasons of its own parameters.

    Returns:
        The parts by their group's index and their key.
    """
    parts: dict[tuple[int, Key], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        lists = [name for name in ("params", "reasons") if name in group]
        for place, entry in enumerate(group["params"]):
            found = index, key(entry)
            if found not in parts:
                parts[found] = {**group, **{name: [] for name in lists}}
            for name in lists:
                parts[found][name].append(group[name][place])
    return parts


def labels(group: Mapping[str, Any]) -> list[str]:
    """The decision as plain data, one word per parameter: "matrix", "matrix/3", "elementwise"."""
    return [route.label for _, _, route in routed(group)]


# -- a table ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """A parameter in a :class:`RoutingTable`.

    Attributes:
        name: its name, or "".
        shape: its shape.
        path: its path.
        split: matrices that each of its matrices is cut into.
        matrices: count, rows and columns of its matrices; None on the element-wise path.
        reason: why, in a few words.
        frozen: whether its ``requires_grad`` is False.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    split: int
    matrices: tuple[int, int, int] | None
    reason: str
    frozen: bool


class RoutingTable(tuple[Row, ...]):
    """Rows, one per parameter; as text an aligned table."""

    def __str__(self) -> str:
        cells = [("name", "shape", "path", "split", "matrices", "reason")]
        for row in self:
            cells.append(
                (
                    row.name or "(unnamed)",
                    _times(row.shape),
                    row.path,
                    str(row.split) if row.split > 1 else "",
                    _times(row.matrices) if row.matrices else "",
                    row.reason + (" (frozen)" if row.frozen else ""),
                )
            )
        in_matrices = [row for row in self if row.matrices]
        rest = [row for row in self if not row.matrices]
        totals = f"as matrices: {_total(in_matrices)}; element-wise: {_total(rest)}"
        return f"{in_columns(cells)}\n{totals}"

    __repr__ = __str__


def routing_table(source: nn.Module | Optimizer | Iterable[dict[str, Any]]) -> RoutingTable:
    """Where every parameter goes and why; ``print`` shows it as a table.

    Args:
        source: a model, routed as by ``deepopt.param_groups(model)``; or groups, those of
            ``param_groups`` or of your own; or an optimizer of this package.

    Returns:
        A tuple of rows with the fields ``name``, ``shape``, ``path``, ``split``, ``matrices``
        (count, rows, columns), ``reason`` and ``frozen``, in the order of the groups.

    Raises:
        TypeError, ValueError: as ``param_groups``, and as optimizers do for a path or a split that
            does not fit a parameter.
    """
    if isinstance(source, nn.Module):
        source = _grouped(route_model(source, {}, {}))
    groups = source.param_groups if isinstance(source, Optimizer) else source
    return RoutingTable(row for group in groups for row in _rows(_as_in_an_optimizer(group)))


def _rows(group: Mapping[str, Any]) -> Iterator[Row]:
    check_group(group, {"stack": 3})
    for param, name, (path, split, reason, _) in routed(group):
        cut = None
        if path != "elementwise":
            rows, columns = sides(param, path, split)
            cut = (param.numel() // max(rows * columns, 1), rows, columns)
        shape = tuple(param.shape)
        yield Row(name, shape, path, split, cut, reason, not param.requires_grad)


def _as_in_an_optimizer(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group before or after ``add_param_group``, in the form it has after."""
    params = group["params"]
    named = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names") or [p[0] if isinstance(p, tuple) else "" for p in named]
    bare = [p[1] if isinstance(p, tuple) else p for p in named]
    return {"path": "auto", **group, "params": bare, "param_names": names}


def describe(groups: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The routing of an optimizer's groups, a line for each group, path and shape."""
    for index, group in enumerate(groups):
        lines: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for param, name, found in routed(group):
            lines.setdefault((found.label, tuple(param.shape)), []).append(name)
        for (label, shape), names in lines.items():
            known = [name for name in names if name]
            shown = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "")
            line = f"group {index}  {label:<11}  {len(names):>4} of {_times(shape):<18}  {shown}"
            yield line.rstrip()


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _total(rows: Sequence[Row]) -> str:
    floats = sum(math.prod(row.shape) for row in rows)
    return f"{len(rows):,} parameters, {floats:,} floats"


# -- doubts ----------------------------------------------------------------------------------


def warn_of_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """:func:`warn_of_doubts` about an optimizer's groups, but for those of :func:`param_groups`."""
    hand_made = (group for group in groups if "reasons" not in group)
    warn_of_doubts([row for group in hand_made for row in routed(group)])


def warn_of_doubts(routes: Sequence[tuple[Tensor, str, Route]]) -> None:
    """Warn of embeddings on the matrix path, lost module types, flattened parameters, and models
    that are mostly element-wise, once each.

    Frozen parameters do not count. Up to ``MAX_TABLES`` parameters that are element-wise because
    of their aspect ratio do not count either: most likely they are tables indeed.
    """
    routes = [row for row in routes if row[0].requires_grad]
    if embeddings := [name for _, name, found in routes if found.doubt == "embedding"]:
        warn(
            f"{_some(embeddings)} looks like an embedding but is on the matrix path: an orthogonal "
            "update moves the rows of all tokens, seen or not. Use "
            "'elementwise' for it, in overrides of deepopt.param_groups or as its group's path"
        )
    if bare := [name for _, name, found in routes if found.doubt == "bare"]:
        warn(
            f"the module of {_some(bare)} has lost its type, as in an exported program or a "
            "scripted model, so that embeddings and heads may be taken for matrices. Make the "
            "groups from the model before its export or scripting, or name paths in "
            "overrides of deepopt.param_groups"
        )
    if which := _flattened(routes):
        warn(
            f"{which} take the element-wise path, which is AdamW: FSDP1 (FullyShardedDataParallel) "
            "and ZeRO-3 make flat vectors of matrices. Shard the model by FSDP2, "
            "torch.distributed.fsdp.fully_shard, which keeps their shapes"
        )
    wide = [row for row in routes if row[2].doubt == "wide"]
    odd = [row for row in routes if row[2].doubt == "small"]
    odd += wide if len(wide) > MAX_TABLES else []
    lost = sum(param.numel() for param, _, _ in odd)
    total = lost + sum(p.numel() for p, _, found in routes if found.path != "elementwise")
    if total >= MIN_FLOATS and lost > total / 2:
        shown = [f"{name} {_times(p.shape)} ({found.reason})" for p, name, found in odd]
        warn(
            f"{lost / total:.0%} of the floats in matrices take the element-wise path, which is "
            f"AdamW: {_some(shown)}. deepopt.routing_table shows every parameter's reason; "
            "widen the layers, or name a path in overrides of deepopt.param_groups"
        )


def _flattened(routes: Sequence[tuple[Tensor, str, Route]]) -> str:
    """The subject of a warning about matrices that were flattened to vectors; "" for none."""
    rows = [row for row in routes if row[2].reason != "path of the group"]  # the user chose it
    # torch marks what lies in a flat vector of FSDP1. If the mark is lost, the name can show it.
    flat = [row for row in rows if getattr(row[0], "_fsdp_flattened", False)]
    flat = flat or [row for row in rows if "_fsdp_wrapped_module" in row[1]]
    if flat and all(param.ndim < 2 for param, _, _ in flat):
        return f"{_some([name for _, name, _ in flat])}, of flattened modules,"
    sizes = [param.numel() for param, _, _ in rows]
    if any(param.ndim > 1 for param, _, _ in routes) or max(sizes, default=0) <= MAX_VECTOR:
        return ""
    return "no parameter is a matrix, so that all"


def _some(names: Sequence[str]) -> str:
    first = names[0].strip() or "an unnamed parameter"
    return first + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
