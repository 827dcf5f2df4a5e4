"""How contenders are timed: in turns, in one process; and what the machine can do at best."""

import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.work import Rates, Work

Clock = Literal["cpu", "wall"]
PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "dot")}
"""Operators whose own time is that of matrix products."""
PRODUCT_OPERATORS = {
    f"deepopt::{name}" for name in ("newton_schulz", "delta_write", "gram_average")
}
"""Compiled operators that are products for all but a small part of their own time."""


@dataclass(frozen=True)
class Contender:
    """What is timed, and the work that it does by hand's count."""

    name: str
    step: Callable[[], Any]
    work: Work
    least: Work
    """The same with the least arithmetic."""
    period: int = 1
    """Steps after which its work repeats: they are timed as one run, and their mean is given."""
    prepare: Callable[[], Any] | None = None
    """Called before every step, not timed."""
    every: int = 1
    """It takes part in one of so many rounds: for the slow ones that no target needs."""


class Summary(TypedDict):
    """Seconds of a step: medians and quartiles of the runs."""

    runs: int
    cpu: float
    cpu_low: float
    cpu_high: float
    wall: float
    wall_low: float
    wall_high: float


class Quartiles(NamedTuple):
    """Seconds."""

    median: float
    low: float
    high: float


def quartiles(seconds: Sequence[float], period: int = 1) -> Quartiles:
    """The median and quartiles of the means over whole periods of steps."""
    means = [
        statistics.fmean(seconds[first : first + period])
        for first in range(0, len(seconds) - period + 1, period)
    ]
    low, median, high = statistics.quantiles(means, n=4) if len(means) > 1 else means * 3
    return Quartiles(median, low, high)


@dataclass
class Times:
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self, period: int) -> Summary:
        """Median and quartiles of the runs, means over whole periods of steps."""
        cpu, wall = quartiles(self.cpu, period), quartiles(self.wall, period)
        return {
            "runs": len(self.cpu) // period,
            "cpu": cpu.median,
            "cpu_low": cpu.low,
            "cpu_high": cpu.high,
            "wall": wall.median,
            "wall_low": wall.low,
            "wall_high": wall.high,
        }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def clock_of(device: str) -> Clock:
    """Which time counts: on one thread of the CPU its own, which other processes do not slow."""
    return "cpu" if device == "cpu" and torch.get_num_threads() == 1 else "wall"


def timed(step: Callable[[], Any], device: str) -> tuple[float, float]:
    """CPU time, of all threads, and wall time of a call; on another device until it is done."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    cpu = time.process_time() - cpu
    synchronize(device)
    return cpu, time.perf_counter() - wall


def interleave(
    contenders: Sequence[Contender], seconds: float, device: str, most: int = 400
) -> list[Summary]:
    """Time the contenders in turns, step by step.

    Every contender is stepped twice before the first round, and each round has a random order of
    its own. The rounds end after ``seconds`` or ``most`` rounds, but not before the third, and only
    at the end of every contender's period.
    """
    periods = max(contender.period for contender in contenders)
    for contender in contenders:
        for _ in range(2):
            turn(contender, device)
    found = [Times() for _ in contenders]
    begun, rounds, order = time.perf_counter(), 0, random.Random(1)
    gc.collect()
    gc.disable()
    try:
        while (
            rounds < 3
            or rounds % periods
            or (rounds < most and time.perf_counter() - begun < seconds)
        ):
            # Whom a step follows counts: what the one before left in the caches, written or not.
            for index in order.sample(range(len(contenders)), len(contenders)):
                if rounds % contenders[index].every:
                    continue
                cpu, wall = turn(contenders[index], device)
                found[index].cpu.append(cpu)
                found[index].wall.append(wall)
            rounds += 1
    finally:
        gc.enable()
    return [
        times.summary(contender.period) for contender, times in zip(contenders, found, strict=True)
    ]


def turn(contender: Contender, device: str) -> tuple[float, float]:
    if contender.prepare is not None:
        contender.prepare()
    return timed(contender.step, device)


# -- The machine ---------------------------------------------------------------------------------


def measure_rates(device: str, elements: int = 2**26, size: int = 2048) -> Rates:
    """Medians of five, in turns.

    ``stream`` is a pass with AdamW's traffic and next to no arithmetic: three tensors are read and
    written in place, a fourth is read.
    """
    a, b, c, grad = (torch.ones(elements, device=device) for _ in range(4))
    wide = torch.randn(2, size, size, device=device)
    narrow = wide.bfloat16()

    def stream() -> None:
        a.add_(grad)
        b.mul_(1.0)
        c.mul_(1.0)

    work: list[tuple[Callable[[], Any], float]] = [
        (lambda: a.copy_(grad), 8 * elements),
        (stream, 28 * elements),
        (lambda: wide[0] @ wide[1], 2 * size**3),
        (lambda: narrow[0] @ narrow[1], 2 * size**3),
    ]
    contenders = [Contender("", step, (), ()) for step, _ in work]
    times = interleave(contenders, 0.0, device, most=5)
    clock = clock_of(device)
    return Rates(*(amount / t[clock] for (_, amount), t in zip(work, times, strict=True)))


# -- Profiles ------------------------------------------------------------------------------------


def profiled(step: Callable[[], Any]) -> tuple[float, dict[str, tuple[float, int]]]:
    """Microseconds of a call on one thread, and of every operator in it its own, with its calls."""
    with profile(activities=[ProfilerActivity.CPU]) as found, record_function("whole"):
        step()
    events = {event.key: event for event in found.key_averages()}
    whole = events.pop("whole").cpu_time_total
    own = {
        key: (float(event.self_cpu_time_total), event.count)
        for key, event in events.items()
        if "::" in key
    }
    return whole, own


def share_of_products(contender: Contender) -> float:
    """The share of the time of a period of steps that is in matrix products."""

    def period() -> None:
        for _ in range(contender.period):
            contender.step()

    whole, own = profiled(period)
    names = PRODUCTS | PRODUCT_OPERATORS
    return sum(time for key, (time, _) in own.items() if key in names) / whole


def peak_bytes(step: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator had given out during a call, beyond what it had before.

    Memory that C++ code takes without torch is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
