"""Speed: what a step costs against torch's optimizers, and against what the machine can do.

Every case runs in a process of its own, in which its contenders take turns, step by step, beside
a measurement of the machine's bandwidth and of its rate of matrix products. A finished case is a
line of ``speed.jsonl``, with its medians and quartiles of CPU and wall time and all that they
depend on but the code; a case that has a line is not repeated, but with ``--fresh``, for when its
code has changed. ``speed.md`` and ``speed.png`` are made from the lines alone: the targets, met or
not, and for every contender its bytes and FLOPs counted by hand (``benchmarks/work.py``) as shares
of what was measured.
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from benchmarks.runs import Results
from benchmarks.speed import catalog
from benchmarks.speed.case import Conditions, Line, Run, Setting
from benchmarks.speed.report import judged, plot, report

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200
"""Seconds after which a case is given up."""


def conditions(setting: Setting) -> Conditions:
    """What a time depends on besides the run and the code."""
    return {
        "device": setting.device,
        "device_name": device_name(setting.device),
        "quick": setting.quick,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def code_sha256() -> str:
    """The hash of all code that a step runs, by which the report tells lines of other code."""
    digest = hashlib.sha256()
    for folder in ("deepopt", "csrc"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def execute(run: Run, setting: Setting) -> Line:
    """The line of a case, measured in this process."""
    torch.set_num_threads(run.threads)
    with torch.no_grad():
        found = catalog.CASES[run.case].run(setting)
    return {
        "case": run.case,
        "threads": run.threads,
        **conditions(setting),
        "code_sha256": code_sha256(),
        **found,
    }


def execute_apart(run: Run, setting: Setting) -> Line:
    """The same in a new process, whose memory and allocator nothing has used."""
    command = [sys.executable, "-m", "benchmarks", "speed", "--worker", json.dumps(asdict(setting))]
    command += ["--cases", run.case]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it starts, such as compilers, ends with it
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"it took more than {LIMIT} s") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        raise RuntimeError(f"its process ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


class Measurement(NamedTuple):
    """A case on some threads of a device, with many repeats or few."""

    run: Run
    device: str
    quick: bool

    def __str__(self) -> str:
        return f"{self.run.case}, {self.run.threads} thread(s)"


def results(path: Path, setting: Setting) -> Results[Measurement]:
    """The lines of a file; those count that were made under today's conditions."""
    today = conditions(setting).items()

    def measurement(line: dict[str, Any]) -> Measurement:
        return Measurement(Run(line["case"], line["threads"]), line["device"], line["quick"])

    def counts(measurement: Measurement, line: dict[str, Any]) -> bool:
        return measurement.run.case in catalog.CASES and today <= line.items()

    return Results([path], measurement, lambda _: path, counts)


def describe(measurement: Measurement, line: dict[str, Any]) -> str:
    rows = judged(catalog.CASES[measurement.run.case], cast(Line, line))
    return "".join(f"\n  {what}: {value} ({bound}): {met}" for what, value, bound, met in rows)


def main(argv: Sequence[str]) -> int:
    cases = catalog.CASES
    parser = argparse.ArgumentParser("python -m benchmarks speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), help="(all)")
    parser.add_argument("--threads", nargs="+", type=int, help="(one and two, where that matters)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--quick", action="store_true", help="few repeats, to try it")
    parser.add_argument("--fresh", action="store_true", help="repeat cases that have a line")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        setting = Setting(**json.loads(arguments.worker))
        print(json.dumps(execute(Run(arguments.cases[0], setting.threads), setting)))
        return 0
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        parser.error(f"Invalid --device: {arguments.device!r}: {str(error).splitlines()[0]}")
    setting = Setting(device=arguments.device, quick=arguments.quick)
    runs = [
        Run(name, count)
        for name in arguments.cases
        for count in (arguments.threads or cases[name].threads)
        if count in cases[name].threads
    ]
    if not runs:
        parser.error(f"no case of {arguments.cases} runs on {arguments.threads} threads")
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = results(arguments.out / "speed.jsonl", setting)
    asked = [Measurement(run, setting.device, setting.quick) for run in runs]
    if arguments.fresh:
        found.forget(asked)

    def measure(measurement: Measurement) -> dict[str, Any]:
        threads = measurement.run.threads
        return {**execute_apart(measurement.run, Setting(setting.device, threads, setting.quick))}

    # Asked to end, it ends the process of the case too, which would disturb what runs next.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        found.complete(asked, measure, 1, describe)
    finally:
        signal.signal(signal.SIGTERM, before)
        if lines := {
            measurement.run: cast(Line, line) for measurement, line in found.lines.items()
        }:
            command = " ".join(["python -m benchmarks speed", *argv])
            (arguments.out / "speed.md").write_text(report(lines, command))
            plot(arguments.out / "speed.png", lines)
            print(f"written: {arguments.out / 'speed.md'}", file=sys.stderr)
    return 0
