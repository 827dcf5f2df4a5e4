"""Many training runs, several at once, each in a process with one thread."""

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

    The first ones start first. A run that fails is reported on stderr, and the others go on.

    Raises:
        RuntimeError: some runs have failed; after all have ended.
    """
    failed = 0
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        for count, future in enumerate(as_completed(futures), 1):
            place, run = f"{count}/{len(runs)}", futures[future]
            if error := future.exception():
                failed += 1
                print(f"{place} {run}: {error}", file=sys.stderr, flush=True)
            else:
                yield place, run, future.result()
    if failed:
        raise RuntimeError(f"{failed} runs failed, see above; the others are kept")
