"""What a training run shows: progress while it runs, its metrics file, its plot."""

import io
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from deepopt._files import read_lines, write_atomically

SECONDS_BETWEEN_LINES = 10


class Progress:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, name: str, first: int, last: int, tokens_per_step: int, quiet: bool) -> None:
        self.name, self.first, self.last, self.step = name, first, last, first
        self.tokens_per_step = tokens_per_step
        self.began = self.last_line = time.monotonic()
        self.lines = not quiet and not sys.stderr.isatty()
        self.bar = tqdm(
            total=last, initial=first, desc=name, unit="step", disable=quiet or self.lines
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, loss: float) -> None:
        """Count a step and show its loss."""
        self.step += 1
        now = time.monotonic()
        tokens = self.tokens_per_step * (self.step - self.first)
        text = (
            f"loss {loss:.3f}, {loss / math.log(2):.3f} bits/byte, "
            f"{tokens / (now - self.began):,.0f} tokens/s"
        )
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.lines and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self._print(text)
            self.last_line = now

    def show_validation(self, loss: float) -> None:
        """Show the loss on held-out text."""
        text = f"held out: loss {loss:.3f}, {loss / math.log(2):.3f} bits/byte"
        if self.lines:
            self._print(text)
        elif not self.bar.disable:
            self.bar.write(f"step {self.step}: {text}", file=sys.stderr)

    def _print(self, text: str) -> None:
        print(f"{self.name} step {self.step}/{self.last}: {text}", file=sys.stderr, flush=True)


def keep_lines(path: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl after ``step``; the resumed run writes them again."""
    lines = [json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step]
    write_atomically(path, "".join(lines).encode())


def plot(path: Path, runs: Mapping[str, Path]) -> None:
    """Draw runs by label: bits per byte, and beside it the relative size of updates.

    The training loss is a thin smoothed line; the held-out loss has dots. The right plot has
    the root mean square of every update over that of its parameter, at the steps that were watched:
    the median over the parameters, and a band from the first to the third quartile.
    """
    lines_of = {label: list(read_lines(metrics)) for label, metrics in runs.items()}
    watched = any("diagnostics" in line for lines in lines_of.values() for line in lines)
    figure = Figure(figsize=(11 if watched else 7, 4.5), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if watched else 1, squeeze=False)[0]
    for index, (label, lines) in enumerate(lines_of.items()):
        smooth, curve = math.nan, []
        for line in lines:
            if "bits_per_byte" in line:
                value = line["bits_per_byte"]
                smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
                curve.append((line["step"], smooth))
        held_out = [(x["step"], x["val_bits_per_byte"]) for x in lines if "val_bits_per_byte" in x]
        color = f"C{index}"
        if curve:
            axes.plot(*zip(*curve, strict=True), color=color, alpha=0.4, label=f"{label}, training")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o-", color=color, label=f"{label}, held out")
        for right in beside:
            _plot_ratios(right, lines, color, label)
    axes.set(xlabel="step", ylabel="bits per byte")
    for each in (axes, *beside):
        each.grid(alpha=0.3)
        each.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomically(path, image.getvalue())


def _plot_ratios(axes: Any, lines: list[dict[str, Any]], color: str, label: str) -> None:
    found = [(x["step"], x["diagnostics"]) for x in lines if "diagnostics" in x]
    axes.set(xlabel="step", ylabel="update / parameter", yscale="log")
    if not found:
        return
    steps = [step for step, _ in found]
    ratios = [sorted(row["ratio"] for row in rows.values()) for _, rows in found]
    low, middle, high = ([r[int(q * (len(r) - 1))] for r in ratios] for q in (0.25, 0.5, 0.75))
    axes.plot(steps, middle, "o-", color=color, label=label)
    axes.fill_between(steps, low, high, color=color, alpha=0.2)
