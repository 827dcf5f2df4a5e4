"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from deepopt._table import padded


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
