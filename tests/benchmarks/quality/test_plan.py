"""One tuner for everybody: the plan as a function of the lines that there are."""

import math

import pytest

from benchmarks.quality import plan as plans
from benchmarks.quality.contenders import Setting
from benchmarks.quality.plan import FIVE_RATES, Rates, Swap, Tuning, points
from benchmarks.quality.workload import find

PAIR = ("AdamW", "NorMuon")


def line(loss):
    return {"metrics": {"val_loss": loss}} if math.isfinite(loss) else {"diverged": "at once"}


def finished(plan, loss):
    """All lines of a plan, each run having the loss that a function gives."""
    lines, stages = {}, []
    while missing := plan.next(lines):
        stages.append(missing)
        lines |= {run: line(loss(run)) for run in missing}
        assert len(stages) < 40
    return lines, stages


def bowl(best):
    """A loss whose best rate is `best`, better with more steps."""
    return lambda run: abs(math.log(run.setting.lr / best)) + 100 / run.steps + 0.01 * run.seed


def test_all_optimizers_have_the_same_trials_but_their_first():
    plan = Tuning("friedman", PAIR, trials=5, seeds=2)
    lines, _ = finished(plan, bowl(4e-3))
    adamw, other = (plan.trials_of(contender, lines) for contender in PAIR)
    assert [run.setting for run in adamw[1:]] == [run.setting for run in other[1:]]
    assert adamw[0].setting == Setting(1e-3)
    assert len(adamw) == 6
    assert {run.steps for run in adamw} == {plan.final_steps // 2}


def test_the_first_trial_of_the_others_is_their_default_at_adamws_best_rates_and_decay():
    plan = Tuning("friedman", PAIR, trials=5, seeds=2)
    lines, _ = finished(plan, bowl(4e-3))
    best = min(
        plan.trials_of("AdamW", lines), key=lambda run: abs(math.log(run.setting.lr / 4e-3))
    ).setting
    swap = plan.trials_of("NorMuon", lines)[0].setting
    assert swap == Setting(best.lr, best.aux, best.weight_decay)
    assert [run.setting for run in plan.swapped("NorMuon", lines)] == [swap] * 2
    assert {run.steps for run in plan.swapped("NorMuon", lines)} == {plan.final_steps}


@pytest.mark.parametrize(("best", "widened"), [(1.0, "high"), (1e-5, "low"), (4e-3, None)])
def test_the_range_is_widened_for_all_when_anybodys_best_is_at_its_end(best, widened):
    plan = Tuning("friedman", PAIR, trials=6, seeds=1)
    losses = {"AdamW": bowl(4e-3), "NorMuon": bowl(best)}
    lines, _ = finished(plan, lambda run: losses[run.contender](run))
    rates = {c: [run.setting.lr for run in plan.trials_of(c, lines)] for c in PAIR}
    assert rates["AdamW"][1:] == rates["NorMuon"][1:]
    beyond = [lr for lr in rates["AdamW"] if not plans.LOWEST <= lr <= plans.HIGHEST]
    expected = 0 if widened is None else plans.WIDENINGS * 3
    assert len(beyond) == expected
    assert all((lr > plans.HIGHEST) == (widened == "high") for lr in beyond)


@pytest.mark.parametrize("begun", [0, 2])
def test_an_optimizer_that_is_new_leaves_the_finished_searches_as_they_are(begun):
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, bowl(1.0))
    assert max(run.setting.lr for run in plan.trials_of("AdamW", lines)) > plans.HIGHEST
    joined = Tuning("friedman", (*PAIR, "DeepMomentum, covariance"), trials=6, seeds=2)
    trials = joined.unwidened("DeepMomentum, covariance", lines)[:begun]
    lines |= {run: line(0.0) for run in trials}
    for contender in PAIR:
        assert joined.tuned(contender, lines) == plan.tuned(contender, lines) != []
    assert {run.contender for run in joined.next(lines)} == {"DeepMomentum, covariance"}


def test_the_best_trials_run_in_full_and_the_best_of_them_with_seeds_that_have_chosen_nothing():
    plan = Tuning("friedman", PAIR, trials=6, seeds=3)
    lines, _ = finished(plan, bowl(4e-3))
    trials = plan.searched("NorMuon", lines)
    ranked = sorted(trials, key=lambda run: abs(math.log(run.setting.lr / 4e-3)))
    finalists = plan.finalists("NorMuon", lines)
    rates = list(dict.fromkeys(run.setting.lr for run in ranked))
    assert [run.setting.lr for run in finalists] == rates[: plans.FINALISTS]
    assert plan.best("NorMuon", lines) == ranked[0].setting
    tuned = plan.tuned("NorMuon", lines)
    assert [run.seed for run in tuned] == [1, 2, 3]
    assert {run.seed for run in (*trials, *finalists, *plan.shared("NorMuon", lines))} == {0}
    assert {run.steps for run in tuned} == {plan.final_steps}


def far_away(run):
    """A loss whose best setting is no point of the sequence."""
    s = run.setting
    apart = math.log2(s.lr / 1e-3), math.log2(s.aux / 4), math.log(s.beta / 0.7), s.weight_decay - 1
    return sum(map(abs, apart)) - s.own + 1 / run.steps


def test_a_descent_reaches_the_best_setting_from_everybodys_best_trial(monkeypatch):
    monkeypatch.setattr(plans, "PASSES", 9)
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, far_away)
    for contender in PAIR:
        best = plan.best(contender, lines)
        assert best[1:] == (4.0, 1.0, 0.7, 1)
        assert 1 / plans.NEARBY**0.5 <= best.lr / 1e-3 <= plans.NEARBY**0.5


def test_a_descent_changes_one_coordinate_at_a_time_by_one_value_and_ends():
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, far_away)
    for contender in PAIR:
        tried = plan.descent(contender, lines)
        assert 0 < len(tried) <= plans.PASSES * 9
        seen = [run.setting for run in plan.trials_of(contender, lines)]
        for run in tried:
            changed = [sum(a != b for a, b in zip(run.setting, s, strict=True)) for s in seen]
            assert min(changed) <= 1
            seen.append(run.setting)


def test_no_trial_runs_in_full_before_the_search_has_ended():
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, far_away)
    for run in plan.descent("NorMuon", lines):
        assert plan.finalists("NorMuon", lines)
        assert not plan.finalists("NorMuon", {k: x for k, x in lines.items() if k != run})


def lucky(run):
    """A loss whose best rate at all steps is one that NorMuon's half-length trials avoid."""
    if run.steps < find("friedman").steps and run.contender == "NorMuon":
        return bowl(1e-3)(run)
    return bowl(8e-3)(run)


def test_everybody_also_tries_the_best_setting_of_the_others_with_either_value_of_its_own_knob():
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, stages = finished(
        plan, lambda run: lucky(run) - run.setting.own * (run.contender == "AdamW")
    )
    theirs = plan.best("AdamW", lines)
    assert theirs.own == 1
    assert theirs.lr not in [run.setting.lr for run in plan.finalists("NorMuon", lines)]
    shared = plan.shared("NorMuon", lines)
    assert [run.setting for run in shared] == [theirs._replace(own=own) for own in (0, 1)]
    assert plan.best("NorMuon", lines) == shared[0].setting
    assert {run.steps for run in shared} == {plan.final_steps}
    when = {run: k for k, stage in enumerate(stages) for run in stage}
    assert when[plan.tuned("NorMuon", lines)[1]] > max(when[run] for run in shared)


def test_optimizers_with_the_same_knob_share_its_value_too():
    three = ("AdamW", "DeepMomentum, linear", "DeepMomentum, covariance")
    plan = Tuning("friedman", three, trials=6, seeds=1)
    better = {"DeepMomentum, linear": 0, "DeepMomentum, covariance": 1, "AdamW": 1}
    lines, _ = finished(
        plan, lambda run: bowl(4e-3)(run) + (run.setting.own != better[run.contender])
    )
    own = {c: plan.best(c, lines).own for c in three}
    assert own == better
    *from_adamw, from_linear = plan.shared("DeepMomentum, covariance", lines)
    assert [run.setting.own for run in from_adamw] == [0, 1]
    assert from_linear.setting == plan.best("DeepMomentum, linear", lines)


def test_an_optimizer_outside_the_standard_tier_tries_the_others_settings_and_shares_none():
    other = next(c for c in plans.CONTENDERS if c not in plans.MAIN)
    plan = Tuning("friedman", (*PAIR, other), trials=6, seeds=2)
    best = {"AdamW": 2e-3, "NorMuon": 4e-3, other: 8e-3}
    lines, _ = finished(plan, lambda run: bowl(best[run.contender])(run))
    assert {run.setting.lr for run in plan.shared(other, lines)} == {
        plan.best(c, lines).lr for c in PAIR
    }
    assert {run.setting.lr for run in plan.shared("AdamW", lines)} == {
        plan.best("NorMuon", lines).lr
    }


def test_the_rivals_are_measured_at_other_budgets_with_their_best_setting():
    plan = Tuning("friedman", ("AdamW", "DeepMomentum, covariance"), trials=3, seeds=2)
    lines, _ = finished(plan, bowl(4e-3))
    found = {run.steps for run in lines if run.setting == plan.best("AdamW", lines)}
    assert {round(plan.final_steps * share) for share in (0.5, 1.5, 2.0)} <= found
    ours = {run.steps for run in lines if run.contender == "DeepMomentum, covariance"}
    assert max(ours) == plan.final_steps


@pytest.mark.parametrize(("ahead", "longest"), [(0.9, 2.0), (2.5, 3.0), (3.5, 4.0), (9.0, 4.0)])
def test_a_rival_that_is_behind_at_its_largest_budget_gets_more_steps(ahead, longest):
    plan = Tuning("friedman", ("AdamW", "DeepMomentum, covariance"), trials=3, seeds=2)

    def loss(run):
        worth = ahead if run.contender == "DeepMomentum, covariance" else 1.0
        return abs(math.log(run.setting.lr / 4e-3)) + 100 / (run.steps * worth)

    lines, _ = finished(plan, loss)
    setting = plan.best("AdamW", lines)
    steps = max(run.steps for run in lines if run.setting == setting)
    assert steps == round(plan.final_steps * longest)


def test_a_rival_that_is_the_best_gets_no_more_steps_even_if_it_gets_worse_with_them():
    plan = Tuning("friedman", ("AdamW", "DeepMomentum, covariance"), trials=3, seeds=2)

    def loss(run):
        behind = 5.0 if run.contender == "DeepMomentum, covariance" else 0.0
        return abs(math.log(run.setting.lr / 4e-3)) + run.steps / plan.final_steps + behind

    lines, _ = finished(plan, loss)
    assert max(run.steps for run in lines) == 2 * plan.final_steps


def test_no_range_is_widened_before_everybody_has_tried_the_first_one():
    plan = Tuning("friedman", PAIR, trials=6, seeds=1)
    best = {"AdamW": 1.0, "NorMuon": 1e-5}
    _, stages = finished(plan, lambda run: bowl(best[run.contender])(run))
    beyond = [k for k, runs in enumerate(stages) if any(r.setting.lr > plans.HIGHEST for r in runs)]
    first = [k for k, runs in enumerate(stages) if any(r.contender == "NorMuon" for r in runs)]
    assert beyond[0] > first[0]
    lows = [k for k, runs in enumerate(stages) if any(r.setting.lr < plans.LOWEST for r in runs)]
    assert lows[0] == beyond[0]


def test_a_part_of_the_default_that_is_left_out_does_not_widen_the_range():
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, bowl(4e-3))
    part = next(iter(plans.ABLATIONS))
    joined = Tuning("friedman", (*PAIR, part), trials=6, seeds=2)
    lines |= {run: line(bowl(1.0)(run)) for run in joined.unwidened(part, lines)}
    assert joined.tuned("AdamW", lines) == plan.tuned("AdamW", lines) != []


def test_the_trials_do_not_depend_on_which_optimizers_a_plan_has():
    plan = Tuning("friedman", PAIR, trials=6, seeds=2)
    lines, _ = finished(plan, bowl(1.0))
    alone = Tuning("friedman", ("AdamW",), trials=6, seeds=2)
    assert alone.trials_of("AdamW", lines) == plan.trials_of("AdamW", lines)
    only = {run: x for run, x in lines.items() if run.contender == "AdamW"}
    assert alone.tuned("AdamW", lines) == plan.tuned("AdamW", lines) != []
    assert len(alone.trials_of("AdamW", only)) > 7


def test_no_run_is_asked_for_twice_and_a_plan_goes_on_from_any_lines():
    plan = Tuning("friedman", PAIR, trials=4, seeds=2)
    lines, stages = finished(plan, bowl(4e-3))
    every = [run for stage in stages for run in stage]
    assert len(every) == len(set(every)) == len(lines)
    kept = dict(list(lines.items())[:7])
    while missing := plan.next(kept):
        kept |= {run: lines[run] for run in missing}
    assert kept.keys() == lines.keys()


def test_trials_that_diverge_are_no_finalists():
    plan = Tuning("friedman", PAIR, trials=6, seeds=1)
    lines, _ = finished(plan, lambda run: math.inf if run.setting.lr > 5e-3 else 1 / run.setting.lr)
    assert plan.best("NorMuon", lines).lr <= 5e-3


def test_an_optimizer_that_never_ends_well_has_no_best_and_stops_nobody():
    plan = Tuning("friedman", PAIR, trials=2, seeds=1)
    lines, _ = finished(plan, lambda run: math.inf if run.contender == "NorMuon" else run.steps)
    assert plan.best("NorMuon", lines) is None
    assert plan.best("AdamW", lines) is not None


def test_points_fill_the_range_evenly_and_go_on_where_they_stopped():
    eight = points(8)
    assert eight == points(3) + points(5, skipped=3)
    logs = sorted(math.log(s.lr / plans.LOWEST) for s in eight)
    width = math.log(plans.HIGHEST / plans.LOWEST) / 8
    assert all(k * width - 0.01 <= x <= (k + 1) * width + 0.01 for k, x in enumerate(logs))


def test_three_rates_are_of_both_optimizers_at_the_very_same_rates_decay_and_seeds():
    plan = Rates("friedman", PAIR, seeds=2)
    runs = plan.next({})
    ours = {(r.setting, r.seed, r.steps) for r in runs if r.contender == "NorMuon"}
    theirs = {(r.setting, r.seed, r.steps) for r in runs if r.contender == "AdamW"}
    assert ours == theirs
    assert len(ours) == 3 * 2


def test_adamws_best_rate_is_that_of_the_mean_over_seeds_and_unknown_before_all_have_run():
    plan = Rates("friedman", PAIR, seeds=2)
    lines, _ = finished(plan, bowl(1e-3))
    assert plan.best_rate(lines) == 1e-3
    lines.pop(plan.runs("AdamW", 3e-3)[1])
    assert plan.best_rate(lines) is None


TRIO = ("AdamW", "Muon", "DeepMomentum, covariance")


def test_a_swap_has_every_optimizer_at_adamws_best_rate_with_all_else_as_by_default():
    plan = Swap("friedman", TRIO, seeds=2)
    lines, stages = finished(plan, bowl(4e-3))
    assert [run.setting.lr for run in stages[0]] == list(FIVE_RATES)
    assert {(run.contender, run.seed) for run in stages[0]} == {("AdamW", 0)}
    assert plan.best_rate(lines) == 4e-3
    for contender in TRIO:
        runs = plan.runs(contender, 4e-3)
        assert {run.setting for run in runs} == {Setting(4e-3, weight_decay=0.1, beta=None)}
        assert all(run in lines for run in runs)


def test_a_swap_also_has_the_pair_at_half_and_double_that_rate():
    plan = Swap("friedman", TRIO, seeds=2)
    lines, _ = finished(plan, bowl(4e-3))
    for share in (0.5, 2.0):
        assert all(run in lines for run in plan.runs("DeepMomentum, covariance", 4e-3 * share))
        assert not any(run in lines for run in plan.runs("Muon", 4e-3 * share))


def test_a_swap_in_which_adamw_never_ends_well_stops():
    plan = Swap("friedman", TRIO, seeds=2)
    lines, stages = finished(plan, lambda run: math.inf)
    assert plan.best_rate(lines) is None
    assert len(stages) == 1


def test_plans_of_other_steps_and_batches_have_names_and_runs_of_their_own():
    own = Tuning("friedman", PAIR)
    other = Tuning("friedman", PAIR, steps=1200, batch=4)
    assert (own.label, other.label) == ("friedman", "friedman, 1200 steps, batches x 4")
    assert own.picture != other.picture
    assert {run.batch for run in other.next({})} == {4}
    assert not set(own.next({})) & set(other.next({}))
