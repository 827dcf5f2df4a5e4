"""Lines of results: one JSON file per workload, one line per run."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.training import Line, Run, circumstances, execute, value
from benchmarks.quality.workload import Unavailable
from benchmarks.runs import executed
from deepopt.hope.files import write_atomically
from deepopt.hope.report import read_metrics


class Results:
    """The lines of a folder, by run.

    Args:
        folder: where the files are.
        of_any_circumstances: take all lines. Otherwise those count that were made with today's
            data, versions and configuration, and the others are kept aside until their run is
            repeated.
    """

    def __init__(self, folder: Path, of_any_circumstances: bool = False) -> None:
        self.folder = folder
        self.lines: dict[Run, Line] = {}
        self.aside: dict[Run, Line] = {}
        known: dict[tuple[str, str], Line | None] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in read_metrics(path):
                run = Run.of(line)
                if not of_any_circumstances:
                    key = (run.workload, run.contender)
                    if key not in known:
                        known[key] = todays(run)
                    today = known[key]
                    if today is None or not today.items() <= line.items():
                        self.aside[run] = line
                        continue
                self.lines[run] = line

    def forget(self, runs: Sequence[Run]) -> None:
        """The runs have no line that counts; their old lines stay until they have new ones."""
        for run in runs:
            self.aside[run] = self.lines.pop(run)

    def complete(self, missing: Sequence[Run], jobs: int) -> None:
        """Execute the runs, the first ones first; each leaves its line when it ends."""
        for workload in {run.workload for run in missing}:
            self._rewrite(workload, set(missing))
        began = time.monotonic()
        for count, (place, run, line) in enumerate(executed(missing, execute, jobs), 1):
            self.lines[run] = line
            with open(self._path(run.workload), "a") as file:
                file.write(json.dumps(line) + "\n")
            left = (time.monotonic() - began) / count * (len(missing) - count)
            outcome = line.get("refused") or line.get("diverged") or f"{value(line):.4f}"
            print(f"{place}, {duration(left)} left: {run}: {outcome}", flush=True)

    def _rewrite(self, workload: str, repeated: set[Run]) -> None:
        """The file without what a kill has torn, and without the runs to be repeated."""
        kept = self.aside | self.lines
        text = "".join(
            json.dumps(line) + "\n"
            for run, line in kept.items()
            if run.workload == workload and run not in repeated
        )
        write_atomically(self._path(workload), text.encode())

    def _path(self, workload: str) -> Path:
        return self.folder / f"{Path(workload).stem}.jsonl"


def todays(run: Run) -> Line | None:
    """The circumstances that a line must have to count; None where the run is not possible here."""
    try:
        return circumstances(run)
    except (Unavailable, ValueError, KeyError):  # data, workload or optimizer are not here
        return None


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
