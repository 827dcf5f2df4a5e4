"""Optimizers by turns on the same gradients: ``python -m benchmarks.gpu.races RACE …``."""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import work
from benchmarks.gpu.clock import Clock, captured, rates
from benchmarks.gpu.rows import RacedOptimizer, races, write_line
from benchmarks.timing import Quartiles, quartiles

ROUNDS = 30
"""A multiple of the period of every contender."""


class Runner:
    """A contender with parameters of its own, and its times."""

    def __init__(
        self, name: str, contender: RacedOptimizer, grads: list[Tensor], clock: Clock
    ) -> None:
        self.name, self.contender, self.clock = name, contender, clock
        self.step = self.made(grads)
        begun = time.perf_counter()
        for _ in range(3):
            self.step()
        clock.synchronize()
        self.first = time.perf_counter() - begun
        print(f"{name}: {self.first:.1f} s for the first three steps", flush=True)
        self.issue = statistics.median(clock.issue(self.step) for _ in range(3))
        for _ in range(-6 % contender.period):  # to the end of a period
            self.step()
        self.times: dict[str, list[float]] = {"work": [], "wall": []}

    def made(self, grads: list[Tensor], capturable: bool = False) -> Callable[[], Any]:
        params = [nn.Parameter(torch.ones_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = self.contender.make(params)
        for group in optimizer.param_groups:
            if capturable and "capturable" in group:
                group["capturable"] = True
        return optimizer.step

    def in_a_graph(self, grads: list[Tensor], rounds: int) -> Quartiles | None:
        """Times of the step's replay; None where it can't be captured."""
        if not self.clock.on_gpu or self.name == "covariance":  # which decides on the host
            return None
        replay = captured(self.made(grads, capturable=True))
        if replay is None:
            return None
        return quartiles([self.clock.work(replay) for _ in range(rounds)], self.contender.period)


def race(name: str, clock: Clock, quick: bool, folder: Path) -> None:
    """Time a race, and write its lines."""
    found = races(quick, clock.device.type)[name]
    rounds = 2 * work.PERIOD if quick else ROUNDS
    generator = torch.Generator(clock.device).manual_seed(0)
    grads = [
        (0.01 * torch.randn(shape, generator=generator, device=clock.device)).to(found.dtype)
        for shape in found.shapes
    ]
    machine = rates(clock, quick)
    about = {"race": name, "device": clock.device.type, "threads": torch.get_num_threads()}
    about["quick"] = quick
    write_line(folder, {"kind": "rates", **about, **machine._asdict()})
    runners = []
    for label, contender in found.contenders.items():
        try:
            runners.append(Runner(label, contender, grads, clock))
        except Exception as error:  # one contender less, and the race goes on
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            write_line(folder, {"kind": "failed", **about, "contender": label, "note": reason})
    order = random.Random(1)
    for _ in range(rounds):
        for runner in order.sample(runners, len(runners)):
            runner.times["work"].append(clock.work(runner.step, runner.issue))
    for _ in range(rounds):
        for runner in order.sample(runners, len(runners)):
            runner.times["wall"].append(clock.wall(runner.step))
    for runner in runners:
        phases, period = runner.contender.work, runner.contender.period
        line: dict[str, Any] = {"kind": "race", **about, "contender": runner.name}
        for key, seconds in runner.times.items():
            line[key] = quartiles(seconds, period)
        line["issue"], line["first_steps"] = runner.issue, runner.first
        try:
            line["graph"] = runner.in_a_graph(grads, rounds)
        except Exception as error:
            print(f"{runner.name} in a graph: {type(error).__name__}: {error}", flush=True)
            line["graph"] = None
        line["bytes"], line["flops"] = work.total_bytes(phases), work.total_flops(phases)
        line["predicted"] = work.roofline_seconds(phases, machine)
        write_line(folder, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("races", nargs="+", choices=races())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    clock = Clock(arguments.device)
    for name in arguments.races:
        race(name, clock, arguments.quick, arguments.out)


if __name__ == "__main__":
    main()
