"""Writes docs/roofline.md's tables: ``python -m benchmarks.gpu.roofline``.

For every row that ``make gpu`` measures, the time that its bytes and FLOPs allow at measured rates:
the card's of docs/results/gpu/rows.jsonl, and for the rows of the last stage those of two cores of
docs/results/speed.jsonl.
"""

import argparse
import json
import math
from pathlib import Path
from typing import TypeAlias

from benchmarks import work
from benchmarks.gpu import operators, training
from benchmarks.gpu.rows import races
from benchmarks.gpu.stages import MANY_CORES
from benchmarks.gpu.summary import Table, ms, put_between, read
from benchmarks.tables import markdown
from benchmarks.work import Rates, Work

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "roofline.md"
RESULTS = ROOT / "docs" / "results"
MARKS = ("<!-- predictions: written by `python -m benchmarks.gpu.roofline` -->", "<!-- end -->")
RATES = {
    "copy": "copy, bytes read and written",
    "stream": "pass with AdamW's traffic",
    "float32": "products in float32",
    "bfloat16": "products in bfloat16",
    "tf32": "products in tf32",
    "float64": "products in float64",
}
Row: TypeAlias = tuple[str, str, Work]
"""What is stepped or computed, the name of the row, and its least work."""


def card_rates() -> Rates:
    """The rates of the first measurement in a GPU's results."""
    lines = read(RESULTS / "gpu" / "rows.jsonl")
    line = next(x for x in lines if x["kind"] == "rates" and x["device"] == "cuda")
    return Rates(*(line[name] for name in Rates._fields))


def core_rates() -> Rates:
    """The rates of two cores beside the last race on GPT-2-small's matrices."""
    race = {"case": "gpt2", "threads": 2, "device": "cpu", "quick": False}
    lines = map(json.loads, (RESULTS / "speed.jsonl").read_text().splitlines())
    return Rates(**[x for x in lines if race.items() <= x.items()][-1]["rates"])


def race_rows(device: str) -> dict[str, list[Row]]:
    """The rows of every race by its name."""
    return {
        key: [(race.title, name, it.work) for name, it in race.contenders.items()]
        for key, race in races(device=device).items()
    }


def card_rows() -> list[Row]:
    """Everything that is measured on the card."""
    rows = [row for found in race_rows("cuda").values() for row in found]
    for kernel in operators.KERNELS:
        for m, n in operators.SIDES:
            shape = (operators.BATCH, m, n)
            rows.append((" x ".join(map(str, shape)), kernel.name, kernel.work(*shape)))
    batch = training.GPT2_BATCH
    model = f"GPT-2-small, {batch[0]} x {batch[1]} tokens"
    rows.append((model, "forward and backward", training.passes_work(training.GPT2, batch)))
    rows += [(model, name, phases) for name, phases in training.step_work(training.GPT2).items()]
    batch, theirs = training.HOPE_BATCH, training.beside_hope(training.HOPE)
    model = f"forward and backward, d = {training.HOPE.dim}, {batch[0]} x {batch[1]} tokens"
    rows.append((model, "Transformer", training.passes_work(theirs, batch)))
    rows.append((model, "Hope", training.hope_work(training.HOPE, batch)))
    return rows


def rate_table(rates: Rates) -> Table:
    table: Table = [("rate", "measured")]
    for name, what in RATES.items():
        rate = getattr(rates, name)
        if not math.isnan(rate):
            unit = "B/s" if name in ("copy", "stream") else "FLOP/s"
            size, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
            table.append((what, f"{rate / size:.3g} {prefix}{unit}"))
    return table


def time_table(rows: list[Row], rates: Rates) -> Table:
    table: Table = [("of", "row", "GB", "TFLOP", "bytes alone, ms", "FLOPs alone, ms", "ms")]
    for what, name, phases in rows:
        table.append(
            (
                what,
                name,
                f"{work.total_bytes(phases) / 1e9:.3g}",
                f"{work.total_flops(phases) / 1e12:.3g}",
                ms(work.traffic_seconds(phases, rates)),
                ms(work.product_seconds(phases, rates)),
                ms(work.roofline_seconds(phases, rates)),
            )
        )
    return table


def predictions() -> str:
    """The rates of both machines and the times that they allow."""
    card, cores = card_rates(), core_rates()
    on_cores = [row for name in MANY_CORES for row in race_rows("cpu")[name]]

    def section(title: str, rows: list[Row], rates: Rates) -> list[str]:
        tables = (rate_table(rates), time_table(rows, rates))
        return [f"## {title}", *(markdown(table, aligned=True) for table in tables)]

    return "\n\n".join(
        [
            *section("The card: an H200", card_rows(), card),
            *section("The CPU: two cores of an AMD EPYC", on_cores, cores),
        ]
    )


if __name__ == "__main__":
    argparse.ArgumentParser("python -m benchmarks.gpu.roofline", description=__doc__).parse_args()
    put_between(PAGE, MARKS, predictions())
