"""Type checks of arguments: numbers and flags of another type are refused by name.

This happens before anything compares them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

from torch import Tensor

NUMBERS = (float, int, Tensor)
NONE = type(None)


class Typed(NamedTuple):
    """What an annotation asks of an argument.

    Args:
        types: accepted without a further check.
        kind: "flag", "number" or "numbers".
        default: the argument's default.
    """

    types: frozenset[type]
    kind: str
    default: Any


@functools.cache
def typed(function: Callable[..., Any]) -> dict[str, Typed | None]:
    """The arguments of a function by name; None for those that are neither numbers nor flags.

    String annotations are ignored.
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _read(p.annotation, p.default) for p in parameters}


def _read(annotation: Any, default: Any) -> Typed | None:
    members = _members(annotation)
    rest = [member for member in members if member is not NONE]
    known = {NONE} if len(rest) < len(members) else set()
    if rest == [bool]:
        return Typed(frozenset({bool, *known}), "flag", default)
    if _are_numbers(rest):
        return Typed(frozenset({float, int, *rest, *known}), "number", default)
    if len(rest) == 1 and get_origin(rest[0]) in (tuple, Sequence):
        items = [member for item in get_args(rest[0]) for member in _members(item)]
        if _are_numbers(items):
            return Typed(frozenset(known), "numbers", default)
    return None


def _members(annotation: Any) -> Sequence[Any]:
    """The alternatives of a union."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _are_numbers(members: Sequence[Any]) -> bool:
    return any(m in (float, int) for m in members) and all(m in NUMBERS for m in members)


def check_types(arguments: Mapping[str, Typed | None], given: Mapping[str, Any]) -> None:
    """Raise TypeError for the first argument that is not the number or flag it should be.

    Args:
        arguments: a function's arguments, from :func:`typed`.
        given: values by name; a name that is missing is not checked.
    """
    for name, argument in arguments.items():
        if argument is None or name not in given:
            continue
        value = given[name]
        if type(value) not in argument.types and not _fits(value, argument.kind):
            raise TypeError(f"Invalid {name}: {value!r} {_remedy(argument)}")


def check_fields(instance: Any) -> None:
    """:func:`check_types` for a dataclass, in its ``__post_init__``."""
    check_types(typed(type(instance).__init__), vars(instance))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number, or a tensor of one; a bool is not one."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """Whether ``value`` is an int; a bool is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(value: Any, kind: str) -> bool:
    if kind == "numbers":
        return isinstance(value, tuple | list) and all(map(is_number, value))
    return kind == "number" and is_number(value)


def _remedy(argument: Typed) -> str:
    known, optional = argument.default, NONE in argument.types
    such = "" if known in (None, inspect.Parameter.empty) else f" such as {known}"
    text = {
        "flag": "is not a flag; give True or False",
        "number": f"is not a number; give a number{such}",
        "numbers": f"is not a sequence of numbers; give numbers{such}",
    }[argument.kind]
    return text + (", or None" if optional else "")
