import pytest
import torch

from deepopt.ops import (
    adam_ratio,
    frobenius,
    orthogonal_size,
    rms_gain,
    row_gains,
    running_root,
)


def normalize_rows(matrices, *state):
    gains, *state = row_gains(matrices.square().mean(-1), *state)
    return matrices * gains[..., None], *state


def gain(matrices, cap):
    return rms_gain(torch.linalg.matrix_norm(matrices), min(matrices.shape[-2:]), cap)


def fresh(*shape):
    return torch.zeros(shape), torch.zeros(shape)


def test_rows_of_a_repeated_matrix_become_equally_long_and_the_norm_is_kept():
    matrices = torch.randn(2, 6, 10)
    moment, weight = fresh(2, 6)
    for _ in range(3):
        out, moment, weight = normalize_rows(matrices, moment, weight, 0.9)
    lengths = out.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))
    torch.testing.assert_close(torch.linalg.matrix_norm(out), torch.linalg.matrix_norm(matrices))


def test_the_quotient_of_moment_and_weight_is_the_weighted_mean_of_mean_squares():
    series = torch.randn(5, 1, 3, 8)
    moment, weight = fresh(1, 3)
    for matrices in series:
        _, moment, weight = normalize_rows(matrices, moment, weight, 0.8)
    shares = 0.8 ** torch.arange(4.0, -1, -1)
    expected = (shares[:, None, None] * series.square().mean(-1)).sum(0) / shares.sum()
    torch.testing.assert_close(moment / weight, expected)


def test_a_row_that_wakes_late_moves_like_the_others():
    matrices = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    asleep = matrices.clone()
    asleep[:, 0] = 0
    moment, weight = fresh(1, 8)
    for _ in range(200):
        out, moment, weight = normalize_rows(asleep, moment, weight, 0.999)
        assert not out[:, 0].any()
    out, *_ = normalize_rows(matrices, moment, weight, 0.999)
    lengths = out.norm(dim=-1)[0]
    torch.testing.assert_close(lengths[0], lengths[1:].mean(), rtol=0.01, atol=0)


def test_zero_rows_and_zero_matrices_stay_zero():
    matrices = torch.randn(2, 4, 5)
    matrices[0] = 0
    matrices[1, 2] = 0
    out, *_ = normalize_rows(matrices, *fresh(2, 4), 0.95)
    assert out.isfinite().all()
    assert torch.equal(out[0], matrices[0])
    assert torch.equal(out[1, 2], matrices[1, 2])


@pytest.mark.parametrize("shape", [(1, 4, 7), (2, 7, 4)])
def test_gain_is_one_for_semi_orthogonal_matrices_and_capped_for_low_rank(shape):
    orthogonal = torch.linalg.qr(torch.randn(shape[0], 7, 4)).Q
    orthogonal = orthogonal if shape[1] == 7 else orthogonal.mT
    torch.testing.assert_close(gain(orthogonal, 1.5), torch.ones(shape[0]))
    rank_one = torch.zeros(shape)
    rank_one[:, 0, 0] = 1
    assert gain(rank_one, 1.5).unique().tolist() == [1.5]
    torch.testing.assert_close(gain(rank_one, 10.0), torch.full(shape[:1], 2.0))
    assert gain(2 * orthogonal, 1.5).unique().tolist() == [1.0]


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 1e36])
def test_norms_are_right_where_squares_are_not_floats(scale):
    matrices = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.matrix_norm(matrices.double() * scale)
    torch.testing.assert_close(frobenius(matrices * scale).double(), exact, rtol=1e-5, atol=0)
    root = running_root(frobenius(matrices * scale), 2 * frobenius(matrices * scale), 0.25)
    torch.testing.assert_close(root.double(), exact * 1.75**0.5, rtol=1e-5, atol=0)
    assert frobenius(torch.zeros(1, 2, 2)).item() == 0.0
    assert running_root(torch.zeros(1), torch.zeros(1), 0.1).item() == 0.0


@pytest.mark.parametrize("scale", [1e-37, 1.0, 1e37])
def test_the_ratio_of_equal_gradients_is_one_from_the_first_step_on(scale):
    grad, momentum, norm = scale * torch.randn(1, 4, 5), torch.zeros(1, 4, 5), torch.zeros(1)
    for step in range(1, 6):
        momentum = momentum.lerp(grad, 0.1)
        norm = running_root(norm, frobenius(grad), 0.001)
        ratio = adam_ratio(momentum, norm, torch.tensor([float(step)]), (0.9, 0.999))
        torch.testing.assert_close(ratio, torch.ones(1), rtol=1e-3, atol=0)


def test_an_orthogonal_update_is_at_least_0_4_large_but_at_most_three_times_as_large_as_adamws():
    ratios = torch.tensor([0.0, 1e-30, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, float("nan")])
    sizes = torch.tensor([0.0, 3e-30, 0.15, 0.3, 0.4, 0.4, 0.7, 1.0, float("nan")])
    torch.testing.assert_close(orthogonal_size(ratios), sizes, equal_nan=True)
