"""How steps are timed on a GPU, and what the card can do; a CPU takes the same calls."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import measure_rates, quartiles
from benchmarks.work import Rates

Step = Callable[[], Any]
CYCLES = 2e9
"""Cycles of a GPU's clock per second, about. The pause before a timed step is counted in them."""


class Clock:
    """Times calls on a device.

    Before each the caches are flushed: 256 MiB are written, five times the L2 of an H100.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        size = 2**28 if self.on_gpu else 2**20
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)
        if self.on_gpu:
            self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def wall(self, step: Step) -> float:
        """Seconds from the call, on an idle device, until all of its work is done."""
        self._flushed.zero_()
        self.synchronize()
        begun = time.perf_counter()
        step()
        self.synchronize()
        return time.perf_counter() - begun

    def issue(self, step: Step) -> float:
        """Seconds until the call returns, its work not yet done."""
        self.synchronize()
        begun = time.perf_counter()
        step()
        issued = time.perf_counter() - begun
        self.synchronize()
        return issued

    def work(self, step: Step, issue: float = 0.0) -> float:
        """Seconds that the device works on the call, by CUDA events.

        The device pauses first, for as long as the host needs to hand the work over (``issue``), so
        that it never waits for the host in between.
        """
        if not self.on_gpu:
            return self.wall(step)
        self._flushed.zero_()
        torch.cuda._sleep(int(CYCLES * min(0.1, 1.5 * issue + 1e-4)))
        self._start.record()
        step()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1e3


def captured(step: Step) -> Step | None:
    """What replays ``step`` as a CUDA graph; None where it can't be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception as error:
        print(f"not captured: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph.replay


def rates(clock: Clock, quick: bool = False) -> Rates:
    """What the card does at best: medians of ten, with operands that no cache holds."""
    if not clock.on_gpu:
        return measure_rates("cpu", *((2**20, 128) if quick else ()))
    device = clock.device

    def best(step: Step, amount: float) -> float:
        for _ in range(3):
            step()
        return amount / quartiles([clock.work(step) for _ in range(10)]).median

    def product(size: int, dtype: torch.dtype) -> float:
        left, right = torch.randn(2, size, size, device=device).to(dtype)
        return best(lambda: left @ right, 2.0 * size**3)

    tensors = torch.ones(4, 2**28, device=device)

    def stream() -> None:  # AdamW's traffic: three tensors read and written, one read
        torch.add(tensors[0], tensors[3], out=tensors[0])
        torch.mul(tensors[1], 1.0, out=tensors[1])
        torch.mul(tensors[2], 1.0, out=tensors[2])

    found = {
        "copy": best(lambda: tensors[0].copy_(tensors[3]), 8.0 * 2**28),
        "stream": best(stream, 28.0 * 2**28),
        "float32": product(4096, torch.float32),
        "bfloat16": product(8192, torch.bfloat16),
        "float64": product(4096, torch.float64),
    }
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = product(8192, torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = before
    return Rates(**found)
