"""A run's results as tables, made from the lines in its folder alone.

``python -m benchmarks.gpu.summary FOLDER PAGE`` puts all of them between the marks of a page.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.gpu.rows import races as known_races
from benchmarks.tables import judged, markdown

Line: TypeAlias = dict[str, Any]
Table: TypeAlias = list[tuple[str, ...]]
MARKS = ("<!-- written by `python -m benchmarks.gpu.summary` -->", "<!-- end -->")


def read(path: Path) -> list[Line]:
    """The lines of a file; of those that are about the same thing, the last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keys = ("kind", "stage", "race", "contender", "operator", "shape", "model", "what", "device")
    found: dict[str, Line] = {}
    for line in lines:
        key = str([line.get(key) for key in keys])
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def summary(folder: Path) -> str:
    """What fits on a screen: stages, goals and the times of steps."""
    rows = read(folder / "rows.jsonl")
    parts = [machine(folder), markdown(stage_rows(read(folder / "stages.jsonl")), aligned=True)]
    parts += tables(rows, goal_rows, race_rows)
    parts += [f"failed: {name_of(line)}: {line['note'][:90]}" for line in of_kind(rows, "failed")]
    return "\n\n".join(parts) + "\n"


def report(folder: Path) -> str:
    """All that was measured."""
    rows = read(folder / "rows.jsonl")
    makers = (goal_rows, race_rows, operator_rows, training_rows, tile_rows)
    return "\n\n".join([machine(folder), *tables(rows, *makers)]) + "\n"


def machine(folder: Path) -> str:
    about = json.loads((folder / "machine.json").read_text())
    what = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return ("REHEARSAL on " if about["rehearsal"] else "") + what


def tables(rows: list[Line], *makers: Callable[[list[Line]], Table]) -> list[str]:
    """Those that have rows."""
    return [markdown(made, aligned=True) for maker in makers if len(made := maker(rows)) > 1]


def name_of(line: Line) -> str:
    return str(line.get("contender") or line.get("operator") or line.get("model"))


def stage_rows(stages: list[Line]) -> Table:
    table: Table = [("stage", "outcome", "s", "note")]
    for line in stages:
        seconds = str(round(line["seconds"])) if "seconds" in line else ""
        note = line["note"].replace("|", "/")[:70]
        table.append((line["stage"], line["outcome"], seconds, note))
    return table


def ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def of_kind(rows: list[Line], kind: str) -> list[Line]:
    return [line for line in rows if line["kind"] == kind]


def race_rows(rows: list[Line]) -> Table:
    """Times of steps: of the device alone, in a graph, and with the host from idle to idle."""
    table: Table = [
        ("race", "contender", "ms", "of first", "predicted", "x", "graph", "wall", "of copy's rate")
    ]
    rates = {key_of(line): line for line in of_kind(rows, "rates")}
    lines = of_kind(rows, "race")
    for line in lines:
        first = next(other for other in lines if key_of(other) == key_of(line))
        seconds, name = line["work"][0], line["race"]
        if line["device"] == "cpu" and not line["quick"]:
            name += f", CPU, {line['threads']} threads"
        share = line["bytes"] / seconds / rates[key_of(line)]["copy"]
        table.append(
            (
                name,
                line["contender"],
                ms(seconds),
                f"{seconds / first['work'][0]:.2f}",
                ms(line["predicted"]),
                f"{seconds / line['predicted']:.2f}",
                ms(line["graph"][0] if line["graph"] else None),
                ms(line["wall"][0]),
                f"{share:.0%}",
            )
        )
    return table


def operator_rows(rows: list[Line]) -> Table:
    table: Table = [("operator", "shape", "ms", "predicted", "x", "GB/s", "TFLOP/s")]
    for line in of_kind(rows, "operator"):
        seconds = line["work"][0]
        table.append(
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
    return table


def training_rows(rows: list[Line]) -> Table:
    table: Table = [("model", "what", "wall ms", "predicted", "tokens/s", "of 0.5 M tokens' step")]
    for line in of_kind(rows, "training"):
        share, rate = line.get("share_of_half_a_million"), line.get("tokens_per_second")
        table.append(
            (
                line["model"],
                line["what"],
                ms(line["wall"][0]),
                ms(line.get("predicted")),
                f"{rate:,.0f}" if rate else "",
                f"{share:.1%}" if share else "",
            )
        )
    return table


def tile_rows(rows: list[Line]) -> Table:
    """The three fastest tiles of every product, and cuBLAS."""
    table: Table = [("product", "shape", "tile: rows, columns, depth, warps, stages", "ms")]
    cases: dict[tuple[str, str], list[Line]] = {}
    for line in of_kind(rows, "tile"):
        cases.setdefault((line["operator"], str(line["shape"])), []).append(line)
    for lines in cases.values():
        ranked = sorted(lines, key=lambda line: line["work"][0])
        for line in [x for x in ranked if x in ranked[:3] or "cuBLAS" in x["what"]]:
            shape = " x ".join(map(str, line["shape"]))
            table.append((line["operator"], shape, line["what"], ms(line["work"][0])))
    return table


def goal_rows(rows: list[Line]) -> Table:
    """What was asked for on an H100, and whether it is so on this card."""
    table: Table = [("goal", "measured", "bound", "")]

    def add(what: str, value: float, bound: float, at_least: bool = False) -> None:
        table.append((what, *judged(value, bound, at_least, ".3g")))

    lines = {(x["race"], x["contender"]): x for x in of_kind(rows, "race") if x["device"] != "cpu"}
    rates = {key_of(line): line for line in of_kind(rows, "rates")}
    for name, race in known_races().items():
        for goal in race.goals:
            if {(name, goal.contender), (name, goal.baseline)} <= lines.keys():
                ours, theirs = lines[name, goal.contender], lines[name, goal.baseline]
                what = f"{name}: {goal.contender} / {goal.baseline}"
                add(what, ours["work"][0] / theirs["work"][0], goal.limit)
        for who, share in race.bandwidth.items():
            if line := lines.get((name, who)):
                value = line["bytes"] / line["work"][0] / rates[key_of(line)]["copy"]
                add(f"{name}: {who}, share of the copy's rate", value, share, at_least=True)
    for line in of_kind(rows, "training"):
        if line["what"] == "DeepMomentum delta" and line["device"] != "cpu":
            share = line["share_of_half_a_million"]
            add("a step's share of one of 0.5 M tokens", share, 0.08)
    return table


def key_of(line: Line) -> tuple[str, str]:
    return line["race"], line["device"]


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    old = page.read_text()
    if not all(mark in old for mark in marks):
        raise ValueError(f"{page} must have the lines {marks[0]!r} and {marks[1]!r}")
    before, rest = old.split(marks[0], 1)
    after = rest.split(marks[1], 1)[1]
    page.write_text("\n\n".join([before + marks[0], text.strip(), marks[1] + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    put_between(arguments.page, MARKS, report(arguments.folder))


if __name__ == "__main__":
    main()
