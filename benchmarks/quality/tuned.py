"""What lines say of optimizers that were tuned: statistics, and the page's section about them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.quality.contenders import CONTENDERS, RIVALS, Contender
from benchmarks.quality.intervals import (
    FARTHEST,
    RESAMPLES,
    Ended,
    Interval,
    bootstrap,
    holm,
    paired,
    profile,
    profile_score,
    share_to_target,
    verdict,
)
from benchmarks.quality.plan import (
    AUX,
    BETAS,
    BUDGET_SEEDS,
    BUDGETS,
    FINALISTS,
    HIGHEST,
    LADDERS,
    LONGER,
    LOWEST,
    NEARBY,
    PASSES,
    WEIGHT_DECAYS,
    Tuning,
    least_mean,
)
from benchmarks.quality.training import CURVE_POINTS, Line, Lines, Run, value
from benchmarks.quality.workload import find
from benchmarks.tables import markdown

MISSING = "not run"
NEAR_BEST = 1.01


def losses(runs: Sequence[Run], lines: Lines) -> list[float] | None:
    """The losses of all the runs; None while one is missing."""
    if not runs or any(run not in lines for run in runs):
        return None
    return [value(lines[run]) for run in runs]


def compared(
    pairs: Mapping[str, tuple[list[float] | None, list[float] | None]],
) -> dict[str, tuple[Interval, str]]:
    """Paired differences, first minus second, with verdicts that are corrected for their number."""
    found = {name: paired(a, b) for name, (a, b) in pairs.items() if a and b}
    corrected = holm({name: interval.p for name, interval in found.items()})
    return {n: (interval, verdict(interval.mean, corrected[n])) for n, interval in found.items()}


def difference(x: Interval) -> str:
    if math.isinf(x.low):
        return f"{x.mean:+.4f}"
    return f"{x.mean:+.4f} [{x.low:+.4f}, {x.high:+.4f}]"


class Group:
    """Tuned workloads that take the same multiple of their own steps and of their own batch.

    Args:
        plans: the workloads.
        lines: lines of results.
    """

    def __init__(self, plans: Sequence[Tuning], lines: Lines) -> None:
        self.plans = plans
        self.lines = lines
        self.contenders = list(dict.fromkeys(c for plan in plans for c in plan.contenders))
        self._tuned: dict[tuple[Tuning, str], list[Run]] = {}
        self._ended: dict[tuple[Tuning, str, str], Ended | None] = {}
        self._ratios: dict[tuple[tuple[Tuning, ...], str, str], Interval | None] = {}
        self._of_workload: dict[Tuning, Lines] = {}

    @staticmethod
    def key(plan: Tuning) -> tuple[float, int, str]:
        """Steps in units of the workload's, batches in a step, and the device."""
        return plan.final_steps / find(plan.workload).steps, plan.batch, plan.device

    def tuned(self, plan: Tuning, contender: str) -> list[Run]:
        """Every seed at the optimizer's best setting, looked up once, because that takes long."""
        key = (plan, contender)
        if key not in self._tuned:
            self._tuned[key] = plan.tuned(contender, self.lines)
        return self._tuned[key]

    def losses(self, plan: Tuning, contender: str) -> list[float] | None:
        """The losses of every seed at the optimizer's best setting; None while one is missing."""
        return losses(self.tuned(plan, contender), self.lines)

    def ended(self, plan: Tuning, contender: str, rival: str) -> Ended | None:
        """What D_eff is made from; None while a run is missing, or where one ended badly."""
        key = (plan, contender, rival)
        if key not in self._ended:
            self._ended[key] = self._found(*key)
        return self._ended[key]

    def _found(self, plan: Tuning, contender: str, rival: str) -> Ended | None:
        if contender == rival or not {contender, rival} <= set(plan.contenders):
            return None
        own, tuned = self.losses(plan, contender), self.tuned(plan, rival)
        others = plan.budgets(tuned)
        ahead = least_mean((self.tuned(plan, c) for c in plan.contenders if c != rival), self.lines)
        for budget in plan.longer(tuned, ahead, self.lines):
            reached = losses(budget, self.lines)  # whole budgets alone count
            if reached and all(map(math.isfinite, reached)):
                others += budget
        runs = [*tuned, *others]
        found = losses(runs, self.lines)
        if not own or not found or not others:
            return None
        if math.isinf(max(own)) and math.isinf(max(found[: len(tuned)])):
            return None  # both have diverged
        budgets: dict[int, list[float]] = {}
        for run, loss in zip(runs, found, strict=True):
            budgets.setdefault(run.steps, []).append(loss)
        return Ended(own, plan.final_steps, budgets)

    def ratio(self, plans: tuple[Tuning, ...], contender: str, rival: str) -> Interval | None:
        """D_eff against a rival at its best; over several workloads its geometric mean."""
        key = (plans, contender, rival)
        if key not in self._ratios:
            found = [ended for p in plans if (ended := self.ended(p, contender, rival))]
            self._ratios[key] = bootstrap(found) if found else None
        return self._ratios[key]

    def verdicts(self, contender: str, rival: str) -> dict[str, tuple[Interval, str]]:
        """By workload, corrected for the number of workloads."""
        plans = [plan for plan in self.plans if {contender, rival} <= set(plan.contenders)]
        return compared(
            {p.label: (self.losses(p, contender), self.losses(p, rival)) for p in plans}
        )

    def swaps(self, contender: str) -> dict[str, tuple[Interval, str]]:
        """Likewise the default minus AdamW's, both at the setting of AdamW's first trials."""
        plans = [plan for plan in self.plans if contender in plan.contenders]

        def swapped(plan: Tuning, name: str) -> list[float] | None:
            return losses(plan.swapped(name, self.lines), self.lines)

        return compared({p.label: (swapped(p, contender), swapped(p, "AdamW")) for p in plans})

    def step_seconds(self, plan: Tuning, contender: str) -> tuple[float, float]:
        """Of a step the seconds of all but the optimizer, and of the optimizer."""
        if plan not in self._of_workload:
            where = (plan.workload, plan.batch, plan.device)
            self._of_workload[plan] = {
                run: line
                for run, line in self.lines.items()
                if (run.workload, run.batch, run.device) == where
            }
        return least_seconds(self._of_workload[plan], contender)

    def times(self, plan: Tuning, unit: str = "steps") -> dict[str, float]:
        """Each optimizer's median time until its training loss is AdamW's last one, seed by seed.

        Args:
            plan: the workload.
            unit: "steps", or "seconds" of the whole training run.
        """
        target = [
            self.lines.get(run, {}).get("curve", [math.nan])[-1]
            for run in self.tuned(plan, "AdamW")
        ]
        found: dict[str, float] = {}
        for contender in plan.contenders:
            runs = self.tuned(plan, contender)
            if not target or losses(runs, self.lines) is None:
                continue
            each = 1.0 if unit == "steps" else sum(self.step_seconds(plan, contender))
            times = []
            for run, goal in zip(runs, target, strict=True):
                line = self.lines[run]
                share = share_to_target(line["curve"], goal) if "curve" in line else math.inf
                times.append(share * run.steps * each)
            found[contender] = statistics.median_high(times)
        return found

    def profiles(self, unit: str) -> dict[str, list[float]]:
        """Ratios to the best time by optimizer, of those that ran on all of the workloads."""
        every = [found for plan in self.plans if (found := self.times(plan, unit))]
        every = [found for found in every if math.isfinite(min(found.values()))]
        common = [c for c in self.contenders if all(c in found for found in every)]
        return profile([{c: found[c] for c in common} for found in every])


def groups(plans: Sequence[Tuning], lines: Lines) -> dict[tuple[float, int, str], Group]:
    """The plans by steps, batches and device."""
    keys = dict.fromkeys(Group.key(plan) for plan in plans)
    return {k: Group([p for p in plans if Group.key(p) == k], lines) for k in sorted(keys)}


def least_seconds(lines: Lines, contender: str) -> tuple[float, float]:
    """Of a step the seconds of all but the optimizer, and of the optimizer: the least of all runs.

    Lines come from several machines, and what else ran there only adds to the seconds. All but the
    optimizer is the same for every contender.

    Args:
        lines: of one workload.
        contender: the optimizer.
    """
    rest = own = math.inf
    for run, line in lines.items():
        if "curve" in line:
            stepping = seconds(line, "optimizer_")
            rest = min(rest, (seconds(line) - stepping) / run.steps)
            if run.contender == contender:
                own = min(own, stepping / run.steps)
    return rest, own


def seconds(line: Line, of: str = "") -> float:
    """The seconds of a run on any device; ``of="optimizer_"`` gives those of its steps alone."""
    keys = (f"{of}cpu_seconds", f"{of}device_seconds")
    return next((float(line[key]) for key in keys if key in line), math.nan)


def state(lines: Sequence[Line]) -> str:
    """Floats per parameter of an optimizer's state."""
    found = [
        line["state_bytes"] / 4 / line["parameters"] for line in lines if "state_bytes" in line
    ]
    return f"{statistics.fmean(found):.2f}" if found else ""


# -- the section of the page -----------------------------------------------------------------


def listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def ends(name: str) -> str:
    """The lowest and the highest value of the descent."""
    return f"{min(LADDERS[name]):g} to {max(LADDERS[name]):g}"


def tuned_section(found: Mapping[tuple[float, int, str], Group]) -> list[str]:
    """Every optimizer at its own best, found with the same search."""
    names = dict.fromkeys(name for group in found.values() for name in group.contenders)
    parts = [
        "## Tuned: every optimizer at its own best",
        "All optimizers have the same search. A trial is one run of half of the steps, with one "
        "seed. The first trial has each one's default options and a retention of 0.9, at the rates "
        "and decay of AdamW's best. The next ones are points of one Sobol sequence over the rate "
        "of matrices "
        f"({LOWEST:g} to {HIGHEST:g}, widened for all where anybody's best is at an end), the rate "
        f"of everything else (x {listed(AUX)}), the weight decay ({listed(WEIGHT_DECAYS)}), the "
        f"retention ({listed(BETAS)}) and one knob of the optimizer's own. Then a coordinate "
        "descent starts at each one's best trial. It changes one setting at a time: the rate by a "
        f"factor of {NEARBY:g}, the knob, the retention ({ends('beta')}), the rate of everything "
        f"else (x {ends('aux')}), the decay ({ends('weight_decay')}). It stops when no change is "
        f"better, or after {PASSES} rounds. The best trials at {FINALISTS} different rates run at "
        "all steps. Then each optimizer tries the best setting of each of the standard tier's "
        "other optimizers, at all steps, because a descent can end far from the best setting. Its "
        "knob then has the other's value if both have the same one, and otherwise either value. "
        "The best of all these runs is repeated with seeds that have chosen nothing. The held-out "
        "data that choose are those that are reported, for all alike: no interval includes the "
        "luck that is left in the search.",
        "*D_eff* is how many times the steps the rival needs, at its own best and at the end of a "
        "schedule, for the same held-out loss, by its losses at "
        f"{listed(sorted((*BUDGETS, 1.0)))} times the steps, and {listed(LONGER)} while another "
        "optimizer is still ahead; beyond them it is a bound. All have the setting that is best "
        f"at 1, and all but 1 have {BUDGET_SEEDS} seeds. A loss that rises with the steps counts "
        "as noise, also where a model has learned its training data by heart: the table of the "
        "rivals' losses shows where. "
        f"Its interval is of {RESAMPLES:,} bootstrap drawings, of means by Student's "
        "distribution and of workloads with replacement. Differences are paired by seed, and "
        "corrected by Holm for the workloads.",
        "*Time to target* is when the training loss is first at the last one of AdamW tuned, with "
        f"the same seed: the curve has means over {CURVE_POINTS} equal parts of the run, linear "
        "between their middles; steps and seconds are medians over seeds. A step's seconds are "
        "the least of all runs, of the optimizer and of all else, because the runs come from "
        "several machines. *Rates within 1 %* is the highest over the lowest rate among the trials "
        "whose loss is within 1 % of the optimizer's best trial; few trials differ in nothing but "
        "the rate, so that it is a lower bound. *Share* is that of the optimizer's steps in all "
        "CPU seconds. *Ended badly* counts runs whose loss or gradient became infinite, trials "
        "included.",
        "Knobs: "
        + "; ".join(f"{name} {knobs(entry)}" for name, entry in CONTENDERS.items() if name in names)
        + ".",
    ]
    for (steps, batch, device), group in found.items():
        where = "" if device == "cpu" else f", on {device}"
        if len(found) > 1 or where or (steps, batch) != (1, 1):
            parts.append(f"### Steps x {steps:g}, batches x {batch}{where}")
        parts += group_tables(group, profile_file(steps, batch, device))
    return parts


def knobs(entry: Contender) -> str:
    """The values of an optimizer's own option, as arguments."""
    values = (" and ".join(f"{k}={v}" for k, v in knob.items()) for knob in entry.knob)
    return " or ".join(values)


def profile_file(steps: float, batch: int, device: str) -> str:
    """The name of the file with a group's performance profile."""
    return f"profile_{steps:g}_x{batch}" + ("" if device == "cpu" else f"_{device}") + ".png"


def group_tables(group: Group, profile_plot: str) -> list[str]:
    parts = []
    if any(group.profiles("steps").values()):
        parts += [
            "#### All workloads",
            overall(group),
            f"![performance profiles](quality/{profile_plot})",
            f"The profile of an optimizer is the share of {len(group.plans)} workloads on which it "
            "needs at most so many times the best optimizer's time to target; its score is the "
            f"mean height up to {FARTHEST:g} times.",
        ]
    for plan in group.plans:
        parts += [f"#### {plan.label}", f"{find(plan.workload).about}."]
        parts += [best_table(group, plan), differences(group, plan), costs(group, plan)]
        parts += [
            "Rivals' losses by steps, as multiples of the workload's:",
            budget_table(group, plan),
        ]
        parts += [f"![loss against rate, search, and training curves](quality/{plan.picture})"]
        parts += [
            "Default options, at a retention of 0.9 and at the rates and decay of AdamW's best "
            "trial in the first range:",
            swapped_table(group, plan),
        ]
    return parts


def best_table(group: Group, plan: Tuning) -> str:
    head = ["optimizer", "trials + full runs", "best setting", "loss"]
    table = [head + [f"D_eff, {rival}" for rival in RIVALS]]
    for contender in plan.contenders:
        found = group.losses(plan, contender)
        if not found:
            table.append(
                [contender, "", why_not(group, plan, contender), *[""] * len(table[0][3:])]
            )
            continue
        ratios = [data_ratio(group, (plan,), contender, rival) for rival in RIVALS]
        full = {*plan.finalists(contender, group.lines), *plan.shared(contender, group.lines)}
        trials = f"{len(plan.searched(contender, group.lines))} + {len(full & group.lines.keys())}"
        setting = group.tuned(plan, contender)[0].setting
        table.append([contender, trials, str(setting), f"{statistics.fmean(found):.4f}", *ratios])
    return markdown(table)


def why_not(group: Group, plan: Tuning, contender: str) -> str:
    """Why an optimizer has no loss: it refuses the model, has diverged, or was not run."""
    runs = plan.trials_of(contender, group.lines)
    trials = [group.lines[run] for run in runs if run in group.lines]
    if refused := [line["refused"] for line in trials if "refused" in line]:
        return str(refused[0])
    diverged = sum("diverged" in line for line in trials)
    if trials and diverged == len(trials):
        return f"diverged ({diverged} of {len(trials)})"
    return MISSING


def budget_table(group: Group, plan: Tuning) -> str:
    """What D_eff is made from: the rivals' mean losses by numbers of steps."""
    shares = sorted((*BUDGETS, 1.0, *LONGER))
    table = [["optimizer", *[f"{share:g}" for share in shares]]]
    for rival in RIVALS:
        if not group.losses(plan, rival):
            continue
        tuned = group.tuned(plan, rival)
        budgets = plan.by_share(tuned, shares)
        found = [losses(runs, group.lines) for runs in budgets]
        table.append([rival, *[f"{statistics.fmean(x):.4f}" if x else "" for x in found]])
    return markdown(table) if len(table) > 1 else f"{MISSING}."


def differences(group: Group, plan: Tuning) -> str:
    table = [["optimizer", *[f"loss minus {rival}'s" for rival in RIVALS]]]
    for contender in plan.contenders:
        cells = [
            group.verdicts(contender, rival).get(plan.label) if contender != rival else None
            for rival in RIVALS
        ]
        if any(cells):
            texts = [f"{difference(x[0])}, {x[1]}" if x else "" for x in cells]
            table.append([contender, *texts])
    return markdown(table)


def costs(group: Group, plan: Tuning) -> str:
    head = ["optimizer", "steps to target", "seconds to target", "state, floats/parameter"]
    table = [[*head, "share", "rates within 1 %", "ended badly"]]
    steps, lasted = group.times(plan), group.times(plan, "seconds")
    for contender in plan.contenders:
        runs = plan.runs(contender, group.lines)
        every = [group.lines[run] for run in runs if run in group.lines]
        if not every:
            continue
        own = [group.lines[r] for r in group.tuned(plan, contender) if r in group.lines]
        own = [line for line in own if "curve" in line]
        rest, stepping = group.step_seconds(plan, contender)
        table.append(
            [
                contender,
                reached(steps.get(contender), 0),
                reached(lasted.get(contender), 1),
                state(own),
                f"{100 * stepping / (rest + stepping):.0f} %" if own else "",
                folds(width(plan, contender, group.lines)),
                f"{sum('diverged' in line for line in every)} of {len(every)}",
            ]
        )
    return markdown(table)


def reached(time: float | None, digits: int) -> str:
    if time is None:
        return ""
    return f"{time:.{digits}f}" if math.isfinite(time) else "not reached"


def width(plan: Tuning, contender: str, lines: Lines) -> float | None:
    """Ratio of the highest to the lowest rate among trials within 1 % of the best one."""
    trials = plan.searched(contender, lines)
    best = min((value(lines[run]) for run in trials), default=math.inf)
    if not math.isfinite(best):
        return None
    rates = [run.setting.lr for run in trials if value(lines[run]) <= NEAR_BEST * best]
    return max(rates) / min(rates)


def folds(x: float | None) -> str:
    return f"{x:.1f}-fold" if x else ""


def data_ratio(group: Group, plans: tuple[Tuning, ...], contender: str, rival: str) -> str:
    """D_eff with its interval; empty while it is not known."""
    x = group.ratio(plans, contender, rival)
    found = [e for plan in plans if (e := group.ended(plan, contender, rival))]
    return "" if x is None else ratio_text(x, found)


def ratio_text(x: Interval, found: Sequence[Ended]) -> str:
    """D_eff with its interval; it is a bound if that of a workload is at an end of the budgets."""
    ends = {ended.end for ended in found}
    bound = "" if {-1, 1} <= ends else ">= " if 1 in ends else "<= " if -1 in ends else ""
    return f"{bound}{x.mean:.2f} [{x.low:.2f}, {x.high:.2f}]"


def overall(group: Group) -> str:
    """Geometric means of D_eff and scores of the profiles."""
    profiles = {unit: group.profiles(unit) for unit in ("steps", "seconds")}
    head = [f"D_eff, {rival}: geometric mean" for rival in RIVALS]
    table = [["optimizer", *head, "profile, steps", "profile, seconds", "workloads"]]
    for contender in group.contenders:
        plans = [p for p in group.plans if contender in p.contenders]
        row = [data_ratio(group, tuple(plans), contender, rival) for rival in RIVALS]
        for found in profiles.values():
            row.append(f"{profile_score(found[contender]):.2f}" if found.get(contender) else "")
        if any(row):
            done = sum(group.losses(plan, contender) is not None for plan in plans)
            table.append([contender, *row, str(done)])
    return markdown(table)


def swapped_table(group: Group, plan: Tuning) -> str:
    """The defaults at the rates and decay of AdamW's first trials."""
    table = [["optimizer", "loss", "minus AdamW's", ""]]
    for contender in plan.contenders:
        found = group.swaps(contender).get(plan.label)
        if found and contender != "AdamW":
            own = losses(plan.swapped(contender, group.lines), group.lines) or []
            table.append(
                [contender, f"{statistics.fmean(own):.4f}", difference(found[0]), found[1]]
            )
    return markdown(table) if len(table) > 1 else f"{MISSING}."


def picture_files(found: Mapping[tuple[float, int, str], Group], folder: Path) -> dict[Path, Group]:
    """Where each group's performance profile is drawn."""
    return {folder / profile_file(*key): group for key, group in found.items()}
