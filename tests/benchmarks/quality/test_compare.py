"""What differs between two sets of lines, and what of it is noise."""

import pytest

from benchmarks.quality.compare import compare
from benchmarks.quality.contenders import Setting
from benchmarks.quality.training import Run

HERE = {"config": "c", "data": "d", "torch": "2", "python": "3"}


def lines(losses, **circumstances):
    """Lines of one setting with these losses, by seed."""
    runs = {Run("friedman", "AdamW", Setting(1e-3), seed, 10): x for seed, x in enumerate(losses)}
    return {r: {**HERE, **circumstances, "metrics": {"val_loss": x}} for r, x in runs.items()}


def outcome(old, new):
    rows = [row for row in compare(old, new, []).splitlines() if row.startswith("| friedman |")]
    return [row.rstrip(" |").rpartition("| ")[2] for row in rows]


@pytest.mark.parametrize(
    ("new", "word"),
    [
        ([1.0, 2.0, 3.0, 4.0], "the same"),
        ([1.1, 1.9, 3.1, 3.9], "noise"),
        ([0.9, 1.9, 2.9, 3.89], "better"),
        ([1.1, 2.1, 3.1, 4.11], "worse"),
    ],
)
def test_seeds_are_paired_so_that_a_steady_change_is_no_noise(new, word):
    assert outcome(lines([1.0, 2.0, 3.0, 4.0]), lines(new)) == [word]


def test_what_the_correction_leaves_open_is_unclear_and_all_settings_together_are_not():
    def folder(factor):
        found = {}
        for k in range(8):
            for seed in range(3):
                run = Run("friedman", "AdamW", Setting(1e-3 * (k + 1)), seed, 10)
                loss = (1 + 0.1 * seed) * (1 + (factor - 1) * (0.8 + 0.2 * seed))
                found[run] = {**HERE, "metrics": {"val_loss": loss}}
        return found

    assert outcome(folder(1.0), folder(1.1)) == ["unclear"] * 8
    text = compare(folder(1.0), folder(1.1), [])
    assert "| AdamW | 8 | 1.0999 [1.0999, 1.0999] | worse |" in text


def test_one_seed_tells_no_noise_but_that_something_changed():
    text = compare(lines([1.0]), lines([2.0]), [])
    assert "| friedman |" not in text
    assert "1 settings have one seed in common, of which 1 ended otherwise" in text


def test_runs_of_one_folder_alone_are_counted_and_changed_circumstances_are_named():
    text = compare(lines([1.0, 2.0, 3.0]), lines([1.0, 2.0], torch="3"), [])
    assert "2 runs are in both, 1 in the old folder alone and 0 in the new one alone. 2" in text
    assert "Not the same in all lines of both: torch." in text
