"""Processes that run the checks of a module together, once, and what became of each check.

A module of checks ends with ``world.main()`` and marks its functions with ``@check(size)``.
Starting processes costs seconds, so that all checks of a size share one start.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = 240
_checks: dict[int, list[Callable[[Path], None]]] = {2: [], 4: []}


def check(size: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(function: Callable[[Path], None]) -> Callable[[Path], None]:
        _checks[size].append(function)
        return function

    return add


def main() -> None:
    """In one process of a world: run its checks; the first that fails ends the process."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    done = []
    for function in _checks[size]:
        report = {"name": function.__name__, "error": None}
        shared = folder / function.__name__
        shared.mkdir(exist_ok=True)
        torch.manual_seed(0)
        start = time.process_time()
        try:
            function(shared)
        except Exception:
            report["error"] = traceback.format_exc()
        report["seconds"] = time.process_time() - start
        done.append(report)
        (folder / f"{rank}.json").write_text(json.dumps(done))
        if report["error"]:
            os._exit(1)  # the others may wait for this process in vain
    dist.barrier()
    dist.destroy_process_group()


def names(size: int) -> list[str]:
    return [function.__name__ for function in _checks[size]]


def run(module: Path, size: int, folder: Path) -> dict[str, str | None]:
    """What each check of ``module`` said on the first process that it failed on, or None."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    processes = []
    for rank in range(size):
        with open(folder / f"{rank}.log", "w") as log:
            command = [sys.executable, str(module), str(rank), str(size), str(folder)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and all(p.poll() is None for p in processes):
        time.sleep(0.05)
    if all(p.poll() in (0, None) for p in processes):
        for process in processes:
            try:
                process.wait(max(0.1, min(30, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                break
    codes = [process.poll() for process in processes]  # None: killed here, because another ended
    for process in processes:
        process.kill()
        process.wait()
    found: dict[str, str | None] = {}
    for rank in range(size):
        path = folder / f"{rank}.json"
        for report in json.loads(path.read_text()) if path.exists() else ():
            said = found.setdefault(report["name"], None)
            if report["error"]:
                found[report["name"]] = f"{said or ''}process {rank}: {report['error']}\n"
    for name in names(size):
        if name not in found:
            logs = [(folder / f"{rank}.log").read_text()[-2000:] for rank in range(size)]
            said = "\n".join(logs)
            found[name] = f"did not run to its end; processes ended with {codes}, saying: {said}"
    return found
