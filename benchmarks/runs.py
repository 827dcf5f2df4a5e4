"""Many training runs and their lines of results.

Several runs go on at once, each on one thread, in a process of its own if need be.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from deepopt.hope.files import write_atomically
from deepopt.hope.report import read_metrics

R = TypeVar("R")
Line = dict[str, Any]


class Results(Generic[R]):
    """Lines of results by run, in JSONL files.

    Only the end of a run that repeats it replaces a line.

    Args:
        paths: the files that there may be.
        run_of: the run of a line.
        path_of: the file of a run.
        counts: whether a line tells what its run would come to today; all others are kept aside.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        run_of: Callable[[Line], R],
        path_of: Callable[[R], Path],
        counts: Callable[[R, Line], bool] = lambda run, line: True,
    ) -> None:
        self.path_of = path_of
        self.lines: dict[R, Line] = {}
        self.aside: dict[R, Line] = {}
        for path in paths:
            for line in read_metrics(path):
                run = run_of(line)
                (self.lines if counts(run, line) else self.aside)[run] = line

    def forget(self, runs: Iterable[R]) -> None:
        """The runs are to be repeated."""
        for run in runs:
            if run in self.lines:
                self.aside[run] = self.lines.pop(run)

    def complete(
        self,
        runs: Iterable[R],
        execute: Callable[[R], Line],
        jobs: int,
        told: Callable[[R, Line], str],
    ) -> None:
        """Execute the runs that have no line, the first ones first; each leaves one when it ends.

        Args:
            runs: in any number, repeated or not.
            execute: returns the line of a run.
            jobs: runs at once.
            told: what is printed of a line.
        """
        missing = [run for run in dict.fromkeys(runs) if run not in self.lines]
        self._rewrite(missing)
        began = time.monotonic()
        try:
            for count, (place, run, line) in enumerate(executed(missing, execute, jobs), 1):
                self.lines[run] = line
                with open(self.path_of(run), "a") as file:
                    file.write(json.dumps(line) + "\n")
                left = (time.monotonic() - began) / count * (len(missing) - count)
                print(f"{place}, {duration(left)} left: {run}: {told(run, line)}", flush=True)
        finally:
            self._rewrite(missing)

    def _rewrite(self, runs: Iterable[R]) -> None:
        """The files of the runs with the last line of each run, without what a kill has torn."""
        for path in {self.path_of(run) for run in runs}:
            kept = [x for run, x in (self.aside | self.lines).items() if self.path_of(run) == path]
            write_atomically(path, "".join(json.dumps(x) + "\n" for x in kept).encode())


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
