"""What has changed between two folders of lines, and whether it is noise."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.intervals import SIGNIFICANCE, paired, verdict
from benchmarks.quality.plan import Tuning
from benchmarks.quality.results import results
from benchmarks.quality.tiers import tunings
from benchmarks.quality.training import Lines, Run, value
from benchmarks.quality.tuned import compared, difference
from benchmarks.tables import markdown

CIRCUMSTANCES = ("config", "data", "torch", "python", "package", "deepopt", "cpu")
OUTCOMES = {"win": "better", "loss": "worse", "tie": "noise"}
"""What a verdict on new minus old means."""


def compare(old: Lines, new: Lines, tunings: Sequence[Tuning]) -> str:
    """Tables of the differences, new minus old, paired by seed and corrected for their number.

    Args:
        old, new: the lines.
        tunings: tuned workloads, whose best settings are compared with each other too.
    """
    common = [run for run in old if run in new]
    same = sum(value(old[run]) == value(new[run]) for run in common)
    parts = [
        f"{len(common)} runs are in both, {len(old) - len(common)} in the old folder alone and "
        f"{len(new) - len(common)} in the new one alone. {same} ended with the very same loss. "
        "Differences are new minus old, negative is better. A row is noise if Student's paired "
        "interval at 5 % includes zero, and unclear if it does not but Holm's correction for the "
        "rows of the table leaves it open."
    ]
    if changed := circumstances_changed(old, new, common):
        parts.append("Not the same in all lines of both: " + ", ".join(changed) + ".")
    parts += ["## Equal settings", pooled(common, old, new)]
    parts.append(table(common, common, old, new, of_setting))
    first = {key_of(run): run for run in tuned(tunings, old)}
    second = {key_of(run): run for run in tuned(tunings, new)}
    both = [key for key in first if key in second]
    if both:
        pairs = [first[key] for key in both], [second[key] for key in both]
        parts += ["## Each at its best setting", table(*pairs, old, new, of_optimizer)]
    return "\n\n".join(parts) + "\n"


def pooled(common: Sequence[Run], old: Lines, new: Lines) -> str:
    """A row for every optimizer: all of its settings together, which single ones may leave open."""
    logs: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for run in common:
        before, after = value(old[run]), value(new[run])
        if 0 < before < math.inf and 0 < after < math.inf:
            found = logs.setdefault(run.contender, {}).setdefault(of_setting(run), [])
            found.append(math.log(after / before))
    rows = [["optimizer", "settings", "new / old, geometric mean", ""]]
    for contender, by_setting in logs.items():
        means = [statistics.fmean(found) for found in by_setting.values()]
        x = paired(means, [0.0] * len(means))
        ratio = f"{math.exp(x.mean):.4f}"
        if math.isfinite(x.low):
            ratio += f" [{math.exp(x.low):.4f}, {math.exp(x.high):.4f}]"
        word = OUTCOMES[verdict(x.mean, x.p)]
        rows.append([contender, str(len(means)), ratio, "the same" if not any(means) else word])
    return markdown(rows)


def circumstances_changed(old: Lines, new: Lines, common: Sequence[Run]) -> list[str]:
    return [n for n in CIRCUMSTANCES if any(old[r].get(n) != new[r].get(n) for r in common)]


def tuned(plans: Sequence[Tuning], lines: Lines) -> list[Run]:
    """The seeds' runs of every optimizer at its best setting, where they have lines."""
    every = [run for plan in plans for c in plan.contenders for run in plan.tuned(c, lines)]
    return [run for run in every if run in lines]


def key_of(run: Run) -> tuple[Any, ...]:
    """What stays the same where the best setting changes."""
    return run.workload, run.contender, run.seed, run.steps, run.batch, run.device


def of_setting(run: Run) -> tuple[str, ...]:
    batch = f" x {run.batch} batches" if run.batch > 1 else ""
    return run.workload, run.contender, str(run.setting), f"{run.steps}{batch}"


def of_optimizer(run: Run) -> tuple[str, ...]:
    workload, contender, _, steps = of_setting(run)
    return workload, contender, "its best", steps


def table(
    first: Sequence[Run],
    second: Sequence[Run],
    old: Lines,
    new: Lines,
    name: Callable[[Run], tuple[str, ...]],
) -> str:
    """A row for every name that has runs of at least two seeds; a line on the others."""
    found: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for a, b in zip(first, second, strict=True):
        found.setdefault(name(a), []).append((value(old[a]), value(new[b])))
    several = {key: pairs for key, pairs in found.items() if len(pairs) > 1}
    pairs = {" ".join(k): ([b for _, b in v], [a for a, _ in v]) for k, v in several.items()}
    results = compared(pairs)
    rows = [["workload", "optimizer", "setting", "steps", "seeds", "old", "new", "difference", ""]]
    for key, both in several.items():
        interval, word = results[" ".join(key)]
        means = [f"{statistics.fmean(values):.4f}" for values in zip(*both, strict=True)]
        outcome = OUTCOMES[word]
        if word == "tie" and interval.p < SIGNIFICANCE:
            outcome = "unclear"
        if all(a == b for a, b in both):
            outcome = "the same"
        rows.append([*key, str(len(both)), *means, difference(interval), outcome])
    single = [pairs[0] for pairs in found.values() if len(pairs) == 1]
    moved = sum(a != b for a, b in single)
    note = f"{len(single)} settings have one seed in common, of which {moved} ended otherwise; one "
    note += "seed tells no noise."
    return "\n\n".join(([markdown(rows)] if several else []) + ([note] if single else []))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks quality compare", description=__doc__)
    parser.add_argument("old", type=Path, help="a folder with lines (docs/results/quality)")
    parser.add_argument("new", type=Path, help="another one")
    arguments = parser.parse_args(argv)
    lines = []
    for folder in (arguments.old, arguments.new):
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder; give one that holds WORKLOAD.jsonl files")
        lines.append(results(folder, of_any_circumstances=True).lines)
        if not lines[-1]:
            parser.error(f"{folder}: no line in its .jsonl files; give a folder that has some")
    old, new = lines
    sys.stdout.write(compare(old, new, tunings(old)))
    return 0
