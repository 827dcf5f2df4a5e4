"""The page: tables in Markdown, made from the lines alone."""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

from benchmarks.hope.models import ABLATIONS, NAMES
from benchmarks.hope.plan import ABLATED, DEFAULT, Lines, Plan, badness, value
from benchmarks.hope.task import Task
from benchmarks.hope.training import MEMORY, TASKS, WARMUP, Line, Run, setting
from benchmarks.tables import NOT_RUN, judged, markdown
from deepopt.hope.optimizers import MAX_GRAD_NORM


def shown(task: str, metric: str, found: Sequence[float]) -> str:
    """The mean of some values, and their range if there are several."""
    if not found:
        return NOT_RUN
    if len(found) == 1:
        return number(task, found[0])
    ends = f"{number(task, min(found))} to {number(task, max(found))}"
    return f"{number(task, statistics.fmean(found))} ({ends})"


def number(task: str, x: float) -> str:
    if not math.isfinite(x):
        return "not finite"
    return f"{x:.4f}" if TASKS[task].smaller_is_better else f"{100 * x:.1f} %"


def metrics(task: str, lines: Iterable[Line]) -> list[str]:
    """Names of the metrics, the deciding one first."""
    names = dict.fromkeys([TASKS[task].metric])
    for line in lines:
        names.update(dict.fromkeys(line.get("metrics", ())))
    return list(names)


def seeds_of(plan: Plan, task: str, model: str, lines: Lines) -> list[Line]:
    """The lines of a model at its best rate."""
    best = plan.best(task, model, lines)
    return [lines[run] for run in plan.repeats(best) if run in lines] if best else []


def mean(plan: Plan, task: str, lines: Lines, model: str, metric: str) -> float:
    """The mean of a metric over the seeds of a model; NaN if there is no run."""
    if model in plan.compared:
        found = seeds_of(plan, task, model, lines)
    else:
        runs = plan.repeats(plan.hope(task, model.removeprefix("Hope, "), lines))
        found = [lines[run] for run in runs if run in lines]
    return statistics.fmean(value(line, metric) for line in found) if found else math.nan


def goals(plan: Plan, lines: Lines) -> str:
    table = [["task", "goal", "measured", "bound", ""]]
    for task in plan.tasks:
        for goal in TASKS[task].goals:
            found = goal.value(functools.partial(mean, plan, task, lines))
            table.append([task, goal.what, *judged(found, goal.limit, goal.at_least, ".4f")])
    return markdown(table)


def comparison(plan: Plan, task: str, lines: Lines) -> str:
    """Every model at its best learning rate."""
    rows = {model: seeds_of(plan, task, model, lines) for model in plan.compared}
    names = metrics(task, (line for found in rows.values() for line in found))
    head = ["model", "parameters", "learning rate", "seeds", *(n.replace("_", " ") for n in names)]
    table = [[*head, "training loss, nats", "CPU seconds of training"]]
    for model, found in rows.items():
        if not found:
            table.append([model, NOT_RUN, *[""] * (len(table[0]) - 2)])
            continue
        finite = [line for line in found if "diverged" not in line]
        cells = [shown(task, name, [value(line, name) for line in found]) for name in names]
        table.append(
            [
                model,
                f"{found[0]['parameters']:,}",
                f"{found[0]['lr']:g}",
                str(len(found)),
                *cells,
                mean_of(finite, "train_loss", ".4f"),
                mean_of(finite, "train_cpu_seconds", ",.0f"),
            ]
        )
    return markdown(table)


def mean_of(lines: Sequence[Line], key: str, form: str) -> str:
    return format(statistics.fmean(line[key] for line in lines), form) if lines else ""


def rates(plan: Plan, task: str, lines: Lines) -> str:
    """The deciding metric of every model at every learning rate."""
    order = sorted(plan.rates)
    table = [["learning rate", *(f"{lr:g}" for lr in order)]]
    for model in plan.compared:
        runs = [plan.run(task, model, lr) for lr in order]
        table.append([model, *(cell(run, lines) for run in runs)])
    return markdown(table)


def cell(run: Run, lines: Lines) -> str:
    """The deciding metric of a run."""
    if run not in lines:
        return NOT_RUN
    return number(run.task, value(lines[run], TASKS[run.task].metric))


def at_an_end(plan: Plan, task: str, lines: Lines) -> list[str]:
    """Models whose best rate is the lowest or the highest that was tried."""
    best = {model: plan.best(task, model, lines) for model in plan.compared}
    ends = (min(plan.rates), max(plan.rates))
    return [model for model, run in best.items() if run and len(plan.rates) > 1 and run.lr in ends]


def parts(plan: Plan, lines: Lines) -> str:
    """Hope with one part of its layer changed."""
    tasks = [task for task in plan.tasks if task in ABLATED]
    table = [["Hope", "parameters", *tasks]]
    for part in ("", *ABLATIONS):
        runs = [plan.hope(task, part, lines) for task in tasks]
        cells = [cell(run, lines) for run in runs]
        table.append([part or "as it is", size(runs, lines), *cells])
    return markdown(table)


def size(runs: Sequence[Run], lines: Lines) -> str:
    """Parameters of the first run that there is."""
    found = [lines[run]["parameters"] for run in runs if run in lines]
    return f"{found[0]:,}" if found else ""


def optimizers(plan: Plan, lines: Lines) -> str:
    """Every optimizer on the default run, against SGD at its best rate."""
    runs = [run for run in plan.optimizers() if run in lines]
    sgd = min((badness(lines[run]) for run in runs if run.optimizer == "SGD"), default=math.nan)
    table = [["optimizer", "learning rate", "bits per byte", "against SGD", "CPU seconds"]]
    for run in plan.optimizers():
        if run not in lines:
            table.append([run.optimizer, f"{run.lr:g}", NOT_RUN, "", ""])
            continue
        found, seconds = badness(lines[run]), lines[run].get("train_cpu_seconds")
        gap = "" if math.isnan(found - sgd) else f"{found - sgd:+.4f}"
        time = "" if seconds is None else f"{seconds:,.0f}"
        table.append([run.optimizer, f"{run.lr:g}", cell(run, lines), gap, time])
    return markdown(table)


def earlier(lines: Lines) -> str:
    """A sentence that counts the runs made in an earlier setting; empty if there is none."""
    known = [run for run in lines if run.model in NAMES]
    old = [run for run in known if not setting(run).items() <= lines[run].items()]
    if not old:
        return ""
    return (
        f" **{len(old)} of {len(known)} runs were made in an earlier setting**, for example before "
        "updates had a least size or the delta memory looked ahead; the benchmark repeats them "
        "when it is run again."
    )


def report(plan: Plan, lines: Lines, command: str) -> str:
    """The whole page."""
    any_line = next(iter(lines.values()))
    page = [
        "# Hope beside a Transformer++ and a gated DeltaNet",
        f"Regenerated by `{command}` (runs that have a line in `hope/` are not repeated).",
        "All models have the same embedding, norms, head, initialization and number of parameters "
        "(the SwiGLU of a baseline, and Hope-Attention's levels, are as wide as that takes), the "
        f"same batches and the same optimizer, {DEFAULT} with the {MEMORY} memory, and AdamW on "
        f"all but the matrices: weight decay {Task.weight_decay:g} where a task names no other, "
        f"{WARMUP} steps of warm-up, then linear decay to zero, gradients clipped at norm "
        f"{MAX_GRAD_NORM:g}. "
        f"Learning rates are swept with seed 0 ({', '.join(f'{r:g}' for r in sorted(plan.rates))}"
        "); further seeds run at each model's best. Hope is the default `HopeConfig` at the sizes "
        "of the task, the same for all. Several seeds are given as their mean (lowest to highest).",
        f"Python {any_line['python']}, torch {any_line['torch']}, one thread per run; CPU seconds "
        "were taken on a shared machine." + earlier(lines),
        "## Goals",
        goals(plan, lines),
    ]
    for task in plan.tasks:
        steps = plan.steps or TASKS[task].steps
        page += [
            f"## {task}",
            f"{TASKS[task].about} {steps} steps; batches and tests: {sizes(task, lines)}.",
            comparison(plan, task, lines),
            f"{TASKS[task].metric.replace('_', ' ').capitalize()} at every learning rate, seed 0"
            + (
                f" (the best of {', '.join(ends)} is at an end of the range):"
                if (ends := at_an_end(plan, task, lines))
                else ":"
            ),
            rates(plan, task, lines),
        ]
    page += [
        "## Parts of the layer",
        "Hope with one part changed, at Hope's best learning rate, seed 0, with nothing else "
        "fitted; for each task the metric that its learning rate was chosen by. With *memories "
        "frozen* no token writes: all memories stay at their learned initial weights.",
        parts(plan, lines),
        "## Optimizers",
        f"The default training run of Hope ({plan.optimizers()[0].steps} steps on bytes, seed 0) "
        "with each optimizer of the package. Learning rates are on AdamW's scale "
        "(`deepopt.hope.optimizers.LR_SCALES`). Embeddings, norms, biases and the head take AdamW, "
        "except with SGD, which steps everything. *Against SGD*: bits per byte minus those of SGD, "
        "with momentum 0.9, at its best rate.",
        optimizers(plan, lines),
        "PreconditionedMomentum and DeltaMomentum are SGD's rule on the matrices, with another "
        "weight for each row and with an erase term. DeltaGradientDescent has no momentum, as in "
        "the paper.",
    ]
    return "\n\n".join(page) + "\n"


def sizes(task: str, lines: Lines) -> str:
    """Batches and tests of a task, as its lines have them."""
    found = dict.fromkeys(x["task_config"] for run, x in lines.items() if run.task == task)
    return " or ".join(found) or NOT_RUN
