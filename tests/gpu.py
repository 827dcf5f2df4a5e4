"""The GPU that tests run on, and in a rehearsal the CPU in its place.

DEEPOPT_REHEARSE=1 runs the tests for a GPU on the CPU, so that their own code is tried where there
is no GPU. Graphs are then played by calling the function again, and nothing can wait.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim import adam

from deepopt.optim.engine import buckets

HERE = torch.cuda.is_available()
REHEARSED = not HERE and os.environ.get("DEEPOPT_REHEARSE") == "1"
DEVICE = torch.device("cuda" if HERE else "cpu")

needs_gpu = pytest.mark.skipif(not (HERE or REHEARSED), reason="needs a GPU")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where the host waits for the device."""
    if not HERE:
        yield
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], Any], warm_up: int = 3) -> Callable[[], Any]:
    """Run ``step`` ``warm_up`` times, capture it in a graph, and return what replays it."""
    if not HERE:
        for _ in range(warm_up):
            step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # makes state and chooses kernels before the capture
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def capturing_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a rehearsal ``capturable=True`` takes parameters on the CPU."""
    if HERE:
        yield
        return
    with monkeypatch.context() as patch:
        pretend_that_cpus_capture(patch)
        yield


def pretend_that_cpus_capture(patch: pytest.MonkeyPatch) -> None:
    """Let ``capturable=True`` take parameters on the CPU, until ``patch`` is undone."""
    patch.setattr(buckets, "capturable_devices", lambda: ["cpu"])
    patch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
