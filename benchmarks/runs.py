"""Many training runs and their lines of results.

Several runs go on at once, each on one thread, in a process of its own if need be.
"""

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from deepopt._files import read_lines, write_atomically

R = TypeVar("R")
Line = dict[str, Any]


class Results(Generic[R]):
    """Lines of results by run, in JSONL files, which several processes may complete at once.

    A line is replaced only when its run has been repeated to its end.

    Args:
        paths: the files that there may be.
        run_of: the run of a line.
        path_of: the file of a run.
        counts: whether a line's run would come out the same today. A line that does not count is
            left out of ``lines`` but stays in the file.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        run_of: Callable[[Line], R],
        path_of: Callable[[R], Path],
        counts: Callable[[R, Line], bool] = lambda run, line: True,
    ) -> None:
        self.run_of, self.path_of = run_of, path_of
        self.lines: dict[R, Line] = {}
        for path in paths:
            for line in read_lines(path):
                if counts(run := run_of(line), line):
                    self.lines[run] = line

    def forget(self, runs: Iterable[R]) -> None:
        """Repeat these runs when they are next asked for."""
        for run in runs:
            self.lines.pop(run, None)

    def complete(
        self,
        runs: Iterable[R],
        execute: Callable[[R], Line],
        jobs: int,
        describe: Callable[[R, Line], str],
    ) -> None:
        """Execute the runs that have no line, the first ones first; each leaves one when it ends.

        Args:
            runs: the runs that should have lines; some may have one, or be named twice.
            execute: makes the line of a run.
            jobs: number of runs at once.
            describe: the text to print about a line.

        Raises:
            RuntimeError: some runs have failed; after all have ended.
        """
        missing = [run for run in dict.fromkeys(runs) if run not in self.lines]
        began = time.monotonic()
        for count, (place, run, line) in enumerate(executed(missing, execute, jobs), 1):
            self._write(run, line)
            left = (time.monotonic() - began) / count * (len(missing) - count)
            print(f"{place}, {duration(left)} left: {run}: {describe(run, line)}", flush=True)

    def _write(self, run: R, line: Line) -> None:
        """Put the line into the file of the run, in place of the run's earlier one."""
        keep(self.path_of(run), [line], self.run_of)
        self.lines[run] = line


def keep(path: Path, lines: Sequence[Line], run_of: Callable[[Line], Any]) -> None:
    """Put lines into a file, each in place of an earlier one of the same run.

    The file is read again: another process may have added lines, or a kill have torn the last.
    """
    with locked(path.parent):
        kept = {run_of(line): line for line in [*read_lines(path), *lines]}
        write_atomically(path, "".join(json.dumps(x) + "\n" for x in kept.values()).encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder that they lock, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def executed(
    runs: Sequence[R], execute: Callable[[R], Line], jobs: int
) -> Iterator[tuple[str, R, Line]]:
    """Every run as it ends, with its place ("3/12") and what ``execute`` returned for it.

    The first ones start first. A run that fails is reported on stderr, and the others go on. With
    one job they run in this process.

    Raises:
        RuntimeError: some runs have failed; after all have ended.
    """
    failed = 0
    for count, (run, outcome) in enumerate(_ended(runs, execute, jobs), 1):
        place = f"{count}/{len(runs)}"
        if isinstance(outcome, BaseException):
            failed += 1
            print(f"{place} {run}: {outcome}", file=sys.stderr, flush=True)
        else:
            yield place, run, outcome
    if failed:
        raise RuntimeError(f"{failed} runs failed, see above; the others are kept")


def _ended(
    runs: Sequence[R], execute: Callable[[R], Line], jobs: int
) -> Iterator[tuple[R, Line | BaseException]]:
    """Every run with its outcome or its error."""
    if jobs == 1:
        torch.set_num_threads(1)
        for run in runs:
            try:
                yield run, execute(run)
            except Exception as error:
                yield run, error
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.exception() or future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # once interrupted, it starts no more
