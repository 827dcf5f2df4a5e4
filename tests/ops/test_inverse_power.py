import pytest
import torch

from deepopt.ops import inverse_power


def gram(batch: int, size: int, rank: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(
        batch, size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return factor @ factor.mT


@pytest.mark.parametrize("power", [0.25, 1 / 3, 0.5, 1.0])
def test_its_reciprocal_power_restores_the_damped_matrix(power):
    matrix, damping = gram(3, 8, 20), 1e-3
    root = inverse_power(matrix, power, damping)
    values, vectors = torch.linalg.eigh(root)
    restored = (vectors * values.pow(-1 / power)[:, None, :]) @ vectors.mT
    largest = torch.linalg.matrix_norm(matrix, ord=2)[:, None, None]
    expected = matrix / largest + damping * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(restored, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_rank_deficient_matrices_give_a_bounded_result(rank):
    root = inverse_power(gram(2, 8, rank).float(), 0.25, 1e-6)
    assert root.isfinite().all()
    assert torch.linalg.matrix_norm(root, ord=2).max() <= 1e-6**-0.25 * 1.001


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    matrix = gram(2, 6, 12).float()
    torch.testing.assert_close(
        inverse_power(matrix * scale, 0.25, 1e-4),
        inverse_power(matrix, 0.25, 1e-4),
        atol=1e-3,
        rtol=1e-3,
    )


def test_zero_and_non_finite_matrices_give_the_identity_beside_good_ones():
    matrices = torch.stack([torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.eye(4)])
    roots = inverse_power(matrices, 0.5, 1e-6)
    for root in roots:
        torch.testing.assert_close(root, torch.eye(4), atol=1e-5, rtol=0)
