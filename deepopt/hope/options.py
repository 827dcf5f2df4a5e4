"""Options of configurations: docstrings and ``--help`` are made from a text beside each field.

``--help`` cannot be made from the docstring, because ``python -OO`` removes docstrings.
"""

import argparse
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Set
from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type)


def about(
    help: str, note: str = "", default: str = "", type: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """Metadata of a dataclass field that is an option.

    Args:
        help: what the option is, in a few words, without a period.
        note: whole sentences that the docstring has in addition.
        default: what the default, None, stands for.
        type: makes the value from text where the default is None.
    """
    return {"help": help, "note": note, "default": default, "type": type}


def documented(cls: Class) -> Class:
    """Append the texts of a dataclass's fields to its docstring, if Python keeps docstrings."""
    if cls.__doc__:
        lines = [_documentation(field) for field in dataclasses.fields(cls) if field.metadata]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Args:", *lines])
    return cls


def _documentation(field: "dataclasses.Field[Any]") -> str:
    about = field.metadata
    default = f"; None for {about['default']}" if about["default"] else ""
    text = f"{field.name}: {about['help']}{default}. {about['note']}".rstrip()
    return textwrap.fill(text, 96, initial_indent=" " * 4, subsequent_indent=" " * 8)


def add_options(parser: "argparse._ActionsContainer", defaults: Any, leave_out: Set[str]) -> None:
    """Add a command-line option for the fields of a configuration.

    Args:
        parser: a parser or a group of its options.
        defaults: the configuration with the default values.
        leave_out: fields that get no option.
    """
    for field in dataclasses.fields(defaults):
        if field.name not in leave_out:
            default = getattr(defaults, field.name)
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, default=default, **_argument(field.metadata, default))


def _argument(about: Mapping[str, Any], default: Any) -> dict[str, Any]:
    help = about["help"].replace("%", "%%")
    if default is False:
        return {"help": help, "action": "store_true"}
    help += f" ({about['default'] or default})"
    if default is True:
        return {"help": help, "action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"help": help, "nargs": "+", "type": type(default[0])}
    return {"help": help, "type": about["type"] or type(default)}


def command_line(config: Any, leave_out: Set[str]) -> list[str]:
    """The arguments of the command line that `add_options` reads as this configuration.

    Args:
        config: a configuration; its fields that have their defaults give no argument.
        leave_out: fields to omit.
    """
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in leave_out or value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, tuple) else (value,)
            arguments += [flag, *map(str, values)]
    return arguments


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute on this device here."""
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:  # torch without CUDA has an assertion
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: cannot be used here ({reason})") from error
