"""Lines of results: one JSON file per workload, one line per run."""

from functools import cache
from pathlib import Path

from benchmarks.quality.training import Line, Run, circumstances
from benchmarks.quality.workload import Unavailable
from benchmarks.runs import Results


def results(folder: Path, of_any_circumstances: bool = False) -> Results[Run]:
    """The lines of a folder.

    Args:
        folder: where the files are.
        of_any_circumstances: all lines count. Otherwise those do that were made with today's data,
            versions and configuration.
    """

    @cache
    def todays(workload: str, contender: str) -> Line | None:
        """The circumstances that a line must have; None where the run is not possible here."""
        try:
            return circumstances(workload, contender)
        except (Unavailable, ValueError, KeyError):  # data, workload or optimizer are not here
            return None

    def counts(run: Run, line: Line) -> bool:
        today = None if of_any_circumstances else todays(run.workload, run.contender)
        return of_any_circumstances or (today is not None and today.items() <= line.items())

    def path_of(run: Run) -> Path:
        return folder / f"{Path(run.workload).stem}.jsonl"

    return Results(sorted(folder.glob("*.jsonl")), Run.of, path_of, counts)
