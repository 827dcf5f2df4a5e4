"""Quality: every optimizer on many small workloads, swapped and tuned.

``--tier swap`` puts other optimizers in AdamW's place, at AdamW's best of five rates, on Hope and
on a Transformer. ``rates`` runs AdamW and DeepMomentum at the same three rates on small workloads;
DeepMomentum also with the delta memory, with two values of ``momentum_share``, and without
each part of its default. ``long`` runs AdamW and the default for four times the steps on two
tables, which can be learned by heart. ``standard`` tunes every optimizer by one search, then
compares. ``full`` adds optimizers, workloads, trials and seeds, and repeats the comparison at four
times the steps and at four batches per step. ``gpu`` does the same on the accelerator with the
standard optimizers on three workloads, whose own size is there four times the steps and sixteen
batches per step. ``smoke`` is a tuned comparison in miniature. ``locked`` is ``standard`` on the
workloads that no choice may depend on. It is run once, when all else is decided, and no other tier
has them.

Every finished run is a line of ``quality/WORKLOAD.jsonl``, with hashes of its data
and its configuration; a run that has a line is not repeated, so that an interrupted benchmark goes
on. ``quality.md`` and the plots come from the lines alone; ``--report`` runs nothing else.
``compare OLD NEW`` tells what differs between two folders of lines, and whether it is noise.
"""

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.quality import compare, pictures
from benchmarks.quality.contenders import CONTENDERS, package
from benchmarks.quality.plan import Plan, Swap, Tuning
from benchmarks.quality.report import page, shown
from benchmarks.quality.results import results
from benchmarks.quality.tiers import TIERS, accelerator, plans, with_all_tiers
from benchmarks.quality.training import Line, Lines, Run, execute, value
from benchmarks.quality.tuned import groups, picture_files
from benchmarks.quality.workload import Unavailable, built_in, find
from benchmarks.quality.workloads import LOCKED
from benchmarks.runs import Results
from deepopt._files import write_atomically


def available(every: Sequence[Plan]) -> tuple[list[Plan], dict[str, str]]:
    """The plans without what is missing here, and why workloads and optimizers are skipped."""
    found: list[Plan] = []
    skipped: dict[str, str] = {}

    def has(name: str, look: Callable[[], object]) -> bool:
        try:
            look()
        except Unavailable as reason:
            skipped[name] = str(reason)
            return False
        return True

    for plan in every:
        if has(plan.workload, find(plan.workload).sha256):
            here = [c for c in plan.contenders if has(c, lambda c=c: package(c))]  # type: ignore[misc]
            found.append(dataclasses.replace(plan, contenders=tuple(here)))
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)
    return found, skipped


def complete(found: Results[Run], every: Sequence[Plan], jobs: int, fresh: bool) -> None:
    """Run what the plans lack, stage by stage."""
    if fresh:
        ours = {plan.workload for plan in every}
        found.forget([run for run in found.lines if run.workload in ours])
    while missing := [run for plan in every for run in plan.next(found.lines)]:
        found.complete(missing, execute, jobs, outcome)


def outcome(run: Run, line: Line) -> str:
    return line.get("refused") or line.get("diverged") or f"{value(line):.4f}"


def write(every: Sequence[Plan], lines: Lines, folder: Path, text: str) -> None:
    """The page, and all of its plots."""
    (folder.parent / "quality.md").write_text(text)
    chosen = [plan for plan in every if shown(plan, lines)]
    tuned = [plan for plan in chosen if isinstance(plan, Tuning)]
    images = {folder / plan.picture: pictures.tuned_picture(plan, lines) for plan in tuned}
    for path, group in picture_files(groups(tuned, lines), folder).items():
        profiles = {unit: group.profiles(unit) for unit in ("steps", "seconds")}
        if all(profiles.values()):
            images[path] = pictures.profile_picture(profiles)
    if swaps := [plan for plan in chosen if isinstance(plan, Swap)]:
        images[folder / "swap.png"] = pictures.swap_picture(swaps, lines)
    for path, image in images.items():
        write_atomically(path, image)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks quality", description=__doc__)
    parser.add_argument("--tier", choices=TIERS, default="standard",
                        help="how much (standard); on two cores smoke takes two minutes, "
                        "standard three to five hours, full days")  # fmt: skip
    parser.add_argument("--workloads", nargs="+", metavar="NAME",
                        help="names or paths of .py files (those of the tier); there are "
                        + ", ".join(built_in()))  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", metavar="NAME",
                        help="beside AdamW (those of the tier); there are "
                        + "; ".join(CONTENDERS))  # fmt: skip
    parser.add_argument("--out", type=Path,
                        help="(docs/results; runs/quality for smoke)")  # fmt: skip
    parser.add_argument("--jobs", type=int, help="runs at once (all cores; 1 for gpu)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="repeat the runs that have a line")
    again.add_argument("--report", action="store_true", help="write page and plots, run nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    gpu = arguments.tier == "gpu"
    jobs = (1 if gpu else os.cpu_count() or 1) if arguments.jobs is None else arguments.jobs
    if jobs < 1:
        parser.error(f"--jobs {jobs}: must be at least 1")
    if gpu and not arguments.report and accelerator() is None:
        parser.error(
            f"--tier gpu: torch {torch.__version__} finds no accelerator on this machine; use "
            "--tier full, which compares the same on the CPU"
        )
    for name in arguments.optimizers or ():
        if name not in CONTENDERS:
            parser.error(f"--optimizers {name!r}: choose from {'; '.join(CONTENDERS)}")
    for name in arguments.workloads or ():
        try:
            find(name)
        except ValueError as error:
            parser.error(f"--workloads: {error}")
        if (name in LOCKED) != (arguments.tier == "locked"):
            parser.error(
                f"--workloads {name}: tier locked has {', '.join(LOCKED)}, on which no choice may "
                "depend, and no other tier has them"
            )

    smoke = arguments.tier == "smoke"
    out = arguments.out or Path("runs/quality" if smoke else "docs/results")
    folder = out / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    asked = plans(arguments.tier, arguments.workloads, arguments.optimizers)
    skipped: dict[str, str] = {}
    try:
        if not arguments.report:
            asked, skipped = available(asked)
            complete(results(folder), asked, jobs, arguments.fresh)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    lines = results(folder, of_any_circumstances=True).lines
    if not lines and skipped:
        parser.error(f"nothing could run here: {'; '.join(skipped.values())}")
    if not lines:
        parser.error(f"--report: there is no line in {folder} yet; run without it first")
    every = asked if smoke else with_all_tiers(asked, lines)
    words = ["python -m benchmarks quality --report"]
    words += ["--tier", arguments.tier] if arguments.tier in ("smoke", "full", "gpu") else []
    for name in ("workloads", "optimizers"):
        words += [f"--{name}", *map(shlex.quote, given)] if (given := vars(arguments)[name]) else []
    words += ["--out", shlex.quote(str(arguments.out))] if arguments.out else []
    command = " ".join(words)
    write(every, lines, folder, page(every, lines, command, skipped))
    print(f"written: {out / 'quality.md'}", file=sys.stderr)
    broken = not_improved(asked, lines) if smoke else []
    for text in broken:
        print(f"smoke: {text}", file=sys.stderr)
    return 1 if broken else 0


def not_improved(every: Sequence[Plan], lines: Lines) -> list[str]:
    """The optimizers and runs that did not lower their training loss; empty if all did."""
    found = []
    for plan in (plan for plan in every if isinstance(plan, Tuning)):
        for contender in plan.contenders:
            runs = [*plan.tuned(contender, lines), *plan.swapped(contender, lines)]
            if not runs:
                found.append(f"{plan.workload}, {contender}: no setting ended well")
            for run in dict.fromkeys(runs):
                curve = lines[run].get("curve", [0.0])
                if not curve[-1] < curve[0]:
                    found.append(f"{run}: {lines[run].get('diverged', 'the loss did not fall')}")
    return found
