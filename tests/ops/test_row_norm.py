import pytest
import torch

from deepopt.ops import normalize_rows, rms_gain


def test_rows_of_a_repeated_matrix_become_equally_long_and_the_norm_is_kept():
    matrices, moment = torch.randn(2, 6, 10), torch.zeros(2, 6)
    for _ in range(3):
        out, moment = normalize_rows(matrices, moment, 0.9)
    lengths = out.norm(dim=-1)
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))
    torch.testing.assert_close(torch.linalg.matrix_norm(out), torch.linalg.matrix_norm(matrices))


def test_the_moment_is_the_running_mean_square():
    matrices, moment = torch.randn(1, 3, 5), torch.rand(1, 3)
    expected = 0.8 * moment + 0.2 * matrices.square().mean(-1)
    _, found = normalize_rows(matrices, moment, 0.8)
    torch.testing.assert_close(found, expected)


def test_zero_rows_and_zero_matrices_stay_zero():
    matrices, moment = torch.randn(2, 4, 5), torch.zeros(2, 4)
    matrices[0] = 0
    matrices[1, 2] = 0
    out, _ = normalize_rows(matrices, moment, 0.95)
    assert out.isfinite().all()
    assert torch.equal(out[0], matrices[0])
    assert torch.equal(out[1, 2], matrices[1, 2])


@pytest.mark.parametrize("shape", [(1, 4, 7), (2, 7, 4)])
def test_gain_is_one_for_semi_orthogonal_matrices_and_capped_for_low_rank(shape):
    orthogonal = torch.linalg.qr(torch.randn(shape[0], 7, 4)).Q
    orthogonal = orthogonal if shape[1] == 7 else orthogonal.mT
    torch.testing.assert_close(rms_gain(orthogonal, 1.5), torch.ones(shape[0], 1, 1))
    rank_one = torch.zeros(shape)
    rank_one[:, 0, 0] = 1
    assert rms_gain(rank_one, 1.5).unique().tolist() == [1.5]
    torch.testing.assert_close(rms_gain(rank_one, 10.0), torch.full((shape[0], 1, 1), 2.0))
    assert rms_gain(2 * orthogonal, 1.5).unique().tolist() == [1.0]
