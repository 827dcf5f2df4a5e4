"""Runs all stages of ``make gpu``: ``python3 -m benchmarks.gpu --minutes 9 --out DIR``.

It needs torch, Triton, pytest, hypothesis, ninja and nvcc, and no network. Every stage runs in a
process of its own with a time limit, and leaves its log and its lines in DIR when it ends. A stage
that fails, hangs or crashes does not stop the next. A summary that fits on a screen is printed last
and written to DIR/summary.md; DIR/report.md has all that was measured.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.stages import PLANTED, STAGES, Stage
from benchmarks.gpu.summary import report, summary

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "triton", "pytest", "hypothesis", "ninja")
LEAST = 10.0
"""Seconds below which a stage is not begun."""


def run(stage: Stage, folder: Path, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Run a stage, with its log in ``folder``, and say what became of it."""
    missing = stage.needs and not (stage.needs in os.environ or shutil.which(stage.needs))
    if missing and not rehearse:
        return {"stage": stage.name, "outcome": "left out", "note": f"no {stage.needs} here"}
    command = [part.format(out=folder) for part in (stage.rehearsal if rehearse else stage.command)]
    environment = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **({"DEEPOPT_REHEARSE": "1", "TRITON_INTERPRET": "1"} if rehearse else stage.environment),
    }
    path = folder / f"{stage.name}.log"
    begun = time.monotonic()
    with open(path, "w") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all that it starts ends with it
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    return {
        "stage": stage.name,
        "outcome": outcome(code),
        "exit": code,
        "seconds": round(time.monotonic() - begun, 1),
        "limit": round(seconds, 1),
        "note": headline(path.read_text(errors="replace"), code),
    }


def end(process: subprocess.Popen[Any]) -> None:
    """Kill what is left of a stage."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(code: int | None) -> str:
    if code is None:
        return "TIMED OUT"
    return "passed" if code == 0 else "CRASHED" if code < 0 or code > 128 else "FAILED"


def headline(log: str, code: int | None) -> str:
    """The most telling line of a log."""
    closing = r"^\W*(\d+ (?:passed|failed|skipped|error).*?) in [\d.]+s"
    counts = re.findall(closing, log, re.MULTILINE)
    if counts:
        return counts[-1]
    lines = [line.strip() for line in log.splitlines()[1:] if line.strip()]
    if not code and lines and lines[-1].startswith("{"):
        return f"{sum(line.startswith('{') for line in lines)} lines"
    wrong = [line for line in lines if re.search(r"error|exception", line, re.IGNORECASE)]
    last = (wrong if code else lines) or lines
    return last[-1][:90] if last else ""


def machine() -> dict[str, Any]:
    """What the results depend on besides the code."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "cores": os.cpu_count()}
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"missing here, and needed: {', '.join(missing)}", flush=True)
    if "torch" not in missing:
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            found["card"] = properties.name
            found["memory_gib"] = round(properties.total_memory / 2**30)
    if "triton" not in missing:
        from importlib.metadata import version

        found["triton"] = version("triton")
    if nvcc := shutil.which("nvcc"):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found["nvcc"] = "".join(re.findall(r"release ([\d.]+)", said))
    return found


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together (9)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="(runs/gpu)")
    parser.add_argument("--rehearse", action="store_true", help="try the script without a GPU")
    known = {stage.name: stage for stage in (*STAGES, *PLANTED)}
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"(all of {', '.join(known)})")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.stages if name not in known]:
        parser.error(f"unknown stages: {', '.join(unknown)}; choose from {', '.join(known)}")
    chosen = [known[name] for name in arguments.stages] or [
        *STAGES[:3], *(PLANTED if arguments.rehearse else ()), *STAGES[3:],
    ]  # fmt: skip
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.stages:  # a run of its own
        for name in ("stages.jsonl", "rows.jsonl"):
            (folder / name).unlink(missing_ok=True)
    end_of_all = time.monotonic() + 60 * arguments.minutes
    about = {"machine": machine(), "rehearsal": arguments.rehearse}
    (folder / "machine.json").write_text(json.dumps(about) + "\n")
    print(json.dumps(about), flush=True)
    if not arguments.rehearse and "card" not in about["machine"]:
        print("torch finds no GPU here; `make gpu REHEARSE=1` tries the script without one")
        return 2
    lock = threading.Lock()

    def result_of(stage: Stage) -> dict[str, Any]:
        left = end_of_all - time.monotonic()
        if left < LEAST:
            result = {"stage": stage.name, "outcome": "not run", "note": "no time was left"}
        else:
            result = run(stage, folder, min(stage.seconds, left), arguments.rehearse)
        with lock:
            with open(folder / "stages.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{stage.name}: {result['outcome']}, {result['note']}", flush=True)
            (folder / "summary.md").write_text(summary(folder))
        return result

    # One after the other on a GPU; a rehearsal, which times nothing that counts, uses all cores.
    with ThreadPoolExecutor(os.cpu_count() if arguments.rehearse else 1) as pool:
        results = list(pool.map(result_of, chosen))
    (folder / "report.md").write_text(report(folder))
    print("\n" + summary(folder))
    wrong = [
        stage.name
        for stage, result in zip(chosen, results, strict=True)
        if result["outcome"] not in (stage.expected, "left out")
    ]
    if wrong:
        print(f"not as they should be: {', '.join(wrong)}; their logs are in {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
