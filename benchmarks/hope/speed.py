"""How fast Hope is beside Hope-Attention, a Transformer++ and a gated DeltaNet.

All have as many parameters. Every measurement is a line of ``hope_speed.jsonl``; ``hope_speed.md``
is made from the lines alone, and ``--report`` writes it again and runs nothing.
"""

import argparse
import gc
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.hope.models import build, parameters
from benchmarks.runs import Line, keep
from benchmarks.tables import judged, markdown
from benchmarks.timing import Contender, interleave, measure_rates, peak_bytes
from deepopt.hope import HopeConfig
from deepopt.hope.fused import FLOPS
from deepopt.ops import backend

HOW = (
    "The models of one length train in one process and by turns, forward and backward, on one "
    'thread of the CPU. Hope also runs with its memories in plain torch ("Hope, scan"). Decoding, '
    "possibly in a process of its own, is one token at a time from a state, in both forms by turns."
)
CONFIG = HopeConfig(layers=4)
MODELS = ("Hope", "Hope-Attention", "Transformer++", "gated DeltaNet", "Hope, scan")
LENGTHS = (512, 2048, 4096, 8192)
AHEAD_FROM = 4096
"""Tokens from which on Hope should be faster than the Transformer."""
READ = (1, 4096)
"""Tokens that Hope has read before it decodes."""
BATCH = 2048
"""Tokens of a batch; longer sequences come one at a time."""


def train_flops(step: Callable[[], Any]) -> int:
    """FLOPs of a step's products and attention; recomputation in the backward pass counts too."""
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
        step()
    return int(counter.get_total_flops())


def train_lines(tokens: int, seconds: float, peak: float) -> list[Line]:
    torch.manual_seed(0)
    models = {name: build(name.removesuffix(", scan"), CONFIG) for name in MODELS}
    text = torch.randint(CONFIG.vocab_size, (max(1, BATCH // tokens), tokens))

    def stepping(name: str) -> Callable[[], None]:
        def step() -> None:
            models[name].zero_grad()
            models[name](text, text).loss.backward()

        def plain() -> None:
            with backend("reference"):
                step()

        return plain if name.endswith("scan") else step

    steps = {name: stepping(name) for name in MODELS}
    every = {"Hope, scan": 3}
    contenders = [Contender(n, step, (), (), every=every.get(n, 1)) for n, step in steps.items()]
    lines = []
    for name, times in zip(MODELS, interleave(contenders, seconds, "cpu"), strict=True):
        gc.collect()
        flops = train_flops(steps[name])
        lines.append(
            {"kind": "train", "model": name, "tokens": tokens, "batch": len(text),
             "parameters": parameters(models[name]), **times,
             "tokens_per_second": text.numel() / times["cpu"],
             "flops_per_token": flops / text.numel(), "peak_bytes": peak_bytes(steps[name]),
             "share_of_peak": flops / times["cpu"] / peak}
        )  # fmt: skip
    return lines


@torch.no_grad()
def decode_lines(seconds: float) -> list[Line]:
    torch.manual_seed(0)
    model = build("Hope", CONFIG)
    token = torch.randint(CONFIG.vocab_size, (1, 1))
    lines = []
    for read in READ:
        state = model(torch.randint(CONFIG.vocab_size, (1, read))).state

        def step(state: Any = state) -> None:
            model(token, state=state)

        def plain(state: Any = state) -> None:
            with backend("reference"):
                step(state)

        contenders = [Contender(n, s, (), ()) for n, s in (("Hope", step), ("Hope, scan", plain))]
        for contender, times in zip(
            contenders, interleave(contenders, seconds, "cpu"), strict=True
        ):
            lines.append(
                {"kind": "decode", "model": contender.name, "read": read,
                 "parameters": parameters(model), **times}
            )  # fmt: skip
    return lines


def measured(line: Line) -> tuple[Any, ...]:
    """What a line is of: the next one of the same takes its place."""
    return line["kind"], line["model"], line.get("tokens"), line.get("read")


def goals(train: Sequence[Line]) -> str:
    """What was asked of Hope, and what the lines of training say."""
    lines = {(line["model"], line["tokens"]): line for line in train}
    table = [["goal", "measured", "bound", ""]]

    def add(what: str, key: str, limit: float, at_least: bool, *pair: tuple[str, int]) -> None:
        ours, theirs = (lines[x][key] if x in lines else math.nan for x in pair)
        table.append([what, *judged(ours / theirs, limit, at_least, ".2f")])

    rate, peak, theirs = "tokens_per_second", "peak_bytes", "of the Transformer's"
    beside = {n: (("Hope", n), ("Transformer++", n)) for n in LENGTHS}
    first, last = LENGTHS[0], LENGTHS[-1]
    add(f"tokens/s at {first} tokens, {theirs}", rate, 0.5, True, *beside[first])
    add(f"peak memory at {first} tokens, {theirs}", peak, 2.5, False, *beside[first])
    for tokens in (n for n in LENGTHS if n >= AHEAD_FROM):
        add(f"tokens/s at {tokens} tokens, {theirs}", rate, 1.0, True, *beside[tokens])
    hope = ("Hope", last), ("Hope", first)
    add(f"tokens/s at {last} tokens, of those at {first}", rate, 0.9, True, *hope)
    return markdown(table)


def report(lines: Sequence[Line]) -> str:
    train = sorted((x for x in lines if x["kind"] == "train"), key=lambda x: x["tokens"])
    decode = [line for line in lines if line["kind"] == "decode"]
    machines = sorted({f"{x['processor']} with torch {x['torch']}" for x in lines})
    rates = [x["float32"] / 1e9 for x in lines]
    beside = {x["tokens"]: x for x in train if x["model"] == "Transformer++"}
    rows = [("tokens", "model", "tokens/s", "of the Transformer's", "us a token", "peak MB",
             "of the Transformer's", "MFLOP a token", "of the product's peak")]  # fmt: skip
    for x in train:
        other = beside[x["tokens"]]
        rows.append(
            (str(x["tokens"]), x["model"], f"{x['tokens_per_second']:.0f}",
             f"{x['tokens_per_second'] / other['tokens_per_second']:.2f}",
             f"{1e6 / x['tokens_per_second']:.0f}", f"{x['peak_bytes'] / 1e6:.0f}",
             f"{x['peak_bytes'] / other['peak_bytes']:.2f}", f"{x['flops_per_token'] / 1e6:.1f}",
             f"{x['share_of_peak']:.0%}")
        )  # fmt: skip
    decoded = [("tokens read before", "model", "us a token")] + [
        (str(x["read"]), x["model"], f"{1e6 * x['cpu']:.0f}") for x in decode
    ]
    c = CONFIG
    return "\n".join([
        "# Hope's speed", "",
        f"Made by `python -m benchmarks hope-speed` from `hope_speed.jsonl`. {HOW}", "",
        f"{c.layers} layers, width {c.dim}, {c.heads} heads, chunks of {c.memory_chunk}, "
        f"{lines[0]['parameters'] / 1e6:.2f} M parameters each; batches of {BATCH} tokens or "
        f"one sequence. Medians of CPU time. {' and '.join(machines)}; products of two large "
        f"matrices reached {min(rates):.0f} to {max(rates):.0f} GFLOP/s in float32. FLOPs are "
        "those of products, and what the backward pass computes again counts.", "",
        "## Goals", "", goals(train), "",
        "## Training, forward and backward", "", markdown(rows), "",
        "## Decoding", "", markdown(decoded), "",
    ])  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks hope-speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    parser.add_argument(
        "--lengths", nargs="*", type=int, default=LENGTHS,
        help="tokens of a text, one run each; lines of other lengths stay; none: decoding alone "
        f"({' '.join(map(str, LENGTHS))})",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=30.0, help="for each length (30)")
    parser.add_argument("--report", action="store_true", help="write the page, run nothing")
    arguments = parser.parse_args(argv)
    path = arguments.out / "hope_speed.jsonl"
    if not arguments.report:
        torch.set_num_threads(1)
        rates = measure_rates("cpu", elements=2**22, size=1024)
        machine = {"processor": platform.machine(), "torch": torch.__version__,
                   "float32": rates.float32}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        for tokens in arguments.lengths:
            found = train_lines(tokens, arguments.seconds, rates.float32)
            keep(path, [line | machine for line in found], measured)
            print(f"{tokens} tokens: done", flush=True)
        found = decode_lines(min(5.0, arguments.seconds))
        keep(path, [line | machine for line in found], measured)
    if not path.is_file():
        parser.error(f"--report: {path} is not there yet; run without it first")
    page = report([json.loads(line) for line in path.read_text().splitlines()])
    (arguments.out / "hope_speed.md").write_text(page)
    print(f"written: {arguments.out / 'hope_speed.md'}", file=sys.stderr)
    return 0
