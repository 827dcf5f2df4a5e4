"""Paired intervals, Holm's correction, ties, the data ratio, times to target and their profile."""

import math
import random

import pytest

from benchmarks.quality import intervals
from benchmarks.quality.intervals import (
    Ended,
    bootstrap,
    equal_loss_ratio,
    holm,
    paired,
    profile,
    profile_score,
    share_to_target,
    t_cdf,
    t_quantile,
    verdict,
)


@pytest.mark.parametrize(
    ("degrees", "p", "t"), [(1, 0.975, 12.7062), (4, 0.975, 2.77645), (9, 0.995, 3.24984)]
)
def test_students_distribution_has_the_values_of_the_tables(degrees, p, t):
    assert t_cdf(t, degrees) == pytest.approx(p, abs=1e-5)
    assert t_quantile(p, degrees) == pytest.approx(t, rel=1e-4)
    assert t_cdf(0.0, degrees) == 0.5


def test_a_paired_interval_is_that_of_the_differences():
    # Differences -1, -2, -3: mean -2, standard error 1/sqrt(3), t(2) = 4.30265
    found = paired([1.0, 3.0, 7.0], [2.0, 5.0, 10.0])
    assert found.mean == -2.0
    assert found.high - found.low == pytest.approx(2 * 4.30265 / math.sqrt(3), rel=1e-4)
    assert found.p == pytest.approx(0.0742, abs=1e-4)


def test_what_seeds_share_leaves_no_trace_in_a_paired_interval():
    hard = [0.0, 50.0, -20.0]
    first = [h + d for h, d in zip(hard, (1.0, 1.1, 0.9), strict=True)]
    found = paired(first, hard)
    assert found.low > 0.7
    assert found.p < 0.01


def test_one_seed_proves_nothing():
    found = paired([1.0], [2.0])
    assert verdict(found.mean, found.p) == "tie"
    assert found.low == -math.inf


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        ([math.inf, 1.0], [2.0, 2.0], "loss"),
        ([1.0, 1.0], [2.0, math.inf], "win"),
        ([math.inf, 1.0], [2.0, math.inf], "tie"),
    ],
)
def test_whoever_has_diverged_has_lost_to_whoever_has_not(first, second, word):
    found = paired(first, second)
    assert verdict(found.mean, found.p) == word


def test_a_diverged_run_counts_in_the_data_ratio_at_the_worst_end():
    budgets = {2: [4.0, 4.2], 4: [3.0, 3.1], 8: [2.0, 2.2]}
    good, bad = Ended([2.5, 2.7], 4, budgets), Ended([2.5, math.inf], 4, budgets)
    assert bad.ratio() == 0.5
    assert (bad.end, good.end) == (-1, 0)
    alone, both = bootstrap([good]).mean, bootstrap([good, bad]).mean
    assert both == pytest.approx(math.sqrt(alone * 0.5))
    rival = Ended([2.5, 2.7], 4, {2: [math.inf, 4.2], 4: [3.0, math.inf], 8: [2.0, 2.2]})
    assert rival.ratio() == 1.0


def test_holm_multiplies_the_smallest_by_the_number_and_never_falls():
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert corrected == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


@pytest.mark.parametrize(
    ("difference", "p", "word"),
    [(-1.0, 0.01, "win"), (1.0, 0.01, "loss"), (-1.0, 0.05, "tie"), (1.0, 1.0, "tie")],
)
def test_a_difference_is_a_tie_unless_it_is_significant(difference, p, word):
    assert verdict(difference, p) == word


def test_the_data_ratio_is_that_of_the_steps_at_equal_loss():
    # The rival's loss is 5 - log2(steps): it needs twice the steps for a loss that is 1 lower.
    budgets = {steps: 5 - math.log2(steps) for steps in (2, 4, 8)}
    assert equal_loss_ratio(3.0, 4, budgets) == pytest.approx(1.0)
    assert equal_loss_ratio(2.5, 4, budgets) == pytest.approx(math.sqrt(2))
    assert equal_loss_ratio(2.0, 4, budgets) == pytest.approx(2.0)
    assert equal_loss_ratio(3.5, 4, budgets) == pytest.approx(1 / math.sqrt(2))


def test_the_data_ratio_stops_at_the_ends_of_the_budgets():
    budgets = {2: 4.0, 4: 3.0, 8: 2.0}
    assert equal_loss_ratio(-9.0, 4, budgets) == 2.0
    assert equal_loss_ratio(9.0, 4, budgets) == 0.5


def test_a_larger_budget_that_was_worse_does_not_count_as_worse():
    assert equal_loss_ratio(2.5, 4, {2: 4.0, 4: 3.0, 6: 3.2, 8: 2.0}) == pytest.approx(
        6 * (8 / 6) ** 0.5 / 4
    )


def test_the_interval_of_the_data_ratio_holds_its_center_and_repeats():
    ended = Ended([2.5, 2.7, 2.6], 4, {2: [4.0, 4.2], 4: [3.0, 3.1], 8: [2.0, 2.2]})
    found = bootstrap([ended])
    assert found.mean == pytest.approx(ended.ratio())
    assert found.low < found.mean < found.high
    assert found[:3] == bootstrap([ended])[:3]


def comparison(ratio, rng, noise=0.01):
    """Seeds of an optimizer that needs one `ratio`th of a rival's steps, and of the rival."""

    def seeds(steps, count):
        return [3 - 0.1 * math.log2(steps) + rng.gauss(0, noise) for _ in range(count)]

    budgets = {300: seeds(300, 3), 600: seeds(600, 5), 900: seeds(900, 3), 1200: seeds(1200, 3)}
    return Ended(seeds(600 * ratio, 5), 600, budgets)


def test_a_known_data_ratio_is_found_again_and_its_intervals_cover_it(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    rng = random.Random(0)
    found = [bootstrap([comparison(1.3, rng)]) for _ in range(60)]
    assert sum(x.mean for x in found) / len(found) == pytest.approx(1.3, abs=0.03)
    assert sum(x.low <= 1.3 <= x.high for x in found) >= 55


def test_the_mean_over_workloads_is_geometric_and_its_interval_is_of_workloads_too():
    rng = random.Random(1)
    several = [comparison(ratio, rng, noise=1e-6) for ratio in (0.8, 1.25, 1.6)]
    found = bootstrap(several)
    assert found.mean == pytest.approx((0.8 * 1.25 * 1.6) ** (1 / 3), rel=1e-3)
    assert found.low == pytest.approx(0.8, rel=0.05)
    assert found.high == pytest.approx(1.6, rel=0.05)
    alone = bootstrap(several[:1])
    assert alone.high - alone.low < 0.01


def test_a_target_is_reached_where_the_line_between_the_parts_middles_crosses_it():
    curve = [4.0, 3.0, 2.0, 2.5]
    assert share_to_target(curve, 2.5) == pytest.approx(0.5)  # between the middles 3/8 and 5/8
    assert share_to_target(curve, 2.0) == pytest.approx(5 / 8)
    assert share_to_target(curve, 9.0) == pytest.approx(1 / 8)
    assert share_to_target(curve, 1.9) == math.inf


def test_the_profile_counts_the_workloads_within_a_multiple_of_the_best_time():
    found = profile([{"a": 10.0, "b": 20.0}, {"a": 30.0, "b": 15.0}, {"a": 5.0, "b": math.inf}])
    assert found == {"a": [1.0, 1.0, 2.0], "b": [1.0, 2.0, math.inf]}
    # Areas up to 4: a has 1, 1 and 2/3; b has 1, 2/3 and 0.
    assert profile_score(found["a"]) == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert profile_score(found["b"]) == pytest.approx((1 + 2 / 3) / 3)
