"""Writes docs/roofline.md's table: ``python -m benchmarks.gpu.roofline``.

For every row that ``make gpu`` measures, the time that its bytes and FLOPs allow at the rates of
docs/results/gpu/rows.jsonl, which were measured on the card that its page names.
"""

from pathlib import Path

from benchmarks import work
from benchmarks.gpu import operators, training
from benchmarks.gpu.rows import predicted_seconds, races
from benchmarks.gpu.summary import Table, ms, put_between, read
from benchmarks.tables import markdown
from benchmarks.work import Rates, Work

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "roofline.md"
MEASURED = ROOT / "docs" / "results" / "gpu" / "rows.jsonl"
MARKS = ("<!-- predictions: written by `python -m benchmarks.gpu.roofline` -->", "<!-- end -->")
UNITS = {
    "copy": ("copy, bytes read and written", 1e12, "TB/s"),
    "stream": ("pass with AdamW's traffic", 1e12, "TB/s"),
    "float32": ("products in float32", 1e12, "TFLOP/s"),
    "bfloat16": ("products in bfloat16", 1e12, "TFLOP/s"),
    "tf32": ("products in tf32", 1e12, "TFLOP/s"),
    "float64": ("products in float64", 1e12, "TFLOP/s"),
}


def measured_rates() -> Rates:
    """The rates of the first measurement in a GPU's results."""
    line = next(x for x in read(MEASURED) if x["kind"] == "rates" and x["device"] == "cuda")
    return Rates(*(line[name] for name in Rates._fields))


def predicted_rows() -> list[tuple[str, str, Work]]:
    """(what, of which, its least work) of everything that is measured."""
    rows: list[tuple[str, str, Work]] = []
    for race in races().values():
        rows += [(race.title, name, it.work) for name, it in race.contenders.items()]
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


def predictions(rates: Rates) -> str:
    """The tables of rates and of predicted times."""
    machine: Table = [("rate", "measured")]
    for name, (what, unit, label) in UNITS.items():
        machine.append((what, f"{getattr(rates, name) / unit:.3g} {label}"))
    table: Table = [("of", "row", "GB", "TFLOP", "bytes alone, ms", "FLOPs alone, ms", "ms")]
    for what, name, phases in predicted_rows():
        table.append(
            (
                what,
                name,
                f"{work.total_bytes(phases) / 1e9:.3g}",
                f"{work.total_flops(phases) / 1e12:.3g}",
                ms(work.traffic_seconds(phases, rates)),
                ms(work.product_seconds(phases, rates)),
                ms(predicted_seconds(phases, rates)),
            )
        )
    return "\n\n".join(markdown(rows, aligned=True) for rows in (machine, table))


if __name__ == "__main__":
    put_between(PAGE, MARKS, predictions(measured_rates()))
