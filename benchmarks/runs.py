"""Many training runs, several at once, each on one thread, in a process of its own if need be."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

R = TypeVar("R")


def executed(
    runs: Sequence[R], execute: Callable[[R], dict[str, Any]], jobs: int
) -> Iterator[tuple[str, R, dict[str, Any]]]:
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
    runs: Sequence[R], execute: Callable[[R], dict[str, Any]], jobs: int
) -> Iterator[tuple[R, dict[str, Any] | BaseException]]:
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
