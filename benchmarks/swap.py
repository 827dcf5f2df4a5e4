"""The swap: AdamW's best learning rate and weight decay, and another optimizer in its place.

For each model AdamW is tried at five learning rates a factor of two apart (seed 0). At the best of
them, and at the same weight decay, schedule, steps and data, every optimizer trains the model from
the same initial weights, with two seeds. Every finished run is a line of ``swap.jsonl``, with all
that its outcome depends on but the code; a run that has a line is not repeated, so that an
interrupted benchmark goes on, and ``--fresh`` repeats them all. ``swap.md`` and ``swap.png`` are
written from the lines alone; ``--report`` writes them again and runs nothing.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.runs import executed
from benchmarks.tables import markdown
from benchmarks.transformer import Transformer, TransformerConfig
from deepopt.data import stdlib_corpus
from deepopt.hope import Hope, HopeConfig
from deepopt.hope.checkpoint import write_atomically
from deepopt.hope.report import read_metrics
from deepopt.hope.trainer import TrainConfig, Trainer
from deepopt.memory import resolve

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
SEEDS = (0, 1)
CONFIGS: dict[str, HopeConfig | TransformerConfig] = {
    "Hope": HopeConfig(),
    "Transformer": TransformerConfig(),
}
CHALLENGERS = (
    ("Muon", None),
    ("DeepMomentum", "linear"),
    ("DeepMomentum", "covariance"),
    ("DeepMomentum", "delta"),
)


@dataclass(frozen=True)
class Run:
    """One training run; everything that is not here has the default of the training command."""

    model: str
    optimizer: str
    memory: str | None
    lr: float
    seed: int
    steps: int

    @property
    def label(self) -> str:
        return f"{self.optimizer}, {self.memory}" if self.memory else self.optimizer

    def config(self, out: Path) -> TrainConfig:
        return TrainConfig(
            out=out,
            optimizer=self.optimizer,
            memory=self.memory,
            lr=self.lr,
            seed=self.seed,
            steps=self.steps,
            quiet=True,
        )


Line = dict[str, Any]


def setting(run: Run) -> Line:
    """What the outcome of a run depends on besides the run itself and the code."""
    config = run.config(Path())
    return {
        "model_config": repr(CONFIGS[run.model]),
        "memory_config": repr(resolve(run.memory)) if run.memory else None,
        "weight_decay": config.weight_decay,
        "batch_size": config.batch_size,
        "seq_len": config.seq_len,
        "warmup": config.warmup_steps,
        "eval_windows": config.eval_windows,
        "data_sha256": data_sha256(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@functools.cache
def data_sha256() -> str:
    return stdlib_corpus().sha256


def build(config: HopeConfig | TransformerConfig) -> nn.Module:
    return Hope(config) if isinstance(config, HopeConfig) else Transformer(config)


def execute(run: Run) -> Line:
    """Train, and return the run with its setting and its outcome."""
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(run.config(Path(out)), lambda: build(CONFIGS[run.model]))
        try:
            outcome: Line = dataclasses.asdict(trainer.run())
        except FloatingPointError as error:
            outcome = {"diverged": str(error).split(";")[0]}
    return {**dataclasses.asdict(run), **setting(run), **outcome}


def bits(line: Line) -> float:
    return line.get("val_bits_per_byte", math.inf)


class Results:
    """The lines of a JSONL file, by run.

    Args:
        path: of the file.
        fresh: forget its lines.
        of_any_setting: read all lines, and leave the file as it is. Otherwise those count that
            were made in today's setting, and the others are dropped.
    """

    def __init__(self, path: Path, fresh: bool = False, of_any_setting: bool = False) -> None:
        self.path = path
        self.lines: dict[Run, Line] = {}
        names = [field.name for field in dataclasses.fields(Run)]
        for line in [] if fresh else read_metrics(path):
            run = Run(**{name: line[name] for name in names})
            if of_any_setting or setting(run).items() <= line.items():
                self.lines[run] = line
        if of_any_setting:
            return
        # Without what a kill has torn, and without lines of another setting.
        write_atomically(path, "".join(json.dumps(x) + "\n" for x in self.lines.values()).encode())

    def complete(self, runs: Iterable[Run], jobs: int) -> None:
        """Execute the runs that have no line yet, each on one thread."""
        missing = [run for run in runs if run not in self.lines]
        for place, run, line in executed(missing, execute, jobs):
            self.lines[run] = line
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            where = f"{run.model}, {run.label}, lr {run.lr:g}, seed {run.seed}"
            print(f"{place} {where}: {bits(line):.4f} bits/byte", flush=True)


def sweep(model: str, steps: int) -> list[Run]:
    return [Run(model, "AdamW", None, lr, SEEDS[0], steps) for lr in LEARNING_RATES]


def best_rate(results: Results, model: str, steps: int) -> float:
    return min(sweep(model, steps), key=lambda run: bits(results.lines[run])).lr


def swaps(model: str, lr: float, steps: int) -> list[Run]:
    names = (("AdamW", None), *CHALLENGERS)
    return [Run(model, name, memory, lr, s, steps) for name, memory in names for s in SEEDS]


def report(results: Results, steps: dict[str, int], command: str) -> str:
    """The tables, in Markdown."""
    any_line = next(iter(results.lines.values()))
    parts = [
        "# The swap: another optimizer in AdamW's place",
        f"Regenerated by `{command}` (runs that have a line in `swap.jsonl` are not repeated).",
        "Bytes of the Python standard library's sources, validation on held-out files, bits per "
        "byte at the end of the schedule: lower is better. One thread per run. Weight decay "
        f"{any_line['weight_decay']:g}, batches of {any_line['batch_size']} x "
        f"{any_line['seq_len']} bytes, {any_line['warmup']} steps of warm-up, then linear decay to "
        "zero, gradients clipped at norm 1. All optimizers start from the same weights and see the "
        "same batches. AdamW's learning rate is its best of five on seed 0; the others run at that "
        "rate and weight decay, untouched. torch's Muon runs with `match_rms_adamw` on what is a "
        "two-dimensional hidden matrix and AdamW on the rest, because it takes nothing else.",
        "![bits per byte](swap.png)",
        f"Python {any_line['python']}, torch {any_line['torch']}, data sha256 "
        f"`{any_line['data_sha256']}`.",
    ]
    for model, count in steps.items():
        lr = best_rate(results, model, count)
        runs = swaps(model, lr, count)
        lines = [results.lines[run] for run in runs]
        baseline = sum(bits(line) for line in lines[: len(SEEDS)]) / len(SEEDS)
        parts.append(f"## {model}, {lines[0]['parameters']:,} parameters, {count} steps")
        table = [
            [
                "optimizer",
                *[f"seed {seed}" for seed in SEEDS],
                "mean",
                "against AdamW",
                "CPU s/step, model",
                "CPU s/step, optimizer",
                "state, floats/parameter",
            ]
        ]
        for first in range(0, len(runs), len(SEEDS)):
            rows = lines[first : first + len(SEEDS)]
            mean = sum(map(bits, rows)) / len(rows)
            table.append(
                [
                    runs[first].label,
                    *[f"{bits(row):.4f}" for row in rows],
                    f"{mean:.4f}",
                    f"{mean - baseline:+.4f}",
                    f"{average(rows, 'model_cpu_seconds'):.3f}",
                    f"{average(rows, 'optimizer_cpu_seconds'):.4f}",
                    f"{average(rows, 'state_floats_per_parameter'):.2f}",
                ]
            )
        parts.append(markdown(table))
        ends = lr in (LEARNING_RATES[0], LEARNING_RATES[-1])
        parts.append(
            f"AdamW's learning rate (seed {SEEDS[0]}); the table above is at {lr:g}"
            + (", an end of the range, which should be extended:" if ends else ":")
        )
        values = [results.lines[run] for run in sweep(model, count)]
        parts.append(
            markdown(
                [
                    ["lr", *[f"{rate:g}" for rate in LEARNING_RATES]],
                    ["bits per byte", *[f"{bits(line):.4f}" for line in values]],
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def picture(results: Results, steps: dict[str, int]) -> bytes:
    """Every run of the swap as a dot beside AdamW's mean, model by model, as a PNG."""
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, (model, count) in zip(panels, steps.items(), strict=True):
        runs = swaps(model, best_rate(results, model, count), count)
        labels = list(dict.fromkeys(run.label for run in runs))
        for row, label in enumerate(labels):
            found = [bits(results.lines[run]) for run in runs if run.label == label]
            mean, ours = sum(found) / len(found), label.startswith("DeepMomentum")
            color = "C0" if ours else "0.45"
            axes.plot(found, [row] * len(found), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([mean], [row], "|", color=color, markersize=16, markeredgewidth=2)
            if math.isfinite(mean):
                axes.annotate(
                    f"{mean:.3f}",
                    (mean, row),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=color,
                )
            if row == 0:
                axes.axvline(mean, color="0.7", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.9)
        axes.margins(x=0.12)
        axes.set_title(f"{model}, {results.lines[runs[0]]['parameters'] / 1e6:.1f} M", fontsize=10)
        axes.set_xlabel("bits per byte on held-out files, lower is better", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=130, metadata={"Software": None})
    return image.getvalue()


def average(lines: Sequence[Line], key: str) -> float:
    """NaN where a run diverged: it has no such value."""
    return sum(line.get(key, math.nan) for line in lines) / len(lines)


def main(argv: Sequence[str]) -> int:
    defaults = TrainConfig(out=Path())
    parser = argparse.ArgumentParser("python -m benchmarks swap", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (all cores)")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="(all)")
    parser.add_argument("--steps", type=int, default=defaults.steps, help=f"({defaults.steps})")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--fresh", action="store_true", help="repeat all runs")
    again.add_argument("--report", action="store_true", help="write table and picture, run nothing")
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "swap.jsonl", arguments.fresh, arguments.report)
    steps = dict.fromkeys(arguments.models, arguments.steps)
    if not arguments.report:
        first = [run for m, count in steps.items() for run in sweep(m, count)]
        results.complete(first, arguments.jobs)
        best = {m: best_rate(results, m, count) for m, count in steps.items()}
        second = [run for m, count in steps.items() for run in swaps(m, best[m], count)]
        results.complete(second, arguments.jobs)
    given = [argument for argument in argv if argument != "--report"]
    command = " ".join(["python -m benchmarks swap", *given])
    (arguments.out / "swap.md").write_text(report(results, steps, command))
    write_atomically(arguments.out / "swap.png", picture(results, steps))
    print(f"written: {arguments.out / 'swap.md'} and swap.png", file=sys.stderr)
    return 0
