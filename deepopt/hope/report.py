"""What a training run shows: progress while it runs, its metrics file, its plot."""

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

from deepopt.hope.checkpoint import write_atomically

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


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl, up to one that a kill has torn."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def keep_lines(path: Path, step: int) -> None:
    """Cut from a metrics.jsonl what lies beyond ``step``: the run takes these steps again."""
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(lines).encode())


def plot(path: Path, runs: Mapping[str, Path]) -> None:
    """Draw the bits per byte of runs, by label: training thin and smoothed, held out with dots."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, metrics) in enumerate(runs.items()):
        lines = list(read_metrics(metrics))
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
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomically(path, image.getvalue())
