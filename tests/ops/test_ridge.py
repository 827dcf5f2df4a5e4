import pytest
import torch

from deepopt.ops import ridge


@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 12, 8), (3, 8, 8), (3, 1, 8)])
def test_it_is_the_inverse_written_out(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    matrix = torch.randn(3, 4, 8, dtype=torch.float64)
    identity = torch.eye(8, dtype=torch.float64)
    inverse = torch.linalg.inv(identity + 0.7 * rows.mT @ rows)
    torch.testing.assert_close(ridge(matrix, rows, 0.7), (matrix @ inverse, rows @ inverse))


@pytest.mark.parametrize("count", [4, 40])
def test_huge_rows_leave_what_is_orthogonal_to_them(count):
    rows = torch.zeros(1, count, 8)
    rows[..., :3] = torch.randn(1, count, 3) * 1e5
    result, _ = ridge(torch.ones(1, 2, 8), rows, 1.0)
    torch.testing.assert_close(result[..., 3:], torch.ones(1, 2, 5))
    assert result[..., :3].abs().max() < 1e-3


@pytest.mark.parametrize("count", [3, 7])
def test_it_is_differentiable(count):
    matrix = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, count, 5, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ridge, (matrix, rows, rate))
