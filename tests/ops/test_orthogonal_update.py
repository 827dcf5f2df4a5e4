import copy

import pytest
import torch

from deepopt.ops import (
    ScaleArguments,
    newton_schulz,
    orthogonal_update,
    polar_express,
    scale_update,
)
from deepopt.ops.operator import OPERATORS
from deepopt.ops.products import worth_rounding

STEP = torch.ones(2)
COEFFICIENTS = polar_express(5)


def orthogonal(seed, rows=6, columns=9):
    made = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(2, columns, rows, generator=made)).Q.mT


def arguments(
    updates, weight=None, grad=None, rows=True, rms=1.0, measured=True, betas=(0.9, 0.99)
):
    grad = updates[0] if grad is None else grad
    (b, m, _), norm = updates[0].shape, torch.zeros(len(grad)) if measured else None
    state = torch.zeros(2, b, m).unbind() if rows else (None, None)
    scale = (0.1 * grad, grad, STEP, *betas, 1.5, rms, norm, *state, weight)
    return updates, ScaleArguments(*scale)


def mean_squares(matrices):
    return matrices.square().mean((-2, -1))


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 1e36])
def test_the_first_update_has_the_entries_of_adamw_whatever_the_unit_of_the_gradient(scale):
    update, norm, *_ = scale_update(*arguments([orthogonal(0)], grad=scale * orthogonal(1)))
    torch.testing.assert_close(mean_squares(update), torch.ones(2), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm / scale, torch.full((2,), 0.06**0.5), rtol=1e-4, atol=0)


def test_a_fixed_size_takes_no_notice_of_gradients():
    broken = torch.full((2, 6, 9), torch.nan)
    update, *states = scale_update(
        *arguments([orthogonal(0)], grad=broken, rows=False, rms=0.2, measured=False)
    )
    torch.testing.assert_close(mean_squares(update), torch.full((2,), 0.04))
    assert states == []


def test_a_measured_size_is_in_units_of_rms():
    once, *states = scale_update(*arguments([orthogonal(0)]))
    twice, *same = scale_update(*arguments([orthogonal(0)], rms=2.0))
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(same, states)


def test_a_second_update_turns_the_first_and_keeps_its_size():
    first, second = orthogonal(0), orthogonal(1).mT.contiguous().mT
    update, *_ = scale_update(*arguments([first, second], torch.tensor([0.0, 0.5]), measured=False))
    torch.testing.assert_close(mean_squares(update), torch.ones(2))
    alone, *_ = scale_update(*arguments([first], measured=False))
    torch.testing.assert_close(update[0], alone[0])
    assert not torch.allclose(update[1], alone[1], atol=0.1)


def test_rows_are_left_alone_on_request():
    first = orthogonal(0)
    lengths = torch.linspace(0.9, 1.1, 6)[:, None]
    update, _ = scale_update(*arguments([lengths * first], rows=False))
    ratio = update / first / lengths
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))


def test_zero_rows_and_zero_matrices_stay_zero_and_are_not_counted():
    first = orthogonal(0)
    first[0], first[1, 2] = 0, 0
    update, _, moment, weight = scale_update(*arguments([first]))
    assert update.isfinite().all()
    assert not update[0].any()
    assert not update[1, 2].any()
    assert torch.equal(moment > 0, first.any(-1))
    assert torch.equal(weight > 0, first.any(-1))


def test_matrices_without_rows_are_taken():
    none = torch.empty(2, 0, 4)
    rows = torch.empty(2, 0)
    update, *state = scale_update(
        [none],
        ScaleArguments(
            none, none, torch.ones(2), 0.9, 0.99, 1.5, 0.2, row_moment=rows, row_weight=rows
        ),
    )
    assert update.shape == none.shape
    assert [tensor.shape for tensor in state] == [rows.shape] * 2


def test_a_gradient_that_is_not_a_number_spoils_its_own_matrix_alone():
    grad = orthogonal(1)
    grad[1, 2, 3] = torch.nan
    update, norm, *_ = scale_update(*arguments([orthogonal(0)], grad=grad))
    assert update[0].isfinite().all()
    assert norm[0].isfinite()
    assert update[1].isnan().all()
    assert norm[1].isnan()


def test_nothing_is_written_into_what_is_given():
    updates, scale = arguments([orthogonal(0), orthogonal(1)], torch.ones(2))
    before = copy.deepcopy((*updates, *scale))
    scale_update(updates, scale)
    orthogonal_update(COEFFICIENTS, torch.float32, updates[1], scale)
    for ours, theirs in zip((*updates, *scale), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("sides", [(6, 9), (96, 160)])
@pytest.mark.parametrize("two", [False, True])
def test_the_whole_output_map_is_newton_schulz_and_scale_update_to_the_last_bit(sides, two):
    dtype = torch.bfloat16 if worth_rounding(torch.empty(2, *sides)) else torch.float32
    updates = [orthogonal(0, *sides), orthogonal(1, *sides)][: 1 + two]
    weight = torch.ones(2) if two else None
    _, scale = arguments(updates, weight, grad=orthogonal(2, *sides))
    orthogonalized = newton_schulz(scale.momentum, COEFFICIENTS, dtype)
    expected = scale_update([orthogonalized, *updates[1:]], scale)
    found = orthogonal_update(COEFFICIENTS, dtype, updates[1] if two else None, scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_retentions_that_are_tensors_are_differentiated():
    beta = torch.tensor(0.9, requires_grad=True)
    updates, scale = arguments([orthogonal(0)], grad=orthogonal(1), betas=(beta, 0.99))
    scale = scale._replace(step=torch.full((2,), 3.0))
    assert OPERATORS["scale_update"].backend_for(updates, scale) == "reference"
    scale_update(updates, scale)[0].square().sum().backward()
    assert beta.grad.abs() > 0
    with torch.no_grad():
        assert OPERATORS["scale_update"].backend_for(updates, scale) == "reference"


def test_states_that_belong_together_are_asked_for_together():
    updates, scale = arguments([orthogonal(0), orthogonal(1)], torch.ones(2))
    for missing, message in (
        ("row_weight", "row_weight"),
        ("weight", "two and"),
    ):
        given = scale._replace(**{missing: None})
        for run in (scale_update, OPERATORS["scale_update"].reference):
            with pytest.raises((ValueError, RuntimeError), match=message):
                run(updates, given)
