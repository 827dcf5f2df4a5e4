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
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from benchmarks import work
from benchmarks.speed_cases import CASES, Case, Line, Row, Setting
from benchmarks.swap import markdown
from deepopt.hope.checkpoint import write_atomically
from deepopt.hope.report import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1200
"""Seconds after which a case is given up."""


class Run(NamedTuple):
    """A case on so many threads."""

    case: str
    threads: int


def conditions(setting: Setting) -> Line:
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
    """Of all that a step runs: lines of other code are told apart in the report."""
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
        found = CASES[run.case].run(setting)
    return {**run._asdict(), **conditions(setting), "code_sha256": code_sha256(), **found}


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


class Results:
    """The lines of a JSONL file, by run: those that were made under today's conditions."""

    def __init__(self, path: Path, setting: Setting, repeated: Iterable[Run] = ()) -> None:
        self.path = path
        self.lines: dict[Run, Line] = {}
        today, repeated = conditions(setting).items(), set(repeated)
        for line in read_metrics(path):
            run = Run(line["case"], line["threads"])
            if run.case in CASES and run not in repeated and today <= line.items():
                self.lines[run] = line
        # Without what a kill has torn, and without lines of other conditions.
        write_atomically(path, "".join(json.dumps(x) + "\n" for x in self.lines.values()).encode())

    def complete(self, runs: Iterable[Run], setting: Setting) -> None:
        """Execute the runs that have no line yet, one after the other."""
        missing = [run for run in runs if run not in self.lines]
        for count, run in enumerate(missing, 1):
            where = f"{count}/{len(missing)} {run.case}, {run.threads} thread(s)"
            try:
                line = execute_apart(run, Setting(setting.device, run.threads, setting.quick))
            except RuntimeError as error:
                print(f"{where}: {error}", file=sys.stderr, flush=True)
                continue
            self.lines[run] = line
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(where, *(f"\n  {t}" for t in told(CASES[run.case], line)), flush=True)
        if failed := [run for run in missing if run not in self.lines]:
            raise RuntimeError(f"{len(failed)} cases failed, see above; the others are kept")


def told(case: Case, line: Line) -> list[str]:
    return [f"{what}: {value} ({bound}): {met}" for what, value, bound, met in judged(case, line)]


# -- The report ----------------------------------------------------------------------------------


def judged(case: Case, line: Line) -> list[tuple[str, str, str, str]]:
    """Every target of a case: what, its value, its bound, and whether it is met."""
    found = []
    for target in case.targets:
        value = target.value(line)
        verdict = "not measured" if math.isnan(value) else "met" if target.met(value) else "NOT met"
        bound = f"{'>=' if target.at_least else '<='} {number(target.limit)}"
        found.append((target.what, number(value), bound, verdict))
    return found


def number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def milliseconds(row: Row, clock: str) -> str:
    median, low, high = (number(row[f"{clock}{end}"] * 1e3) for end in ("", "_low", "_high"))
    return f"{median} ({low} to {high})"


def race_table(case: Case, line: Line) -> str:
    clock = line["clock"]
    rows = {row["contender"]: row for row in line["rows"]}
    base = rows[case.baseline]
    table = [
        [
            "contender",
            "CPU ms (quartiles)",
            "wall ms (quartiles)",
            f"{clock} time / {case.baseline}",
            "GB",
            "of bandwidth",
            "GFLOP",
            "of product rate",
            "least GFLOP",
            "roofline's time / its",
            "outside of products",
            "runs",
        ]
    ]
    for name, row in rows.items():
        if reason := row.get("not_run"):
            table.append([name, f"not run: {reason}", *[""] * (len(table[0]) - 2)])
            continue
        share = row.get("products_share")
        table.append(
            [
                name,
                milliseconds(row, "cpu"),
                milliseconds(row, "wall"),
                f"{row[clock] / base[clock]:.2f}",
                number(row["bytes"] / 1e9),
                f"{row['traffic_seconds'] / row[clock]:.0%}",
                number(row["flops"] / 1e9),
                f"{row['product_seconds'] / row[clock]:.0%}",
                number(row["least_flops"] / 1e9),
                f"{row['roofline_seconds'] / row[clock]:.0%}",
                "" if share is None else f"{1 - share:.0%}",
                str(row["runs"]),
            ]
        )
    return markdown(table)


def details_table(details: Sequence[Row]) -> str:
    table = [list(details[0])]
    for row in details:
        table.append([x if isinstance(x, str) else number(x) for x in row.values()])
    return markdown(table)


def rates_table(lines: dict[Run, Line]) -> str:
    """What the machine did while the cases ran: the middle of the cases, and their range."""
    units = {"copy": "GB/s", "stream": "GB/s", "float32": "GFLOP/s", "bfloat16": "GFLOP/s"}
    names = {
        "copy": "copy, 2 x its bytes",
        "stream": "pass with AdamW's traffic",
        "float32": "products of 2048 x 2048, float32",
        "bfloat16": "products of 2048 x 2048, bfloat16",
    }
    counts = sorted({run.threads for run in lines})
    table = [["", *(f"{count} thread{'s' * (count > 1)}" for count in counts)]]
    for key, unit in units.items():
        cells = []
        for count in counts:
            found = sorted(
                line["rates"][key] / 1e9
                for run, line in lines.items()
                if run.threads == count and "rates" in line
            )
            if found:
                ends = f"({number(found[0])} to {number(found[-1])})"
                cells.append(f"{number(found[len(found) // 2])} {unit} {ends}")
            else:
                cells.append("")
        table.append([names[key], *cells])
    return markdown(table)


def report(lines: dict[Run, Line], command: str) -> str:
    """The tables, in Markdown."""
    order = [Run(name, count) for name, case in CASES.items() for count in case.threads]
    lines = {run: lines[run] for run in order if run in lines}
    any_line = next(iter(lines.values()))
    codes = sorted({line["code_sha256"][:12] for line in lines.values()})
    parts = [
        "# Speed: what a step costs",
        f"Regenerated by `{command}` (cases that have a line in `speed.jsonl` are not repeated).",
        f"{any_line['device_name']}, torch {any_line['torch']}, Python {any_line['python']}; "
        f"sha256 of the package's sources `{'`, `'.join(codes)}`"
        + (", so **lines of different code stand side by side**." if len(codes) > 1 else "."),
        "Times are of `optimizer.step()` with gradients in place. All contenders of a case take "
        "turns step by step in one process, every round in another order; given are medians "
        "and quartiles of the runs. A run is a step, or, where work recurs (covariance: the "
        f"refresh, M3: the slow read-out), the mean of the {work.PERIOD} steps of a period. On one "
        "thread CPU time counts, on two wall time. torch's Muon has "
        f"{work.NS_STEPS} steps of Newton-Schulz, as DeepMomentum has.",
    ]
    if any_line["quick"]:
        parts.append("**Made with `--quick`: to try the command, not to be quoted.**")
    if missing := [f"{run.case} ({run.threads})" for run in order if run not in lines]:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    table = [["case", "threads", "target", "measured", "bound", ""]]
    for run, line in lines.items():
        for what, value, bound, verdict in judged(CASES[run.case], line):
            table.append([run.case, str(run.threads), what, value, bound, verdict])
    parts += [
        "## Targets",
        markdown(table),
        "![times](speed.png)",
        "## The machine",
        "Measured in every case's own process before its contenders; the median over the cases, "
        "and the range.",
        rates_table(lines),
        "## Cases",
        "Bytes and FLOPs are counted by hand, phase by phase (`benchmarks/work.py`): what must be "
        "read and written once, and products with the textbook's 2 m k n, the same for torch's "
        "Muon and for DeepMomentum; so a share of the product rate beyond 100 % means that "
        "arithmetic was saved. *Of bandwidth*, *of product rate*: the time that all the "
        "bytes, or all the products, would take at the measured rates, as a share of the time. "
        "*Least GFLOP*: with symmetric products at half and Newton-Schulz on the Gram matrix where "
        "that takes less. *Roofline's time*: the sum over phases of the longer of their "
        "bytes and their least FLOPs. *Outside of products*: from a profile of one more period, "
        "the share of time that is not in the operators of matrix products.",
    ]
    for name, case in CASES.items():
        mine = {run: line for run, line in lines.items() if run.case == name}
        if mine:
            parts += [f"### {name}: {case.title}", *([case.note] if case.note else [])]
        for run, line in mine.items():
            parts.append(f"{run.threads} thread{'s' * (run.threads > 1)}:")
            if "rows" in line:
                parts.append(race_table(case, line))
            if "details" in line:
                parts.append(details_table(line["details"]))
            if "exponent" in line:
                parts.append(f"Exponent of the power law through them: {line['exponent']:.3f}.")
    return "\n\n".join(parts) + "\n"


def plot(path: Path, lines: dict[Run, Line]) -> None:
    """Times against the baseline's in every race on one thread, and step times by size."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    labels: list[str] = []
    for number_of, (name, case) in enumerate(CASES.items()):
        line: dict[str, Any] = lines.get(Run(name, 1), {})
        if "rows" not in line:
            continue
        times = {row["contender"]: row.get(line["clock"], math.nan) for row in line["rows"]}
        ours = [c for c in times if c != case.baseline and math.isfinite(times[c])]
        values = [times[c] / times[case.baseline] for c in ours]
        places = range(len(labels), len(labels) + len(ours))
        left.plot(values, places, "o", color=f"C{number_of % 10}")
        for place, value in zip(places, values, strict=True):
            left.text(value, place, f"   {value:.2f}", va="center", fontsize=6)
        labels += [f"{name}: {contender}" for contender in ours]
    left.set_yticks(range(len(labels)), labels, fontsize=6)
    left.invert_yaxis()
    left.set_xscale("log")
    left.axvline(1.0, color="k", lw=0.5)
    left.set(xlabel="CPU time / baseline's (Muon, fused AdamW, reference), one thread")
    for name in ("scaling-elementwise", "scaling-delta"):
        details = lines.get(Run(name, 1), {}).get("details", [])
        if not details:
            continue
        sizes, steps = ([d[key] for d in details] for key in ("parameters", "ms"))
        right.loglog(sizes, steps, "o-", label=name)
        right.legend()
    right.set(xlabel="parameters", ylabel="ms per step, one thread")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="(all)")
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
        for count in (arguments.threads or CASES[name].threads)
        if count in CASES[name].threads
    ]
    if not runs:
        parser.error(f"no case of {arguments.cases} runs on {arguments.threads} threads")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "speed.jsonl", setting, runs if arguments.fresh else ())
    # Asked to end, it ends the process of the case too, which would disturb what runs next.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        results.complete(runs, setting)
    finally:
        signal.signal(signal.SIGTERM, before)
        if results.lines:
            command = " ".join(["python -m benchmarks speed", *argv])
            (arguments.out / "speed.md").write_text(report(results.lines, command))
            plot(arguments.out / "speed.png", results.lines)
            print(f"written: {arguments.out / 'speed.md'}", file=sys.stderr)
    return 0
