"""Files that are written as a whole, and lines of JSON."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file does not hold what this package wrote into it; the message says where."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the content of ``path`` as a whole; if anything goes wrong, the old content stays."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file of JSON lines, without a last one that was cut off in writing.

    A file that does not exist has none.

    Raises:
        DamagedFile: another line is not JSON.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise DamagedFile(
                f"{path}, line {number} is not JSON ({error}): mend the line or remove it"
            ) from error
        yield found
