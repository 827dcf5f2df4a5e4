"""Races: contenders that take turns, and targets about their times."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import work
from benchmarks.speed import optimizers
from benchmarks.speed.case import Counts, Found, NotRun, RaceRow, Setting, Target
from benchmarks.timing import (
    Contender,
    clock_of,
    interleave,
    measure_rates,
    share_of_products,
    turn,
)
from benchmarks.work import Rates

PATIENCE = 180.0
"""Seconds that another package may take to compile its first step."""


def race(
    factories: Mapping[str, Callable[[], Contender]],
    seconds: float,
    setting: Setting,
    share: Sequence[str] = (),
) -> Found:
    """Time contenders in turns beside what the machine can do.

    Args:
        factories: make the contenders. Where one of another package raises, its reason is its
            result.
        seconds: how long the race should take.
        setting: the run's setting.
        share: names of contenders whose time is to be split into products and the rest.
    """
    device = setting.device
    sizes = {"elements": 2**23, "size": 512} if setting.quick else {}
    rates = measure_rates(device, **sizes)
    contenders, not_run = line_up(factories, device)
    times = interleave(contenders, setting.seconds(seconds), device)
    raced: list[RaceRow] = []
    for contender, found in zip(contenders, times, strict=True):
        raced.append({"contender": contender.name, **found, **counted(contender, rates)})
        if contender.name in share and setting.threads == 1 and device == "cpu":
            raced[-1]["products_share"] = share_of_products(contender)
    return {"rates": rates._asdict(), "clock": clock_of(device), "rows": [*raced, *not_run]}


def line_up(
    factories: Mapping[str, Callable[[], Contender]], device: str
) -> tuple[list[Contender], list[NotRun]]:
    """The contenders; and those of other packages that raised, with their reasons."""
    contenders: list[Contender] = []
    not_run: list[NotRun] = []
    for name, factory in factories.items():
        others = name in optimizers.OTHERS
        try:
            with patience(PATIENCE if others else 0.0):
                contender = factory()
                if others:
                    turn(contender, device)
        except Exception as error:
            if not others:
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            not_run.append({"contender": name, "not_run": reason})
            continue
        contenders.append(contender)
    return contenders, not_run


def counted(contender: Contender, rates: Rates) -> Counts:
    return {
        "bytes": work.total_bytes(contender.work),
        "flops": work.total_flops(contender.work),
        "least_flops": work.total_flops(contender.least),
        "traffic_seconds": work.traffic_seconds(contender.work, rates),
        "product_seconds": work.product_seconds(contender.work, rates),
        "roofline_seconds": work.roofline_seconds(contender.least, rates),
    }


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds; 0 waits for ever."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"its first step took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def row_of(line: Found, contender: str) -> RaceRow | NotRun:
    for row in line["rows"]:
        if row["contender"] == contender:
            return row
    raise KeyError(f"no contender {contender!r} in case {line.get('case')!r}")


def seconds_of(line: Found, contender: str) -> float:
    """By the clock that counts; NaN for a contender that did not run."""
    row = row_of(line, contender)
    return math.nan if "not_run" in row else row[line["clock"]]


def rest_of(line: Found, contender: str) -> float:
    """The share of its time that is not products; NaN where that was not measured."""
    row = row_of(line, contender)
    return math.nan if "not_run" in row else 1 - row.get("products_share", math.nan)


def ratio(contender: str, baseline: str, limit: float, what: str = "") -> Target:
    """A contender's time over another's."""
    return Target(
        what or f"{contender} / {baseline}",
        lambda line: seconds_of(line, contender) / seconds_of(line, baseline),
        limit,
    )


def rest(contender: str) -> Target:
    """What is not products, of a contender's time."""
    return Target(
        f"{contender}: time outside of matrix products",
        lambda line: rest_of(line, contender),
        0.15,
    )
