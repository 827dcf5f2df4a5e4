"""What the comparison should come to, and whether it does. Nothing else reads the goals."""

import math
from collections.abc import Mapping, Sequence

from benchmarks.quality.contenders import DEFAULT
from benchmarks.quality.plan import BESIDE, PAIR, Rates, Swap, Tuning
from benchmarks.quality.training import Lines
from benchmarks.quality.tuned import MISSING, Group, compared, data_ratio, folds, losses, width

WORKLOADS = ("lm_code", "lm_text", "mnist_vit", "recall", "hope_code")
"""The workloads over which the goals take geometric means."""
OWN, LONG = (1.0, 1, "cpu"), (4.0, 1, "cpu")
"""The tuned workloads at their own steps, and at four times as many."""
SHARE_OF_CELLS = 0.9


def goals(
    tuned: Mapping[tuple[float, int, str], Group],
    rates: Sequence[Rates],
    swaps: Sequence[Swap],
    lines: Lines,
) -> list[list[str]]:
    """The rows of a table: the goal, what was measured, and "met", "NOT met" or "not run"."""
    empty = Group((), lines)
    own, long = tuned.get(OWN, empty), tuned.get(LONG, empty)
    return [
        ["goal", "measured", ""],
        mean_ratio(own, "AdamW", 2.0, ""),
        mean_ratio(own, "Muon", 1.2, ""),
        least_ratio(own, "Muon", 0.99),
        mean_ratio(long, "NorMuon", 1.1, " at four times the steps"),
        swapped(rates, swaps, lines),
        beside(swaps, lines),
        rate_width(own, 8.0),
    ]


def chosen(group: Group) -> tuple[Tuning, ...]:
    return tuple(plan for plan in group.plans if plan.workload in WORKLOADS)


def mean_ratio(group: Group, rival: str, goal: float, where: str) -> list[str]:
    text = f"D_eff against {rival}, tuned{where}: geometric mean of at least {goal:.2f}"
    plans = tuple(p for p in chosen(group) if group.ended(p, DEFAULT, rival))
    found = group.ratio(plans, DEFAULT, rival) if plans else None
    if found is None:
        return [text, "", MISSING]
    measured = f"{data_ratio(group, plans, DEFAULT, rival)} on {names(plans)}"
    inner = tuple(p for p in plans if (e := group.ended(p, DEFAULT, rival)) and not e.end)
    if inner and len(inner) < len(plans):
        bounds = tuple(plan for plan in plans if plan not in inner)
        without = data_ratio(group, inner, DEFAULT, rival)
        measured += f"; {without} without {names(bounds)}, where it is a bound"
    return [text, measured, status(found.mean >= goal, len(plans) == len(WORKLOADS))]


def least_ratio(group: Group, rival: str, goal: float) -> list[str]:
    text = f"D_eff against {rival}, tuned: on no workload below {goal:.2f}"
    ratios = {p: e.ratio() for p in chosen(group) if (e := group.ended(p, DEFAULT, rival))}
    if not ratios:
        return [text, "", MISSING]
    plan = min(ratios, key=lambda p: ratios[p])
    measured = f"{ratios[plan]:.2f} on {plan.workload}, the least of {names(tuple(ratios))}"
    return [text, measured, of_least(ratios[plan] >= goal, len(ratios))]


def swapped(rates: Sequence[Rates], swaps: Sequence[Swap], lines: Lines) -> list[str]:
    """AdamW's best rate, with nothing but the optimizer changed."""
    plans: list[Rates | Swap] = [*rates, *swaps]
    pairs = {}
    for plan in plans:
        if DEFAULT in plan.contenders and (lr := plan.best_rate(lines)):
            first, second = (losses(plan.runs(c, lr), lines) for c in PAIR)
            if first and second:
                pairs[str(plan)] = (second, first)
    words = [word for _, word in compared(pairs).values()]
    goal = "AdamW's best rate and decay untouched: better on every workload"
    return [goal, words_of(words), status(words.count("win") == len(words)) if words else MISSING]


def beside(swaps: Sequence[Swap], lines: Lines) -> list[str]:
    """Half and double AdamW's best rate."""
    pairs = {}
    for plan in swaps:
        lr = plan.best_rate(lines) or math.nan
        for share in BESIDE:
            first, second = (losses(plan.runs(c, lr * share), lines) for c in PAIR)
            if first and second:
                pairs[f"{plan.workload}, {share}"] = (second, first)
    words = [word for _, word in compared(pairs).values()]
    goal = f"At half and double that rate: better in {100 * SHARE_OF_CELLS:.0f} % of the cells"
    enough = words.count("win") >= SHARE_OF_CELLS * len(words)
    complete = len(words) == len(swaps) * len(BESIDE)
    return [goal, words_of(words), status(enough, complete) if words else MISSING]


def rate_width(group: Group, goal: float) -> list[str]:
    text = f"Rates within 1 % of the best loss: at least {goal:g}-fold"
    widths = {p: x for p in chosen(group) if (x := width(p, DEFAULT, group.lines))}
    if not widths:
        return [text, "", MISSING]
    plan = min(widths, key=lambda p: widths[p])
    measured = f"{folds(widths[plan])} on {plan.workload}, the least of {names(tuple(widths))}"
    return [text, measured, of_least(widths[plan] >= goal, len(widths))]


def names(plans: Sequence[Tuning]) -> str:
    return ", ".join(plan.workload for plan in plans)


def words_of(verdicts: Sequence[str]) -> str:
    """The number of wins, ties and losses; empty if there is no verdict."""
    plural = {"win": "wins", "tie": "ties", "loss": "losses"}
    counts = {word: list(verdicts).count(word) for word in plural}
    words = [f"{count} {word if count == 1 else plural[word]}" for word, count in counts.items()]
    return ", ".join(words) if verdicts else ""


def of_least(reached: bool, count: int) -> str:
    """The status of a goal for each workload: a single one that misses it is enough."""
    return status(reached, count == len(WORKLOADS) or not reached)


def status(reached: bool, complete: bool = True) -> str:
    if not complete:
        return f"{MISSING} on all of its workloads"
    return "met" if reached else "NOT met"
