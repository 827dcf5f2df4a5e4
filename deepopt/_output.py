"""Standard output and error of a command whose reader may leave early, as in ``| head -1``."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

NOBODY_READS = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that is gone


class _Silenced:
    """A stream that goes silent where another would raise because nobody reads it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., object], *args: str) -> None:
        try:
            function(*args)
        except OSError as error:
            if error.errno not in NOBODY_READS:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what is still in the buffer
            os.close(nowhere)


def outlive_readers() -> None:
    """Let a command finish its work after the reader of its output has gone."""
    sys.stdout, sys.stderr = (stream and _Silenced(stream) for stream in (sys.stdout, sys.stderr))
