"""Plots of a tuned workload, made from the lines alone."""

import io
import math
import statistics

from matplotlib.figure import Figure

from benchmarks.quality.plan import Tuning
from benchmarks.quality.training import Lines, value


def picture(plan: Tuning, lines: Lines) -> bytes:
    """Loss of every trial against its rate, and training curves at the best settings, as a PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, curves = figure.subplots(1, 2)
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
        runs = [run for run in plan.tuned(contender, lines) if "curve" in lines.get(run, {})]
        if runs:
            points = zip(*(lines[run]["curve"] for run in runs), strict=True)
            means = [statistics.fmean(point) for point in points]
            steps = [plan.final_steps * (k + 0.5) / len(means) for k in range(len(means))]
            curves.plot(steps, means, color=color, linewidth=1)
        rates.plot([], [], color=color, label=contender)
    rates.set_xscale("log")
    if math.isfinite(best) and best > 0:
        rates.set_ylim(best * 0.98, best * 1.5)
    rates.set_xlabel("learning rate of matrices")
    rates.set_ylabel("held-out loss of the trials")
    rates.legend(fontsize=7)
    curves.set_xlabel("step")
    curves.set_ylabel("training loss, each at its best")
    curves.set_yscale("log")
    for axes in (rates, curves):
        axes.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, dpi=110, metadata={"Software": None})
    return image.getvalue()
