"""Quality: every optimizer on many small workloads, swapped and tuned.

``--tier swap`` puts other optimizers in AdamW's place, at AdamW's best of five rates, on Hope and
on a Transformer. ``rates`` runs AdamW and DeepMomentum at the same three rates on small workloads:
with its default memory, with another, with shares of the momentum itself, and with each part of the
default left out; ``long`` does so for four times the steps, on what can be learned by heart.
``standard`` tunes every optimizer with the same search before it compares; ``full`` does so for
more optimizers, with more trials and seeds, and also for four times the steps and for four batches
in a step; ``gpu`` is ``full`` with four times the steps and sixteen batches in a step, on the
machine's accelerator; ``smoke`` is a tuned comparison in miniature. ``locked`` is ``standard`` on
the workloads that no choice may depend on; it is run once, when all else is decided, and no other
tier takes them. Every finished run is a line of ``quality/WORKLOAD.jsonl``, with hashes of its data
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
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quality import compare, pictures
from benchmarks.quality.contenders import (
    ABLATIONS,
    CONTENDERS,
    MAIN,
    MEMORIES,
    PARTS,
    package,
)
from benchmarks.quality.plan import PAIR, Plan, Rates, Swap, Tuning
from benchmarks.quality.report import page, shown
from benchmarks.quality.results import results
from benchmarks.quality.training import Line, Lines, Run, execute, value
from benchmarks.quality.tuned import groups, picture_files
from benchmarks.quality.workload import Unavailable, built_in, find
from benchmarks.quality.workloads import LOCKED
from benchmarks.runs import Results
from deepopt.hope.files import write_atomically

SHARES = ("DeepMomentum, delta, share 0.15", "DeepMomentum, delta, share 0.3")
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


@dataclass(frozen=True)
class Tier:
    """What is run by default: the plans of a workload with its contenders."""

    plans: Callable[[str, Sequence[str]], Sequence[Plan]]
    workloads: tuple[str, ...]
    contenders: tuple[str, ...]


def thorough(
    workload: str, contenders: Sequence[str], steps: int = 1, batch: int = 1, device: str = "cpu"
) -> list[Plan]:
    """Twelve trials and ten seeds: at T steps, at 4 T, and at T with batches of four times as much.

    Args:
        workload: its name.
        contenders: names.
        steps: T in units of the workload's own.
        batch: batches of the workload in a step.
        device: where the models are.
    """

    def plan(longer: int, larger: int) -> Tuning:
        count = steps * longer * find(workload).steps if steps * longer > 1 else None
        return Tuning(workload, contenders, 12, 10, count, batch * larger, device)

    return [plan(1, 1), plan(4, 1), plan(1, 4)]


def accelerator() -> str | None:
    """The machine's device beside its CPU, if torch has one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


TIERS: dict[str, Tier] = {
    "smoke": Tier(lambda w, c: [Tuning(w, c, 1, 2, 40)], ("lm_code",), PAIR),
    "swap": Tier(
        lambda w, c: [Swap(w, c)], ("swap_hope", "swap_transformer"), ("AdamW", "Muon", *MEMORIES)
    ),
    "rates": Tier(
        lambda w, c: [Rates(w, c)],
        SMALL,
        (*PAIR, "DeepMomentum, covariance", *SHARES, *PARTS.values()),
    ),
    "long": Tier(
        lambda w, c: [Rates(w, c, seeds=5, steps=4 * find(w).steps)],
        ("friedman", "breast_cancer"),
        PAIR,
    ),
    "standard": Tier(
        lambda w, c: [Tuning(w, c)],
        ("lm_code", "lm_text", "mnist_vit", "recall", "hope_code", "digits_mlp"),
        MAIN,
    ),
    "locked": Tier(lambda w, c: [Tuning(w, c)], LOCKED, MAIN),
    "full": Tier(
        thorough, ("lm_code", *SMALL, *MORE), tuple(c for c in CONTENDERS if c not in ABLATIONS)
    ),
    "gpu": Tier(
        lambda w, c: thorough(w, c, 4, 16, accelerator() or "cuda"),
        ("lm_code", "llama", "mnist_vit"),
        MAIN,
    ),
}


def plans(
    tier: str, workloads: Sequence[str] | None, optimizers: Sequence[str] | None
) -> list[Plan]:
    chosen = TIERS[tier]
    contenders = tuple(dict.fromkeys(["AdamW", *(optimizers or chosen.contenders)]))
    names = workloads or chosen.workloads
    return [plan for name in names for plan in chosen.plans(name, contenders)]


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


def with_all_tiers(asked: Sequence[Plan], lines: Lines) -> list[Plan]:
    """The plans of the page: what was asked for, and everything else that has lines."""

    def key(plan: Plan) -> Plan:
        own = dataclasses.replace(plan, contenders=(), seeds=0)
        return dataclasses.replace(own, trials=0) if isinstance(own, Tuning) else own

    every = [plan for tier in TIERS if tier != "smoke" for plan in plans(tier, None, None)]
    found: dict[Plan, Plan] = {}
    for plan in every:
        found.setdefault(key(plan), plan)
    found |= {key(plan): plan for plan in asked}
    return [with_lines(p, lines) if isinstance(p, Tuning) else p for p in found.values()]


def with_lines(plan: Tuning, lines: Lines) -> Tuning:
    """The plan with its optimizers of the standard tier and all others that have begun."""
    known = dict.fromkeys([*plan.contenders, *CONTENDERS])
    own = {*MAIN} & {*plan.contenders}
    begun = [c for c in known if c in own or lines.keys() & plan.trials_of(c, lines)]
    return dataclasses.replace(plan, contenders=tuple(begun))


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


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:], tunings)
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
    parser.add_argument("--jobs", type=int, help="runs at once (all cores; 1 for gpu)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="repeat the runs that have a line")
    again.add_argument("--report", action="store_true", help="write page and plots, run nothing")
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
    return 0


def tunings(lines: Lines) -> list[Tuning]:
    """The tuned workloads that have lines."""
    every = with_all_tiers([], lines)
    return [plan for plan in every if isinstance(plan, Tuning) and shown(plan, lines)]
