"""Which runs there are. A plan is a function of the lines so far, so that it can stop anywhere."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.quality.contenders import ABLATIONS, CONTENDERS, DEFAULT, MAIN, RIVALS, Setting
from benchmarks.quality.training import Lines, Run, value
from benchmarks.quality.workload import find

LOWEST, HIGHEST = 5e-4, 3.2e-2
AUX = (0.5, 1.0, 2.0)
WEIGHT_DECAYS = (0.0, 0.03, 0.1, 0.3)
BETAS = (0.9, 0.95)
WIDENING = 4.0
"""Ratio of the ends of a range of rates that is added where the best rate is at an end."""
WIDENINGS = 2
"""Times that the range of rates is widened at most."""
NEARBY = 1.5
"""Ratio of neighboring rates in the descent."""
LADDERS: dict[str, tuple[float, ...]] = {
    "own": (0, 1),
    "beta": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    "aux": (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "weight_decay": (*WEIGHT_DECAYS, 1.0),
}
"""Values of the descent, which reach beyond the sequence's."""
PASSES = 3
"""Times that the descent goes through all coordinates at most."""
FINALISTS = 3
"""Trials, each the best at its rate, that run in full: at half of the steps a higher rate looks
better than it is."""
BUDGETS = (0.5, 1.5, 2.0)
"""Numbers of steps at which the rivals' loss is also measured, as multiples of the workload's."""
LONGER = (3.0, 4.0)
"""Further numbers of steps for a rival that is still behind another optimizer at all of BUDGETS:
otherwise the ratio of their steps would be no more than a bound."""
BUDGET_SEEDS = 3

THREE_RATES = (3e-4, 1e-3, 3e-3)
FIVE_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
BESIDE = (0.5, 2.0)
"""Rates of the swap besides AdamW's best, as multiples of it."""
SWAP_DECAY = 0.1
"""The weight decay of the training command."""
PAIR = ("AdamW", DEFAULT)


@dataclass(frozen=True)
class Tuning:
    """The same search for every optimizer on a workload, then seeds.

    1. Trials, at half of the steps: the defaults, then points of one quasi-random sequence. The
       defaults of AdamW are tried at its usual rate and decay, those of the others at the best
       that AdamW's trials have found: that is the swap.
    2. Where anybody's best rate is the highest or the lowest tried, the range is widened for all.
    3. A coordinate descent from each one's best trial: the next lower and the next higher value of
       the rate, of its own knob, of the retention, of the other rate and of the decay, by turns,
       until nothing changes, three times at most.
    4. For each optimizer, the best trial at each of its three best rates runs with all steps.
    5. Each optimizer also tries the best settings of the standard tier's other optimizers. The knob
       keeps its value where both have the same knob; otherwise both of its own values are tried.
    6. The best of 4 and 5 with seeds that have chosen nothing; the swap with every seed; the rivals
       at their best at other budgets, up to twice the steps, and up to four times while another
       optimizer is ahead of them.

    Attributes:
        workload: its name.
        contenders: names; AdamW is always among them.
        trials: points of the sequence.
        seeds: number of final runs.
        steps: optimizer steps of the final runs; None for the workload's own.
        batch: batches of the workload in a step.
        device: where the models are.
    """

    workload: str
    contenders: Sequence[str]
    trials: int = 6
    seeds: int = 5
    steps: int | None = None
    batch: int = 1
    device: str = "cpu"

    @property
    def label(self) -> str:
        """The workload, and what differs from its own steps and batches."""
        steps = f", {self.steps} steps" if self.steps else ""
        return self.workload + steps + (f", batches x {self.batch}" if self.batch > 1 else "")

    @property
    def picture(self) -> str:
        """The name of the file of its plots."""
        steps = f"_{self.steps}" if self.steps else ""
        batch = f"_x{self.batch}" if self.batch > 1 else ""
        device = "" if self.device == "cpu" else f"_{self.device}"
        return f"{Path(self.workload).stem}{steps}{batch}{device}.png"

    @property
    def final_steps(self) -> int:
        return self.steps or find(self.workload).steps

    def run(self, contender: str, setting: Setting, seed: int = 0, share: float = 1.0) -> Run:
        steps = max(2, round(self.final_steps * share))
        return Run(self.workload, contender, setting, seed, steps, self.batch, self.device)

    def trial(self, contender: str, setting: Setting) -> Run:
        return self.run(contender, setting, share=0.5)

    def adamw_setting(self, lines: Lines) -> Setting | None:
        """The rates and decay of AdamW's best trial before any widening; defaults for the rest."""
        best = best_of(self.first_trials(), lines)
        if best is None:
            return None
        return Setting(best.setting.lr, best.setting.aux, best.setting.weight_decay)

    def first_trials(self) -> list[Run]:
        """AdamW's trials before any widening."""
        return self.unwidened("AdamW", {})

    def unwidened(self, contender: str, lines: Lines) -> list[Run]:
        """The trials before any widening, as far as they are known."""
        default = self.default_setting(contender, lines)
        settings = [*([default] if default else []), *points(self.trials)]
        return [self.trial(contender, setting) for setting in settings]

    def default_setting(self, contender: str, lines: Lines) -> Setting | None:
        """The setting of an optimizer's first trial; None while AdamW's trials are missing."""
        return Setting(1e-3) if contender == "AdamW" else self.adamw_setting(lines)

    def trials_of(self, contender: str, lines: Lines) -> list[Run]:
        """The trials that there are so far."""
        found = self.unwidened(contender, lines)
        for low, high, skipped, count in self.ranges(lines)[1:]:
            found += [self.trial(contender, s) for s in points(count, low, high, skipped)]
        return found

    def ranges(self, lines: Lines) -> list[tuple[float, float, int, int]]:
        """Ranges of rates, widened as far as is known, with how many points to skip and to take."""
        low, high, used = LOWEST, HIGHEST, self.trials
        found = [(low, high, 0, self.trials)]
        more = max(1, self.trials // 2)
        for _ in range(WIDENINGS):
            lowest, highest = self._ends_reached(found, lines)
            if highest:
                found.append((high, high * WIDENING, used, more))
                high, used = high * WIDENING, used + more
            if lowest:
                found.append((low / WIDENING, low, used, more))
                low, used = low / WIDENING, used + more
            if not (lowest or highest):
                break
        return found

    def _ends_reached(
        self, ranges: Sequence[tuple[float, float, int, int]], lines: Lines
    ) -> tuple[bool, bool]:
        """Whether anybody's best trial has the lowest, or the highest, of all rates of the ranges.

        Every known optimizer decides, whichever the plan has, once all its trials are there: the
        plans of a command and of the page must have the same trials. Parts of the default that are
        left out do not decide.
        """
        settings = [s for low, high, skip, count in ranges for s in points(count, low, high, skip)]
        rates = [setting.lr for setting in settings]
        lowest = highest = False
        for contender in (c for c in CONTENDERS if c not in ABLATIONS):
            default = self.default_setting(contender, lines)
            if default is None:
                continue
            best = best_of([self.trial(contender, s) for s in (default, *settings)], lines)
            if best is not None:
                lowest |= best.setting.lr <= min(rates)
                highest |= best.setting.lr >= max(rates)
        return lowest, highest

    def descent(self, contender: str, lines: Lines) -> list[Run]:
        """The trials of the coordinate descent that are known by now."""
        best = best_of(self.trials_of(contender, lines), lines)
        if best is None:
            return []
        tried: list[Run] = []
        ladders = ladders_around(best.setting)
        for _ in range(PASSES):
            start = best
            for name, ladder in ladders.items():
                k = ladder.index(getattr(best.setting, name))
                around = [*ladder[max(k - 1, 0) : k], *ladder[k + 1 : k + 2]]
                changed = [Setting(**{**best.setting._asdict(), name: x}) for x in around]
                near = [self.trial(contender, setting) for setting in changed]
                tried += near
                if any(run not in lines for run in near):
                    return tried
                best = min([best, *near], key=lambda run: value(lines[run]))
            if best == start:
                break
        return tried

    def searched(self, contender: str, lines: Lines) -> list[Run]:
        """All trials that have a line."""
        every = self.trials_of(contender, lines) + self.descent(contender, lines)
        return [run for run in dict.fromkeys(every) if run in lines]

    def finalists(self, contender: str, lines: Lines) -> list[Run]:
        """The best trials at different rates, at all steps; none while the search goes on."""
        runs = self.searched(contender, lines)
        if {*self.trials_of(contender, lines), *self.descent(contender, lines)} - {*runs}:
            return []
        by_rate: dict[float, Run] = {}
        for run in sorted(runs, key=lambda run: value(lines[run])):
            if math.isfinite(value(lines[run])):
                by_rate.setdefault(run.setting.lr, run)
        chosen = list(by_rate.values())[:FINALISTS]
        return [self.run(contender, run.setting) for run in chosen]

    def shared(self, contender: str, lines: Lines) -> list[Run]:
        """What an optimizer tries of the other optimizers' best settings, as far as is known.

        A descent may end far from the best setting, and what was best for another is worth a try.
        The optimizers of the standard tier share theirs, whichever of them the plan has.
        """
        if not self.finalists(contender, lines):
            return []
        best = [best_of(self.finalists(c, lines), lines) for c in MAIN if c != contender]
        found = []
        for run in filter(None, best):
            # A knob can change the size of the updates, and a rate is worth little without it.
            same = CONTENDERS[run.contender].knob == CONTENDERS[contender].knob
            knobs = (run.setting.own,) if same else (0, 1)
            found += [self.run(contender, run.setting._replace(own=own)) for own in knobs]
        return found

    def best(self, contender: str, lines: Lines) -> Setting | None:
        """The setting of the best run at all steps, its own or another optimizer's."""
        own = self.finalists(contender, lines)
        shared = [run for run in self.shared(contender, lines) if run in lines]
        best = best_of([*own, *shared], lines)
        return None if best is None else best.setting

    def tuned(self, contender: str, lines: Lines) -> list[Run]:
        """The best setting with seeds that have chosen nothing: all choices are made by seed 0."""
        setting = self.best(contender, lines)
        seeds = range(1, self.seeds + 1)
        return [self.run(contender, setting, seed) for seed in seeds] if setting else []

    def swapped(self, contender: str, lines: Lines) -> list[Run]:
        """Every seed of an optimizer's default at the rates and decay of :meth:`adamw_setting`."""
        setting = self.adamw_setting(lines)
        if setting is None:
            return []
        return [self.run(contender, setting, seed) for seed in range(self.seeds)]

    def budgets(self, tuned: Sequence[Run]) -> list[Run]:
        """A rival's tuned runs with other numbers of steps."""
        return [run for share in BUDGETS for run in self._budget(tuned, share)]

    def longer(self, tuned: Sequence[Run], ahead: float, lines: Lines) -> list[list[Run]]:
        """A rival's further budgets, as far as they are known.

        There are more for as long as all of its mean losses so far are above ``ahead``.
        """
        known = [self._budget(tuned, share) for share in (1.0, *BUDGETS)]
        found: list[list[Run]] = []
        for share in LONGER:
            if not math.inf > least_mean(known, lines) > ahead:
                break
            if any(run not in lines for run in known[-1]):
                break
            known.append(self._budget(tuned, share))
            found.append(known[-1])
        return found

    def by_share(self, tuned: Sequence[Run], shares: Sequence[float]) -> list[list[Run]]:
        """A rival's tuned runs at some multiples of the steps; at 1 they have every seed."""
        return [list(tuned) if share == 1 else self._budget(tuned, share) for share in shares]

    def _budget(self, tuned: Sequence[Run], share: float) -> list[Run]:
        first = tuned[:BUDGET_SEEDS]
        return [self.run(run.contender, run.setting, run.seed, share) for run in first]

    def runs(self, contender: str, lines: Lines) -> list[Run]:
        """All runs of an optimizer that are known by now."""
        found = [*self.trials_of(contender, lines), *self.descent(contender, lines)]
        found += [*self.finalists(contender, lines), *self.shared(contender, lines)]
        tuned = self.tuned(contender, lines)
        longer = itertools.chain(*self.longer(tuned, -math.inf, lines))
        found += [*tuned, *self.swapped(contender, lines), *self.budgets(tuned), *longer]
        return list(dict.fromkeys(found))

    def next(self, lines: Lines) -> list[Run]:
        """The missing runs that are known by now; empty when all are done."""
        rivals = [rival for rival in RIVALS if rival in self.contenders]
        tuned = cache(lambda contender: self.tuned(contender, lines))

        def longer(rival: str) -> list[Run]:
            others = [tuned(contender) for contender in self.contenders if contender != rival]
            every = self.longer(tuned(rival), least_mean(others, lines), lines)
            return [run for budget in every for run in budget]

        def of_all(known: Callable[[str, Lines], list[Run]]) -> Callable[[], list[Run]]:
            return lambda: [run for c in self.contenders for run in known(c, lines)]

        stages = (
            self.first_trials,
            of_all(self.unwidened),
            of_all(self.trials_of),
            of_all(self.descent),
            of_all(self.finalists),
            of_all(self.shared),
            lambda: [run for c in self.contenders for run in tuned(c)],
            of_all(self.swapped),
            lambda: [run for rival in rivals for run in self.budgets(tuned(rival))],
            lambda: [run for rival in rivals for run in longer(rival)],
        )
        for stage in stages:
            if missing := [run for run in dict.fromkeys(stage()) if run not in lines]:
                return missing
        return []


@dataclass(frozen=True)
class Rates:
    """AdamW and another at the very same three rates, with paired seeds; nothing is tuned.

    Attributes:
        workload: its name.
        contenders: names; AdamW is the one that the others are held against.
        seeds: None for the workload's own number.
        steps: None for the workload's own.
    """

    workload: str
    contenders: Sequence[str] = PAIR
    seeds: int | None = None
    steps: int | None = None

    @property
    def label(self) -> str:
        """The workload, and the number of steps where it is not the workload's own."""
        return f"{self.workload}, {self.steps} steps" if self.steps else self.workload

    def runs(self, contender: str, lr: float) -> list[Run]:
        workload = find(self.workload)
        steps = self.steps or workload.steps
        seeds = range(self.seeds or workload.seeds)
        return [Run(self.workload, contender, Setting(lr), seed, steps) for seed in seeds]

    def best_rate(self, lines: Lines, contender: str = "AdamW") -> float | None:
        """The rate at which the mean of an optimizer's runs is best; None while one is missing."""
        means = {}
        for lr in THREE_RATES:
            runs = self.runs(contender, lr)
            if any(run not in lines for run in runs):
                return None
            means[lr] = sum(value(lines[run]) for run in runs) / len(runs)
        return min(means, key=lambda lr: means[lr])

    def next(self, lines: Lines) -> list[Run]:
        every = [run for c in self.contenders for lr in THREE_RATES for run in self.runs(c, lr)]
        return [run for run in every if run not in lines]


@dataclass(frozen=True)
class Swap:
    """Other optimizers instead of AdamW, at its best of five rates and else with their defaults.

    1. AdamW at five rates a factor of two apart, with the first seed.
    2. Every optimizer at the best of them, and at the same decay, with every seed.
    3. AdamW and DeepMomentum's default at half and at double that rate.

    Attributes:
        workload: its name.
        contenders: names; AdamW is always among them.
        seeds: number of runs at each rate, except in the sweep.
    """

    workload: str
    contenders: Sequence[str]
    seeds: int = 3

    def run(self, contender: str, lr: float, seed: int) -> Run:
        setting = Setting(lr, weight_decay=SWAP_DECAY, beta=None)
        return Run(self.workload, contender, setting, seed, find(self.workload).steps)

    def sweep(self) -> list[Run]:
        return [self.run("AdamW", lr, 0) for lr in FIVE_RATES]

    def best_rate(self, lines: Lines) -> float | None:
        """That of AdamW's best; None while a run of the sweep is missing, or where none ended."""
        best = best_of(self.sweep(), lines)
        return None if best is None else best.setting.lr

    def runs(self, contender: str, lr: float) -> list[Run]:
        return [self.run(contender, lr, seed) for seed in range(self.seeds)]

    def next(self, lines: Lines) -> list[Run]:
        """The missing runs that are known by now; empty when all are done."""
        if missing := [run for run in self.sweep() if run not in lines]:
            return missing
        lr = self.best_rate(lines)
        if lr is None:
            return []
        every = [run for contender in self.contenders for run in self.runs(contender, lr)]
        pair = [contender for contender in PAIR if contender in self.contenders]
        every += [run for c in pair for share in BESIDE for run in self.runs(c, lr * share)]
        return [run for run in dict.fromkeys(every) if run not in lines]


Plan = Tuning | Rates | Swap


@cache
def points(
    count: int, low: float = LOWEST, high: float = HIGHEST, skipped: int = 0
) -> tuple[Setting, ...]:
    """Settings of the one quasi-random sequence (Sobol), the same for every optimizer.

    Args:
        count: number of points.
        low, high: ends of the rates, which are uniform in their logarithm.
        skipped: points of the sequence that come before.
    """
    found = []
    for lr, aux, decay, beta, own in _sequence(skipped + count)[skipped:]:
        found.append(
            Setting(
                float(f"{low * (high / low) ** lr:.3g}"),
                _choice(AUX, aux),
                _choice(WEIGHT_DECAYS, decay),
                _choice(BETAS, beta),
                int(2 * own),
            )
        )
    return tuple(found)


def ladders_around(start: Setting) -> dict[str, list[float]]:
    """The rising values of every coordinate, among them those of the descent's start."""
    rates = [float(f"{start.lr * NEARBY**k:.3g}") for k in range(-9, 10)]
    others = {n: sorted({*ladder, getattr(start, n)}) for n, ladder in LADDERS.items()}
    return {"lr": rates, **others}


@cache
def _sequence(count: int) -> list[list[float]]:
    return torch.quasirandom.SobolEngine(5, scramble=True, seed=0).draw(count).tolist()


def _choice(values: Sequence[float], share: float) -> float:
    return values[int(share * len(values))]


def least_mean(every: Iterable[Sequence[Run]], lines: Lines) -> float:
    """The least of the mean losses of groups of runs, of those that are all there."""
    done = [runs for runs in every if runs and all(run in lines for run in runs)]
    means = [statistics.fmean(value(lines[run]) for run in runs) for runs in done]
    return min(means, default=math.inf)


def best_of(runs: Sequence[Run], lines: Lines) -> Run | None:
    """The run of the smallest loss; None while one is missing, or where none ended well."""
    if not runs or any(run not in lines for run in runs):
        return None
    best = min(runs, key=lambda run: value(lines[run]))
    return best if math.isfinite(value(lines[best])) else None
