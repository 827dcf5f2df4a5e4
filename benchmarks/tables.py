"""Tables in Markdown."""

import math
from collections.abc import Iterable, Sequence

from deepopt._table import padded

NOT_RUN = "not run"
"""The cell of what has no measurement."""


def markdown(rows: Iterable[Sequence[str]], aligned: bool = False) -> str:
    """A table whose first row is its head.

    Args:
        rows: the cells.
        aligned: pad the cells, so that a terminal shows the table in columns too.
    """
    table = padded(rows) if aligned else list(rows)
    lines = ["| " + " | ".join(row) + " |" for row in table]
    if aligned:
        rule = "|" + "".join("-" * (len(cell) + 2) + "|" for cell in table[0])
    else:
        rule = "|" + " --- |" * len(table[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def judged(found: float, limit: float, at_least: bool, form: str) -> list[str]:
    """The last cells of a goal's row: what was measured, its bound, and whether it is met.

    Args:
        found: the measured value; NaN if there is none.
        limit: the bound.
        at_least: whether the bound is a lower one, or else an upper one.
        form: how the measured value is written, such as ".4f".
    """
    bound = f"{'>=' if at_least else '<='} {limit:g}"
    if math.isnan(found):
        return [NOT_RUN, bound, NOT_RUN]
    met = found >= limit if at_least else found <= limit
    return [format(found, form), bound, "met" if met else "NOT met"]
