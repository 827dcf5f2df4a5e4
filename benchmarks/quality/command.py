"""Quality: every optimizer on many small workloads, swapped and tuned.

``--tier swaps`` puts another optimizer in AdamW's place at the very same three rates, ``long`` for
four times the steps on what can be learned by heart. ``standard`` and ``full`` tune every optimizer
with the same search before they compare; ``smoke`` does so in miniature. Every finished run is a
line of ``quality/WORKLOAD.jsonl``, with hashes of its data and its configuration; a run that has a
line is not repeated, so that an interrupted benchmark goes on. ``quality.md`` and the plots come
from the lines alone; ``--report`` runs nothing else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.contenders import CONTENDERS, DEFAULT
from benchmarks.quality.pictures import picture
from benchmarks.quality.plan import SWAPPED, Plan, Swaps, Tuning
from benchmarks.quality.report import page, shown
from benchmarks.quality.results import Results
from benchmarks.quality.workload import Unavailable, built_in, find
from deepopt.hope.checkpoint import write_atomically

MAIN = ("AdamW", "Muon", "NorMuon", "DeepMomentum, linear", DEFAULT, "DeepMomentum, covariance")


@dataclass(frozen=True)
class Tier:
    """How much is run by default."""

    plan: Callable[[str, Sequence[str]], Plan]
    workloads: tuple[str, ...]
    contenders: tuple[str, ...]


SMALL = (
    "digits_mlp",
    "mnist_cnn",
    "mnist_vit",
    "llama",
    "llama_tuned",
    "lora",
    "lstm",
    "breast_cancer",
    "friedman",
)
MORE = (
    "lm_text",
    "recall",
    "hope_code",
    "mnist_resnet",
    "permuted_digits",
    "lm_aba",
    "quadratic",
)
TIERS: dict[str, Tier] = {
    "smoke": Tier(
        lambda w, c: Tuning(w, c, trials=1, seeds=2, steps=40), ("lm_code",), ("AdamW", DEFAULT)
    ),
    "swaps": Tier(Swaps, SMALL, SWAPPED),
    "long": Tier(
        lambda w, c: Swaps(w, c, seeds=5, steps=4 * find(w).steps),
        ("friedman", "breast_cancer"),
        ("AdamW", DEFAULT),
    ),
    "standard": Tier(
        Tuning, ("lm_code", "lm_text", "mnist_vit", "recall", "hope_code", "digits_mlp"), MAIN
    ),
    "full": Tier(
        lambda w, c: Tuning(w, c, trials=12, seeds=10, steps=4 * find(w).steps),
        ("lm_code", *SMALL, *MORE),
        tuple(CONTENDERS),
    ),
}


def plans(
    tier: str, workloads: Sequence[str] | None, optimizers: Sequence[str] | None
) -> list[Plan]:
    chosen = TIERS[tier]
    contenders = list(dict.fromkeys(["AdamW", *(optimizers or chosen.contenders)]))
    return [chosen.plan(name, contenders) for name in workloads or chosen.workloads]


def available(every: Sequence[Plan]) -> tuple[list[Plan], dict[str, str]]:
    """The plans whose data is here, and why the others are skipped."""
    found, skipped = [], {}
    for plan in every:
        try:
            find(plan.workload).sha256()
            found.append(plan)
        except Unavailable as reason:
            skipped[plan.workload] = str(reason)
            print(f"skipped: {plan.workload}: {reason}", file=sys.stderr)
    return found, skipped


def complete(results: Results, every: Sequence[Plan], jobs: int, fresh: bool) -> None:
    """Run what the plans lack, stage by stage."""
    if fresh:
        ours = {plan.workload for plan in every}
        results.forget([run for run in results.lines if run.workload in ours])
    while missing := [run for plan in every for run in plan.next(results.lines)]:
        results.complete(missing, jobs)


def with_all_tiers(asked: Sequence[Plan]) -> list[Plan]:
    """The plans of the page: what was asked for, and all else that there may be lines of."""
    found = {(type(plan), plan.workload, plan.steps): plan for plan in asked}
    for tier in ("swaps", "long", "standard"):
        for plan in plans(tier, None, None):
            found.setdefault((type(plan), plan.workload, plan.steps), plan)
    return list(found.values())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks quality", description=__doc__)
    parser.add_argument("--tier", choices=TIERS, default="standard", help="how much (standard)")
    parser.add_argument("--workloads", nargs="+", metavar="NAME",
                        help="names or paths of .py files (those of the tier); there are "
                        + ", ".join(built_in()))  # fmt: skip
    parser.add_argument("--optimizers", nargs="+", metavar="NAME",
                        help="beside AdamW (those of the tier); there are "
                        + "; ".join(CONTENDERS))  # fmt: skip
    parser.add_argument("--out", type=Path,
                        help="(docs/results; runs/quality for smoke)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (all cores)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="repeat the runs that have a line")
    again.add_argument("--report", action="store_true", help="write page and plots, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: must be at least 1")
    for name in arguments.optimizers or ():
        if name not in CONTENDERS:
            parser.error(f"--optimizers {name!r}: choose from {'; '.join(CONTENDERS)}")
    for name in arguments.workloads or ():
        try:
            find(name)
        except ValueError as error:
            parser.error(f"--workloads: {error}")

    smoke = arguments.tier == "smoke"
    out = arguments.out or Path("runs/quality" if smoke else "docs/results")
    folder = out / "quality"
    folder.mkdir(parents=True, exist_ok=True)
    asked = plans(arguments.tier, arguments.workloads, arguments.optimizers)
    skipped: dict[str, str] = {}
    try:
        if not arguments.report:
            asked, skipped = available(asked)
            complete(Results(folder), asked, arguments.jobs, arguments.fresh)
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    results = Results(folder, of_any_circumstances=True)
    if not results.lines:
        parser.error(f"--report: there is no line in {folder} yet; run without it first")
    every = asked if smoke else with_all_tiers(asked)
    command = "python -m benchmarks quality --report" + (" --tier smoke" if smoke else "")
    (out / "quality.md").write_text(page(every, results.lines, command, skipped))
    for plan in every:
        if isinstance(plan, Tuning) and shown(plan, results.lines):
            image = picture(plan, results.lines)
            write_atomically(folder / f"{Path(plan.workload).stem}.png", image)
    print(f"written: {out / 'quality.md'}", file=sys.stderr)
    return 0
