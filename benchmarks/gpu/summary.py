"""A run's results on one screen, made from the lines in its folder alone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import races as known_races

Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The lines of a file, of those that are about the same thing the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("kind", "stage", "race", "contender", "operator", "shape", "model", "what", "device")
    found: dict[str, Line] = {}
    for line in lines:
        key = str([line.get(key) for key in keys])
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def summary(folder: Path) -> str:
    """Stages, goals and times, in Markdown."""
    about = json.loads((folder / "machine.json").read_text())
    stages, rows = read(folder / "stages.jsonl"), read(folder / "rows.jsonl")
    what = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    parts = [f"{'REHEARSAL on ' if about['rehearsal'] else ''}{what}", table(stage_rows(stages))]
    for part in (race_rows(rows), operator_rows(rows), training_rows(rows)):
        if len(part) > 1:
            parts.append(table(part))
    if met := goals(rows):
        parts.append(table([("goal", "measured", "bound", ""), *met]))
    for line in rows:
        if line["kind"] == "failed":
            where = line.get("contender") or line.get("operator") or line.get("model")
            parts.append(f"{where} failed: {line['note']}")
    return "\n\n".join(parts) + "\n"


def table(rows: Iterable[Iterable[str]]) -> str:
    """Aligned columns, which Markdown takes too."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def stage_rows(stages: list[Line]) -> list[tuple[str, ...]]:
    found = [("stage", "outcome", "s", "note")]
    for line in stages:
        seconds = str(round(line["seconds"])) if "seconds" in line else ""
        found.append((line["stage"], line["outcome"], seconds, line["note"].replace("|", "/")[:70]))
    return found


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"


def race_rows(rows: list[Line]) -> list[tuple[str, ...]]:
    """Times of steps; ``work`` is the device's alone, ``wall`` with the host's, from idle to idle."""
    found = [
        ("race", "contender", "ms", "of first", "predicted ms", "x", "graph ms", "wall ms", "copy")
    ]
    rates = latest(rows, "rates")
    for line in (line for line in rows if line["kind"] == "race"):
        first = first_of(rows, line)
        name = line["race"] if line["device"] != "cpu" or line["quick"] else (
            f"{line['race']}, CPU, {line['threads']} threads"
        )  # fmt: skip
        copy = line["bytes"] / line["work"][0] / rates[key_of(line)]["copy"]
        found.append(
            (
                name,
                line["contender"],
                ms(line["work"][0]),
                f"{line['work'][0] / first['work'][0]:.2f}",
                ms(line["predicted"]),
                f"{line['work'][0] / line['predicted']:.2f}",
                ms(line["graph"][0] if line["graph"] else None),
                ms(line["wall"][0]),
                f"{copy:.0%}",
            )
        )
    return found


def operator_rows(rows: list[Line]) -> list[tuple[str, ...]]:
    found = [("operator", "shape", "ms", "predicted ms", "x", "GB/s", "TFLOP/s")]
    for line in (line for line in rows if line["kind"] == "operator"):
        seconds = line["work"][0]
        found.append(
            (
                line["operator"],
                " x ".join(map(str, line["shape"])),
                ms(seconds),
                ms(line["predicted"]),
                f"{seconds / line['predicted']:.2f}",
                f"{line['bytes'] / seconds / 1e9:.0f}",
                f"{line['flops'] / seconds / 1e12:.0f}" if line["flops"] else "",
            )
        )
    return found


def training_rows(rows: list[Line]) -> list[tuple[str, ...]]:
    found = [("model", "what", "wall ms", "predicted ms", "tokens/s", "of 0.5 M tokens' step")]
    for line in (line for line in rows if line["kind"] == "training"):
        share, rate = line.get("share_of_half_a_million"), line.get("tokens_per_second")
        found.append(
            (
                line["model"],
                line["what"],
                ms(line["wall"][0]),
                ms(line.get("predicted")),
                f"{rate:,.0f}" if rate else "",
                f"{share:.1%}" if share else "",
            )
        )
    return found


def goals(rows: list[Line]) -> list[tuple[str, ...]]:
    """What was asked for on an H100, and whether it is so."""
    found = []
    races = {(x["race"], x["contender"]): x for x in rows if x["kind"] == "race" and on_gpu(x)}
    rates = latest(rows, "rates")
    for name, race in known_races().items():
        for goal in race.goals:
            pair = [races.get((name, who)) for who in (goal.contender, goal.baseline)]
            if all(pair):
                value = pair[0]["work"][0] / pair[1]["work"][0]
                what = f"{name}: {goal.contender} / {goal.baseline}"
                found.append(
                    (what, f"{value:.2f}", f"<= {goal.limit:.2f}", verdict(value <= goal.limit))
                )
        for who, share in (race.bandwidth or {}).items():
            if line := races.get((name, who)):
                value = line["bytes"] / line["work"][0] / rates[key_of(line)]["copy"]
                what = f"{name}: {who}, share of the copy's bandwidth"
                found.append((what, f"{value:.0%}", f">= {share:.0%}", verdict(value >= share)))
    for line in rows:
        if line["kind"] == "training" and line["what"] == "DeepMomentum delta" and on_gpu(line):
            value = line["share_of_half_a_million"]
            found.append(
                ("step's share of 0.5 M tokens", f"{value:.1%}", "<= 8%", verdict(value <= 0.08))
            )
    return found


def verdict(met: bool) -> str:
    return "met" if met else "NOT met"


def on_gpu(line: Line) -> bool:
    return line["device"] != "cpu"


def key_of(line: Line) -> tuple[str, str]:
    return line["race"], line["device"]


def latest(rows: list[Line], kind: str) -> dict[tuple[str, str], Line]:
    return {key_of(line): line for line in rows if line["kind"] == kind}


def first_of(rows: list[Line], line: Line) -> Line:
    """The line of the race's first contender, to which others are compared."""
    return next(x for x in rows if x["kind"] == "race" and key_of(x) == key_of(line))
