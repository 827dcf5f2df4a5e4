"""The gate of the MLP memory, from the lines of ``quality`` and ``streams``, and its read-out.

Nothing is trained here. The page has what ``python -m benchmarks quality`` and ``streams`` have
measured, held against what the memory must reach to be the default or to be recommended, and what
the MLPs of ``docs/results/mlp-memory`` answer to the features that they see.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.quality.goals import OWN, status
from benchmarks.quality.intervals import Ended, bootstrap
from benchmarks.quality.pictures import png
from benchmarks.quality.results import results
from benchmarks.quality.tiers import tunings
from benchmarks.quality.tuned import MISSING, Group, difference, groups, ratio_text
from benchmarks.streams import command as streams
from benchmarks.streams.tasks import TASKS
from benchmarks.tables import markdown
from deepopt._files import write_atomically
from deepopt.memory.horizons import HAND_MADE
from deepopt.ops.horizons_write import COSINE_FLOOR, mixing_weights

MLP, LINEAR = "DeepMomentum, mlp", ("Muon", "NorMuon")
"""The contender, and the linear memories that ran at several budgets."""
OWN_LINEAR = "DeepMomentum, linear"
"""The linear memory whose updates are as large as the contender's; it ran at one budget."""
ON_STREAMS: dict[str, tuple[streams.Contender, ...]] = {
    "mlp": streams.MLP,
    "gains of attempt 10": (("trained rows", 0.0),),
    "gains of attempt 11": (("trained directions", 0.0),),
}
"""What is held against the best linear memory on a stream, with all betas that it ran at."""
SEEDS = 5
LONG = 0.9
"""Retention of the long average in every search."""
STEP = 150
"""Steps that a memory has seen when its answers are shown."""
BEST = (0.02, 0.1, 0.3, 0.6, 0.9)
SHARE = (1.0, 0.75, 0.5, 0.25)


def gate(group: Group, lines: streams.Lines) -> list[list[str]]:
    """The rows of a table: what is held against what, what was measured, and the bound."""
    found: list[Ended] = []
    rows = [["", "measured", "asked for", ""]]
    for plan in group.plans:
        known = {name: ended for name in LINEAR if (ended := group.ended(plan, MLP, name))}
        if len(known) < len(LINEAR):
            continue
        losses = {name: fmean(x.budgets[plan.final_steps]) for name, x in known.items()}
        best = min(LINEAR, key=losses.__getitem__)
        found.append(known[best])
        rows.append(ratio(f"D_eff against {best}, {plan.workload}", [known[best]], 0.99))
    rows.append(ratio(f"the same, mean of {len(found)} workloads", found, 1.03))
    for workload, (interval, verdict) in group.verdicts(MLP, OWN_LINEAR).items():
        text = f"loss minus that of DeepMomentum's linear memory, {workload}"
        rows.append([text, difference(interval), "", verdict])
    for memory in ON_STREAMS:
        rows += [on_stream(name, memory, lines) for name, task in TASKS.items() if task.period]
        returning = [name for name, task in TASKS.items() if task.period and task.jumps]
        rows += [forgotten(name, memory, lines) for name in returning]
    return rows


def ratio(text: str, found: Sequence[Ended], goal: float) -> list[str]:
    if not found:
        return [text, "", f">= {goal}", MISSING]
    measured = bootstrap(found)
    return [text, ratio_text(measured, found), f">= {goal}", status(measured.mean >= goal)]


def on_stream(task: str, memory: str, lines: streams.Lines) -> list[str]:
    """The online loss minus that of the best linear memory, seed by seed."""
    text = f"{memory}: online loss minus the best linear memory's, {task}"
    interval = streams.between(*ended(task, memory, lines))
    if interval is None:
        return [text, "", "< 0", MISSING]
    return [text, difference(interval), "< 0", status(interval.mean < 0)]


def ended(
    task: str, memory: str, lines: streams.Lines
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of a memory and of the best linear one, each at its best beta and rate."""
    ours = streams.best_of(ON_STREAMS[memory], task, SEEDS, lines)
    return ours, streams.best_of(streams.LINEAR, task, SEEDS, lines)


def forgotten(task: str, memory: str, lines: streams.Lines) -> list[str]:
    """What is forgotten between two visits of a regime, as a share of the best linear memory's.

    It counts at no larger a loss alone: a memory that learns little forgets little.
    """
    text = f"{memory}: forgotten / the best linear memory's, {task}"
    bound = "<= 0.8 at no larger a loss"
    ours, theirs = ended(task, memory, lines)
    forgot, bar = streams.mean_of("forgotten", ours), streams.mean_of("forgotten", theirs)
    if forgot is None or bar is None:
        return [text, "", bound, MISSING]
    loss = streams.between(ours, theirs)
    as_good = loss is not None and loss.mean <= 0
    return [text, f"{forgot / bar:.2f}", bound, status(as_good and forgot <= 0.8 * bar)]


def read_outs(folder: Path) -> dict[str, tuple[float, Tensor]]:
    """By name the retention of the short average and the MLP, where there is one such average."""
    found = {"by hand, .7": (0.7, torch.tensor(HAND_MADE, dtype=torch.float64))}
    for path in sorted(folder.glob("*/phi.json"), reverse=True):
        line = json.loads(path.read_text())
        if line.get("memory") == "horizons" and len(line["time_scales"]) == 1:
            (short,) = line["time_scales"]
            name = f"trained, {short:g}".replace("0.", ".")
            found[name] = (short, torch.tensor(line["phi"], dtype=torch.float64))
    return found


def norms(short: float, best: Tensor) -> Tensor:
    """The norms of the long and the short average, as shares of a single gradient's, shape (…, 2).

    The gradient is steady under noise, and the short average's cosine with it is ``best``.
    """
    kept = torch.tensor([LONG, short], dtype=best.dtype)
    noise = (1 - kept) / (1 + kept)  # what an average has left of a single gradient's square
    # cos = a / r and r^2 = a + (1 - a) noise, with a the steady part of the gradient's square.
    square, slope = best**2, 1 - noise[1]
    steady = (square * slope + (square**2 * slope**2 + 4 * square * noise[1]).sqrt()) / 2
    return (steady[..., None] + (1 - steady[..., None]) * noise).sqrt()


def weight(phi: Tensor, short: float, best: Tensor, share: Tensor) -> Tensor:
    """The short average's weight where its cosine is the best one, and the long one's a share."""
    cosines = torch.stack([share * best, best], -1)
    trust = (cosines + COSINE_FLOOR) / (best + COSINE_FLOOR)[..., None]
    time = torch.full_like(best, math.log10(STEP) / 3)
    features = torch.cat([trust, best[..., None], norms(short, best), time[..., None]], -1)
    flat = features.reshape(-1, features.shape[-1])
    return mixing_weights(phi.expand(len(flat), *phi.shape), flat)[:, 0].view(best.shape)


def answers(phi: Tensor, short: float) -> str:
    """A table of the weights, by both cosines."""
    table = [["c₁ / max c", *(f"{best:g}" for best in BEST)]]
    for share in SHARE:
        best = torch.tensor(BEST, dtype=torch.float64)
        found = weight(phi, short, best, torch.full_like(best, share))
        table.append([f"{share:g}", *(f"{x:.2f}" for x in found.tolist())])
    return markdown(table)


def picture(found: Mapping[str, tuple[float, Tensor]]) -> bytes:
    """The weights as a map over both cosines, for every read-out."""
    axis = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
    share, best = torch.meshgrid(axis, axis, indexing="ij")
    figure = Figure(figsize=(3.6 * len(found), 3.8), layout="constrained")
    places = figure.subplots(1, len(found), sharey=True)
    for place, (name, (short, phi)) in zip(places, found.items(), strict=True):
        values = weight(phi, short, best, share).numpy()
        shown = place.imshow(values, origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=1)
        place.set_title(name)
        place.set_xlabel("max c, the best running cosine")
    places[0].set_ylabel("c₁ / max c, the long average's share")
    figure.colorbar(shown, ax=places, label="weight of the short average")
    return png(figure, 110)


def page(table: str, found: Mapping[str, tuple[float, Tensor]]) -> str:
    parts = [
        "# The MLP memory's gate and read-out",
        "Regenerated by `python -m benchmarks mlp-memory`, from the lines of "
        "[`quality.md`](../quality.md) and [`streams.md`](../streams.md). "
        "[The whole story](../mlp-memory.md) has the attempts.",
        "## Gate",
        f"All have {SEEDS} paired seeds, and brackets are 95 % intervals. Where data stay the "
        "same, all are tuned by the same search. Muon and NorMuon are linear memories: on each "
        "workload the better one is the rival. DeepMomentum's own linear memory ran at one number "
        "of steps, which gives no D_eff, so its loss is compared. On a stream each memory has its "
        "best beta and rate of those in the table there. A stream has one length, so what is "
        "asked for is a lower loss, which is less than a D_eff of 1.10.",
        table,
        "## What was learned",
        f"The weight of the short average beside the long one's, of retention {LONG:g}, after "
        f"{STEP} steps: by the best of both running cosines with the gradient, which is the short "
        "average's, and by the long one's share of it. The norms are those of averages of a steady "
        "gradient under noise.",
        "![the weight over both cosines](readout.png)",
    ]
    for name, (short, phi) in found.items():
        parts += [f"### {name[0].upper()}{name[1:]}", answers(phi, short)]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks mlp-memory", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="(docs/results)")
    out = parser.parse_args(argv).out
    folder = out / "mlp-memory"
    found = read_outs(folder)
    if len(found) < 2:
        parser.error(f"--out {out}: there is no phi.json in {folder}; run deepopt.meta first")
    lines = results(out / "quality", of_any_circumstances=True).lines
    group = groups(tunings(lines), lines).get(OWN, Group((), lines))
    table = markdown(gate(group, streams.results(out).lines))
    write_atomically(folder / "readout.png", picture(found))
    write_atomically(folder / "gate.md", page(table, found).encode())
    print(f"written: {folder / 'gate.md'}", file=sys.stderr)
    return 0
