"""Hope beside a Transformer++ and a gated DeltaNet.

Bytes, formal languages and recall show what the layer can do. Learning while it reads, continual
learning, digits, passkeys and the six tasks of MAD show what the model is for.

Every model has the same parameters, data and optimizer. Learning rates are swept with one seed, and
further seeds run at each model's best; then parts of Hope's layer are changed one by one, on bytes,
languages and recall, and the default run is repeated with every optimizer. Every finished run is a
line of ``hope/TASK.jsonl``, with everything that its outcome depends on except the code. A run that
has a line is not repeated, so that an interrupted benchmark goes on; ``--fresh`` repeats it, for
when its code has changed. ``hope.md`` is made from the lines alone; ``--report`` writes it again
and runs nothing.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.hope.models import ABLATIONS, NAMES
from benchmarks.hope.plan import ABLATED, MODELS, RATES, Plan
from benchmarks.hope.report import cell, report
from benchmarks.hope.training import TASKS, Line, Run, execute, setting
from benchmarks.runs import Results

PARTS = ("models", "ablations", "optimizers")


def results(folder: Path, of_any_setting: bool = False) -> Results[Run]:
    """The lines of a folder, one file per task; those count that were made in today's setting.

    Args:
        folder: where the files are.
        of_any_setting: all lines count.
    """
    names = [field.name for field in dataclasses.fields(Run)]

    def run_of(line: Line) -> Run:
        return Run(**{name: line[name] for name in names})

    def path_of(run: Run) -> Path:
        return folder / f"{run.task}.jsonl"

    def counts(run: Run, line: Line) -> bool:
        return of_any_setting or (run.model in NAMES and setting(run).items() <= line.items())

    return Results([folder / f"{task}.jsonl" for task in TASKS], run_of, path_of, counts)


def deciding(arguments: argparse.Namespace) -> list[str]:
    """The options that decide what the page shows: it has all tasks and models, run or not."""
    options: list[str] = []
    if tuple(arguments.rates) != RATES:
        options += ["--rates", *(f"{lr:g}" for lr in arguments.rates)]
    for name, default in (("seeds", Plan.seeds), ("steps", Plan.steps)):
        if getattr(arguments, name) != default:
            options += [f"--{name}", str(getattr(arguments, name))]
    return options


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks hope", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(all)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    parser.add_argument("--ablations", nargs="+", choices=ABLATIONS, default=list(ABLATIONS),
                        metavar="PART", help="parts of the layer to change (all)")  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, default=RATES,
                        help=f"learning rates, on AdamW's scale {RATES}")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best rate (3)")
    parser.add_argument("--steps", type=int, help="optimizer steps (each task's own)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (all cores)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="repeat the runs that have a line")
    again.add_argument("--report", action="store_true", help="write the page, run nothing")
    return parser


def main(argv: Sequence[str]) -> int:
    parser = argument_parser()
    arguments = parser.parse_args(argv)
    for name in ("seeds", "steps", "jobs"):
        if (count := getattr(arguments, name)) is not None and count < 1:
            parser.error(f"--{name} {count}: must be at least 1")
    if wrong := [lr for lr in arguments.rates if not 0 < lr < math.inf]:
        parser.error(f"--rates {wrong[0]:g}: must be positive and finite")
    if arguments.parts == ["ablations"] and not set(arguments.tasks) & set(ABLATED):
        parser.error(
            f"--tasks {' '.join(arguments.tasks)}: parts of the layer are changed on "
            f"{', '.join(ABLATED)}; give one of these"
        )

    tasks, compared = arguments.tasks, arguments.models
    if not arguments.report:
        for task in tasks:
            if why := TASKS[task].unavailable:
                print(f"skipped: {task}: {why}", file=sys.stderr)
        tasks = [task for task in tasks if not TASKS[task].unavailable]
    plan = Plan(rates=arguments.rates, seeds=arguments.seeds, steps=arguments.steps)
    folder = arguments.out / "hope"
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        found = results(folder)
        repeated: set[Run] = set()

        def complete(runs: Sequence[Run]) -> None:
            if arguments.fresh:
                found.forget(set(runs) - repeated)
                repeated.update(runs)
            found.complete(runs, execute, arguments.jobs, lambda run, _: cell(run, found.lines))

        if "models" in arguments.parts:
            pairs = [(task, model) for task in tasks for model in compared]
            complete([plan.run(*pair, lr) for lr in plan.rates for pair in pairs])
            best = [plan.best(*pair, found.lines) for pair in pairs]
            complete([run for first in best if first for run in plan.repeats(first)])
        if "ablations" in arguments.parts:
            complete(plan.ablations(tasks, arguments.ablations, found.lines))
        if "optimizers" in arguments.parts:
            complete(plan.optimizers())
    lines = results(folder, of_any_setting=True).lines
    if not lines:
        parser.error(f"--report: there is no line in {folder} yet; run without it first")
    page = report(plan, lines, " ".join(["python -m benchmarks hope", *deciding(arguments)]))
    (arguments.out / "hope.md").write_text(page)
    print(f"written: {arguments.out / 'hope.md'}", file=sys.stderr)
    return 0
