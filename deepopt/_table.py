"""Tables of text, whose columns are as wide as their widest cell."""

from collections.abc import Iterable, Sequence


def padded(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """The cells with blanks up to the width of their column."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]


def in_columns(rows: Iterable[Sequence[str]]) -> str:
    """A line for each row, with two blanks between its cells."""
    return "\n".join("  ".join(row).rstrip() for row in padded(rows))
