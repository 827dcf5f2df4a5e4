import math
import time

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Contender


def contender(name, step, **options):
    return Contender(name, step, (), (), **options)


def test_contenders_take_turns_and_their_order_changes():
    taken = []
    made = [contender(name, lambda name=name: taken.append(name)) for name in "abc"]
    found = timing.interleave(made, 0.0, "cpu")
    rounds = ["".join(taken[start : start + 3]) for start in (6, 9, 12)]
    assert "".join(taken[:6]) == "aabbcc"
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert [times["runs"] for times in found] == [3, 3, 3]


def test_a_run_is_a_whole_period_and_rare_contenders_rest():
    taken = []
    made = [
        contender("p", lambda: taken.append("p"), period=10),
        contender("r", lambda: taken.append("r"), every=4),
    ]
    found = timing.interleave(made, 0.0, "cpu")
    assert [times["runs"] for times in found] == [1, 3]
    assert (taken.count("p"), taken.count("r")) == (2 + 10, 2 + 3)


def test_times_are_medians_of_the_means_of_periods():
    times = timing.Times(cpu=[1.0, 3.0, 4.0, 4.0, 9.0, 9.0, 100.0], wall=[2.0] * 7)
    found = times.summary(period=2)
    assert (found["runs"], found["cpu"], found["wall"]) == (3, 4.0, 2.0)
    assert found["cpu_low"] <= found["cpu"] <= found["cpu_high"]


def test_what_is_prepared_is_not_timed():
    made = contender("slow to prepare", lambda: None, prepare=lambda: time.sleep(0.05))
    (found,) = timing.interleave([made], 0.0, "cpu")
    assert found["wall"] < 0.05


def test_the_peak_is_what_was_held_at_once_beyond_the_start():
    start = torch.ones(1000)

    def step():
        for _ in range(5):
            (start + 1).add(start)

    assert timing.peak_bytes(step) == pytest.approx(8000, rel=0.05)


def test_the_share_of_products_tells_products_from_the_rest():
    left = torch.ones(1024, 1024)  # beside which the profiler costs nothing
    assert timing.share_of_products(contender("mm", lambda: left @ left)) > 0.5
    assert timing.share_of_products(contender("sin", lambda: left.sin())) == 0.0


def test_rates_are_positive():
    rates = timing.measure_rates("cpu", elements=1000, size=16)
    assert all(rate > 0 for rate in rates[:4])
    assert all(math.isnan(rate) for rate in rates[4:])  # a GPU's alone
