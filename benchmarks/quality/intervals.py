"""Intervals and tests for paired runs, and how much data a rival needs for the same loss."""

import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SIGNIFICANCE = 0.05
RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval, and the p-value of a mean of zero."""

    mean: float
    low: float
    high: float
    p: float


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Student's interval of the mean difference, first less second, of runs with equal seeds.

    Args:
        first, second: values of the same seeds, in the same order; infinite ones have diverged.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n == 0 or not all(map(math.isfinite, differences)):
        mean = sum(differences) if differences else math.nan
        return Interval(mean, -math.inf, math.inf, 1.0)
    mean = statistics.fmean(differences)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1.0)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0.0:
        return Interval(mean, mean, mean, 0.0 if mean else 1.0)
    reach = t_quantile(1 - SIGNIFICANCE / 2, n - 1) * error
    return Interval(mean, mean - reach, mean + reach, 2 * (1 - t_cdf(abs(mean) / error, n - 1)))


def t_cdf(t: float, degrees: int) -> float:
    """Student's distribution function, by Simpson's rule on the angle arctan(t / sqrt(degrees))."""
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(math.pi)
    end, parts = math.atan(t / math.sqrt(degrees)), 400
    heights = [math.cos(end * k / parts) ** (degrees - 1) for k in range(parts + 1)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 0.5 + scale * (heights[0] + inner + heights[-1]) * end / parts / 3


def t_quantile(p: float, degrees: int) -> float:
    """The inverse of :func:`t_cdf`, for p in [0.5, 1)."""
    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < p else (low, middle)
    return (low + high) / 2


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number, by Holm's method."""
    corrected, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = largest
    return corrected


def verdict(difference: float, p: float) -> str:
    """Whether the first of two is better, where less is better; a tie unless it is significant."""
    if p >= SIGNIFICANCE:
        return "tie"
    return "win" if difference < 0 else "loss"


def equal_loss_ratio(loss: float, steps: int, budgets: Mapping[int, float]) -> float:
    """D_eff: the rival's steps for a loss, by its loss at several budgets, over the steps taken.

    Between budgets the loss is taken as linear in the logarithm of the steps. Beyond the largest
    and below the smallest the ratio stops there: it is a bound.

    Args:
        loss: reached after ``steps``.
        steps: taken.
        budgets: the rival's loss by steps, each at the end of a schedule of its own.
    """
    points = sorted(budgets.items())
    best: list[tuple[int, float]] = []
    for budget, reached in points:  # more data is never worse: what looks so is noise
        best.append((budget, min(reached, best[-1][1]) if best else reached))
    if loss >= best[0][1]:
        return best[0][0] / steps
    for (few, worse), (many, better) in itertools.pairwise(best):
        if loss >= better:
            share = (worse - loss) / (worse - better)
            return few * (many / few) ** share / steps
    return best[-1][0] / steps


def bootstrap(
    losses: Sequence[float], steps: int, budgets: Mapping[int, Sequence[float]]
) -> Interval:
    """D_eff of the mean loss, and its interval over resampled seeds.

    Args:
        losses: of the seeds.
        steps: that they took.
        budgets: the rival's losses of its seeds, by steps.
    """
    means = {budget: statistics.fmean(found) for budget, found in budgets.items()}
    center = equal_loss_ratio(statistics.fmean(losses), steps, means)
    rng, ratios = random.Random(0), []
    for _ in range(RESAMPLES):
        drawn = statistics.fmean(rng.choices(losses, k=len(losses)))
        rival = {b: statistics.fmean(rng.choices(x, k=len(x))) for b, x in budgets.items()}
        ratios.append(equal_loss_ratio(drawn, steps, rival))
    ratios.sort()
    ends = (
        ratios[int(RESAMPLES * SIGNIFICANCE / 2)],
        ratios[-1 - int(RESAMPLES * SIGNIFICANCE / 2)],
    )
    return Interval(center, *ends, math.nan)
