"""The page says what the lines say: lines are made up, so that the truth is known."""

import math
import re

import pytest

from benchmarks.quality import command, goals, pictures, tiers
from benchmarks.quality.contenders import DEFAULT, PARTS, Setting
from benchmarks.quality.plan import PAIR, Rates, Swap, Tuning
from benchmarks.quality.report import origin, page, shown, without_parts
from benchmarks.quality.training import Run
from benchmarks.quality.tuned import (
    Group,
    best_table,
    costs,
    data_ratio,
    differences,
    groups,
    width,
)

TRIO = ("AdamW", "Muon", DEFAULT)
HERE = {"python": "3", "torch": "2", "config": "c", "data": "d", "parameters": 1000}


def law(steps):
    return 4 - 0.2 * math.log2(steps)


def line(run, loss, curve=None):
    """A line of a run whose optimizer takes a fifth of its 10 ms a step."""
    found = {
        **HERE,
        "steps": run.steps,
        "curve": curve or [loss + 0.1 * k for k in range(19, -1, -1)],
    }
    found |= {"cpu_seconds": run.steps / 100, "optimizer_cpu_seconds": run.steps / 500}
    found |= {"state_bytes": 8000, "metrics": {"val_loss": loss}}
    return found if math.isfinite(loss) else {**HERE, "diverged": "not finite after 3 steps"}


def finished(plan, speed, lines=None):
    """All lines of a plan: each optimizer's loss is the law's at `speed` times its steps."""
    lines = {} if lines is None else lines
    noise = (0.0, 0.001, -0.001, 0.0005, -0.0005)
    while missing := plan.next(lines):
        for run in missing:
            far = 0.02 * abs(math.log(run.setting.lr / 4e-3))
            loss = law(run.steps * speed[run.contender]) + far + noise[run.seed % 5]
            lines[run] = line(run, loss)
    return lines


@pytest.fixture(scope="module")
def group():
    plan = Tuning("friedman", TRIO, trials=6, seeds=5)
    lines = finished(plan, {"AdamW": 1.0, "Muon": 1.2, DEFAULT: 1.2})
    return Group([plan], lines)


def test_the_data_ratio_of_the_lines_is_the_one_that_they_were_made_with(group):
    (plan,) = group.plans
    assert group.ratio((plan,), DEFAULT, "AdamW").mean == pytest.approx(1.2, abs=0.02)
    assert group.ratio((plan,), DEFAULT, "Muon").mean == pytest.approx(1.0, abs=0.02)
    assert group.ratio((plan,), DEFAULT, DEFAULT) is None


@pytest.mark.parametrize(
    ("speed", "text"),
    [(0.4, "<= 0.50"), (1.7, "1.70"), (2.5, "2.50"), (3.4, "3.40"), (9, ">= 4.00")],
)
def test_the_data_ratio_is_measured_up_to_four_times_the_steps_and_beyond_it_a_bound(speed, text):
    plan = Tuning("friedman", PAIR, trials=3, seeds=2)
    group = Group([plan], finished(plan, {"AdamW": 1.0, DEFAULT: speed}))
    found = data_ratio(group, (plan,), DEFAULT, "AdamW")
    assert found.startswith(text[:-1]), found  # all but the last digit, which has noise


@pytest.mark.parametrize("spoiled", ["missing", "diverged"])
def test_a_longer_budget_counts_as_a_whole_or_not_at_all(spoiled):
    plan = Tuning("friedman", PAIR, trials=3, seeds=2)
    lines = finished(plan, {"AdamW": 1.0, DEFAULT: 2.5})
    run = next(run for run in lines if run.steps == 3 * plan.final_steps)
    if spoiled == "missing":
        del lines[run]
    else:
        lines[run] = line(run, math.inf)
    group = Group([plan], lines)
    assert group.ended(plan, DEFAULT, "AdamW").ratio() == 2.0
    assert data_ratio(group, (plan,), DEFAULT, "AdamW").startswith(">= 2.00")


def test_equal_optimizers_tie_and_a_better_one_wins(group):
    (plan,) = group.plans
    assert group.verdicts(DEFAULT, "AdamW")[plan.label][1] == "win"
    assert group.verdicts(DEFAULT, "Muon")[plan.label][1] == "tie"
    assert group.verdicts("AdamW", "Muon")[plan.label][1] == "loss"
    assert f"| {DEFAULT} | " in differences(group, plan)


def test_costs_are_those_of_the_lines(group):
    (plan,) = group.plans
    cells = next(x for x in costs(group, plan).splitlines() if x.startswith(f"| {DEFAULT} |"))
    # Its curve is below AdamW's by a constant, so that it is there before AdamW's last middle.
    steps, seconds = (float(cells.split(" | ")[k]) for k in (1, 2))
    assert 0 < steps < 0.975 * plan.final_steps
    assert seconds == pytest.approx(steps / 100, abs=0.06)
    assert " | 2.00 | 20 % | " in cells
    # Seven trials, eight of the descent, three finalists, and five more seeds of the best. The swap
    # is the best, too. The others' best setting is also its own, so that only the other value of
    # its knob is new.
    assert cells.endswith(" 0 of 24 |")


def test_runs_that_end_badly_are_counted_and_an_unreached_target_is_told():
    plan = Tuning("friedman", ("AdamW", "Muon"), trials=4, seeds=2)
    lines = finished(plan, {"AdamW": 1.0, "Muon": 0.5})
    trial = plan.trials_of("Muon", lines)[-1]
    lines[trial] = line(trial, math.inf)
    cells = costs(Group([plan], lines), plan).splitlines()[-1]
    assert "| not reached | not reached |" in cells
    assert " 1 of " in cells


def test_an_optimizer_that_always_diverges_is_told_so_and_one_that_does_at_times_loses():
    plan = Tuning("friedman", TRIO, trials=4, seeds=2)
    lines = finished(plan, {"AdamW": 1.0, "Muon": 1.2, DEFAULT: 1.2})
    for run in lines:
        if run.contender == "Muon":
            lines[run] = line(run, math.inf)
    last = Group([plan], lines).tuned(plan, DEFAULT)[-1]
    lines[last] = line(last, math.inf)
    group = Group([plan], lines)
    assert re.search(r"\| Muon \|  \| diverged \((\d+) of \1\) \|", best_table(group, plan))
    assert group.verdicts(DEFAULT, "AdamW")[plan.label][1] == "loss"
    assert data_ratio(group, (plan,), DEFAULT, "AdamW").startswith("<= 0.50")


def test_seconds_are_the_least_of_all_runs_as_machines_and_what_else_runs_only_add(group):
    (plan,) = group.plans
    lines = dict(group.lines)
    for run in group.tuned(plan, DEFAULT):
        slow = {"cpu_seconds": 2 * run.steps, "optimizer_cpu_seconds": run.steps}
        lines[run] = {**lines[run], **slow}
    assert Group([plan], lines).step_seconds(plan, DEFAULT) == pytest.approx((0.008, 0.002))


def test_the_page_tells_all_versions_and_which_runs_are_not_of_one_kind():
    plan = Tuning("friedman", PAIR, trials=3, seeds=2)
    lines = finished(plan, {"AdamW": 1.0, DEFAULT: 1.2})
    assert origin(lines) == "Python 3, torch 2."
    odd = next(run for run in lines if run.contender == DEFAULT)
    lines[odd] = {**lines[odd], "torch": "1", "data": "other"}
    text = origin(lines)
    assert text.startswith("Python 3, torch 1; Python 3, torch 2. ")
    assert f"The runs of {DEFAULT} on friedman have different configurations or data" in text


def test_a_single_run_does_not_show_the_plan_of_more_steps_that_has_it_as_a_trial():
    plan = Tuning("friedman", ("AdamW", "Muon"), trials=4, seeds=2)
    lines = finished(plan, {"AdamW": 1.0, "Muon": 1.2})
    longer = Tuning("friedman", ("AdamW", "Muon"), trials=4, seeds=2, steps=4 * plan.final_steps)
    budget = longer.trials_of("AdamW", lines)[-1]
    lines[budget] = line(budget, 2.0)
    assert shown(plan, lines)
    assert not shown(longer, lines)


def test_the_width_is_of_the_rates_within_a_hundredth_of_the_best_loss():
    plan = Tuning("friedman", ("AdamW",), trials=3, seeds=1)
    trials = plan.trials_of("AdamW", {})
    losses = [2.0, 2.01, 2.5, 2.02]
    lines = {run: line(run, loss) for run, loss in zip(trials, losses, strict=True)}
    rates = [run.setting.lr for run in (trials[0], trials[1], trials[3])]
    assert width(plan, "AdamW", lines) == pytest.approx(max(rates) / min(rates))


def tuned_on(names, ratio, steps=None):
    """Lines of workloads in which the default needs one `ratio`th of its rivals' steps."""
    lines, plans = {}, []
    for name in names:
        own = None if steps is None else steps * command.find(name).steps
        plans.append(Tuning(name, ("AdamW", "Muon", "NorMuon", DEFAULT), 6, 5, own))
        finished(plans[-1], {"AdamW": 1.0, "Muon": 1.0, "NorMuon": 1.0, DEFAULT: ratio}, lines)
    return groups(plans, lines), lines


def words(table):
    return {row[0].partition(":")[0]: row[2] for row in table[1:]}


def test_goals_are_met_missed_or_not_run_by_what_was_measured(monkeypatch):
    monkeypatch.setattr(goals, "WORKLOADS", ("friedman", "digits_mlp"))
    found, lines = tuned_on(("friedman", "digits_mlp"), 1.3)
    told = words(goals.goals(found, [], [], lines))
    assert told["D_eff against AdamW, tuned"] == "NOT met"  # 1.3 of 2
    assert told["D_eff against NorMuon, tuned at four times the steps"] == "not run"
    assert told["AdamW's best rate and decay untouched"] == "not run"
    rows = {row[0]: row for row in goals.goals(found, [], [], lines)}
    mean = rows["D_eff against Muon, tuned: geometric mean of at least 1.20"]
    assert mean[1].startswith("1.3")
    assert mean[2] == "met"
    assert rows["D_eff against Muon, tuned: on no workload below 0.99"][2] == "met"


def test_a_goal_of_a_mean_is_not_run_while_a_workload_is_missing_and_one_of_the_least_is_missed(
    monkeypatch,
):
    monkeypatch.setattr(goals, "WORKLOADS", ("friedman", "digits_mlp"))
    found, lines = tuned_on(("friedman",), 0.8)
    told = {row[0]: row[2] for row in goals.goals(found, [], [], lines)}
    mean = "D_eff against Muon, tuned: geometric mean of at least 1.20"
    assert told[mean] == "not run on all of its workloads"
    assert told["D_eff against Muon, tuned: on no workload below 0.99"] == "NOT met"


def test_the_long_goal_is_of_four_times_the_steps(monkeypatch):
    monkeypatch.setattr(goals, "WORKLOADS", ("friedman",))
    found, lines = tuned_on(("friedman",), 1.2, steps=4)
    told = words(goals.goals(found, [], [], lines))
    assert told["D_eff against NorMuon, tuned at four times the steps"] == "met"
    assert told["D_eff against AdamW, tuned"] == "not run"


def swapped(gain):
    plan = Swap("friedman", TRIO, seeds=3)
    lines = {}
    while missing := plan.next(lines):
        for run in missing:
            loss = 3 + abs(math.log2(run.setting.lr / 4e-3)) + 0.01 * run.seed
            better = gain + 0.001 * run.seed if run.contender == DEFAULT else 0.0
            lines[run] = line(run, loss - better)
    return plan, lines


@pytest.mark.parametrize(
    ("gain", "word", "status"), [(0.5, "win", "met"), (-0.5, "loss", "NOT met")]
)
def test_the_swaps_table_and_its_goals_say_what_the_lines_say(gain, word, status):
    plan, lines = swapped(gain)
    text = page([plan], lines, "the command")
    row = next(x for x in text.splitlines() if x.startswith(f"| {DEFAULT} | {3 - gain:.4f} |"))
    assert f"{-gain - 0.001:+.4f} [" in row
    assert f" | {word} | 0.008 | 0.0020 | 2.00 |" in row
    assert "| 0.002 | 4.0100 |" in text  # at half of the best rate
    told = words(goals.goals({}, [], [plan], lines))
    assert told["AdamW's best rate and decay untouched"] == status
    assert told["At half and double that rate"] == status


def test_a_missing_seed_is_told():
    plan, lines = swapped(0.5)
    del lines[plan.runs("Muon", 4e-3)[2]]
    text = page([plan], lines, "the command")
    assert "| Muon | 3.0000 | 3.0100 | not run | 3.0050 |" in text


def test_the_page_and_the_plots_are_made_of_lines_alone(tmp_path):
    found, lines = tuned_on(("friedman", "digits_mlp"), 1.3)
    tunings = [plan for group in found.values() for plan in group.plans]
    swap, more = swapped(0.5)
    lines |= more
    rates = Rates("breast_cancer", seeds=2)
    lines |= {run: line(run, 1.0 + 0.1 * run.seed) for run in rates.next({})}
    every = [*tunings, swap, rates]
    folder = tmp_path / "quality"
    folder.mkdir()
    command.write(every, lines, folder, page(every, lines, "the command"))
    images = {path.name for path in folder.glob("*.png")}
    assert images == {"friedman.png", "digits_mlp.png", "profile_1_x1.png", "swap.png"}
    text = (tmp_path / "quality.md").read_text()
    for name in images:
        assert f"(quality/{name})" in text
    assert "0 wins, 1 tie, 0 losses" in text  # the two at the same losses at each rate


def test_the_swaps_picture_is_drawn_with_runs_missing_and_runs_that_diverged():
    plan, lines = swapped(0.5)
    first, second, third = plan.runs("Muon", 4e-3)
    del lines[first]
    lines[second] = line(second, math.inf)
    lines[third] = line(third, math.inf)
    assert pictures.swap_picture([plan], lines).startswith(b"\x89PNG")


def test_optimizers_that_have_not_begun_are_left_out_of_a_tier_but_the_standard_ones():
    plan = Tuning("friedman", ("AdamW", "Muon", "SGD", "M3"), trials=2, seeds=1)
    lines = finished(Tuning("friedman", ("AdamW", "M3"), 2, 1), {"AdamW": 1.0, "M3": 1.0})
    assert tiers.with_lines(plan, lines).contenders == ("AdamW", "Muon", "M3")


def test_a_run_without_a_beta_names_it_as_the_optimizers_own():
    assert "beta its own" in str(Run("friedman", "Muon", Setting(1e-3, beta=None), 0, 3))


def test_a_part_left_out_is_worse_or_better_by_the_ratio_of_the_losses():
    contender = PARTS["the normalization of rows"]
    plans = [Rates(name, (*PAIR, contender), seeds=3) for name in ("friedman", "digits_mlp")]
    factors = {"AdamW": 2.0, DEFAULT: 1.0, contender: 1.1}
    lines = {
        run: line(run, factors[run.contender] + 0.001 * run.seed)
        for plan in plans
        for run in plan.next({})
    }
    rows = [row.split(" | ") for row in without_parts(plans, lines)[-1].splitlines()]
    cells = {row[0].removeprefix("| "): row[1:] for row in rows}
    assert cells["the normalization of rows"][0] == "1.100; 2 worse, 0 better of 2"
    assert cells["the covariance"][0] == "not run"
