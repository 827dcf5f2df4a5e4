"""Plots of the page, as PNG, made from the lines alone."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.quality.intervals import FARTHEST
from benchmarks.quality.plan import Swap, Tuning
from benchmarks.quality.report import swap_rows, unit_of
from benchmarks.quality.training import Lines, value


def tuned_picture(plan: Tuning, lines: Lines) -> bytes:
    """Loss of every trial against its rate, the best so far against the number of trials, and
    training curves at the best settings."""
    figure = Figure(figsize=(12.5, 3.6), layout="constrained")
    rates, search, curves = figure.subplots(1, 3)
    best = math.inf
    for number, contender in enumerate(plan.contenders):
        color = f"C{number}"
        trials = plan.searched(contender, lines)
        found = {run.setting.lr: math.inf for run in trials}
        for run in trials:
            found[run.setting.lr] = min(found[run.setting.lr], value(lines[run]))
        finite = [(lr, loss) for lr, loss in sorted(found.items()) if math.isfinite(loss)]
        if finite:
            rates.plot(*zip(*finite, strict=True), "o-", color=color, markersize=3, linewidth=0.8)
            best = min(best, *(loss for _, loss in finite))
        so_far = list(itertools.accumulate((value(lines[run]) for run in trials), min))
        search.plot(range(1, len(so_far) + 1), so_far, color=color, linewidth=1)
        runs = [run for run in plan.tuned(contender, lines) if "curve" in lines.get(run, {})]
        if runs:
            points = zip(*(lines[run]["curve"] for run in runs), strict=True)
            means = [fmean(point) for point in points]
            steps = [plan.final_steps * (k + 0.5) / len(means) for k in range(len(means))]
            curves.plot(steps, means, color=color, linewidth=1)
        rates.plot([], [], color=color, label=contender)
    rates.set_xscale("log")
    if math.isfinite(best) and best > 0:
        for axes in (rates, search):
            axes.set_ylim(best * 0.98, best * 1.5)
    rates.set_xlabel("learning rate of matrices")
    rates.set_ylabel("held-out loss of the trials")
    rates.legend(fontsize=7)
    search.set_xlabel("trials")
    search.set_ylabel("least held-out loss so far")
    curves.set_xlabel("step")
    curves.set_ylabel("training loss, each at its best")
    curves.set_yscale("log")
    for axes in (rates, search, curves):
        axes.grid(alpha=0.3)
    return png(figure, 110)


def profile_picture(profiles: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Share of workloads that need at most x times the best time, by unit and optimizer."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, len(profiles), sharey=True, squeeze=False)[0]
    for axes, (unit, found) in zip(panels, profiles.items(), strict=True):
        for name, ratios in found.items():
            ends = [1.0, *(x for x in ratios if x <= FARTHEST), FARTHEST]
            heights = [sum(x <= end for x in ratios) / len(ratios) for end in ends]
            axes.step(ends, heights, where="post", label=name, linewidth=1)
        axes.set_xlabel(f"{unit} to target, in units of the best optimizer's")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of workloads")
    panels[0].legend(fontsize=7)
    return png(figure, 110)


def swap_picture(plans: Sequence[Swap], lines: Lines) -> bytes:
    """Every run at AdamW's best rate as a dot beside AdamW's mean, workload by workload."""
    figure = Figure(figsize=(8.5, 2.6), layout="constrained")
    panels = figure.subplots(1, len(plans), sharey=True, squeeze=False)[0]
    for axes, plan in zip(panels, plans, strict=True):
        lr = plan.best_rate(lines)
        rows = {} if lr is None else swap_rows(plan, lr, lines)
        for row, (label, values) in enumerate(rows.items()):
            found = [x for x in values if x is not None]
            if not found:
                continue
            mean, color = fmean(found), "C0" if label.startswith("DeepMomentum") else "0.45"
            axes.plot(found, [row] * len(found), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([mean], [row], "|", color=color, markersize=16, markeredgewidth=2)
            if math.isfinite(mean):
                place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
                axes.annotate(f"{mean:.3f}", (mean, row), fontsize=8, color=color, **place)
            if row == 0:
                axes.axvline(mean, color="0.7", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.9)
        axes.margins(x=0.12)
        parameters = lines[plan.sweep()[0]]["parameters"]
        name = plan.workload.removeprefix("swap_").capitalize()
        axes.set_title(f"{name}, {parameters / 1e6:.1f} M", fontsize=10)
        axes.set_xlabel(f"{unit_of(plan, lines)} on held-out data, lower is better", fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    return png(figure, 130)


def png(figure: Figure, dpi: int) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, metadata={"Software": None})
    return image.getvalue()
