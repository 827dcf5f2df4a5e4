import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import backend, inverse_power
from deepopt.ops.inverse_power import newton, newton_coefficients, newton_serves

ROOTS = {"eigenvalues": inverse_power, "newton": newton}
SPECTRA = {
    "conditioned 1e6": lambda r: torch.logspace(0, -6, r, dtype=torch.float64),
    "conditioned 1e12": lambda r: torch.logspace(0, -12, r, dtype=torch.float64),
    "all equal": lambda r: torch.ones(r, dtype=torch.float64),
    "rank one": lambda r: (torch.arange(r) == 0).double(),
    "half of the rank": lambda r: (torch.arange(r) <= r // 2).double(),
    "one far above the rest": lambda r: torch.where(torch.arange(r) == 0, 1.0, 1e-4).double(),
}


def gram(batch: int, size: int, rank: int, seed: int = 0) -> torch.Tensor:
    factor = torch.randn(
        batch, size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return factor @ factor.mT


def with_eigenvalues(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.randn(1, size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(basis).Q
    return (basis * values) @ basis.mT


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("power", [0.25, 1 / 3, 0.5, 1.0])
def test_its_reciprocal_power_restores_the_damped_matrix(power, root_of):
    matrix, damping = gram(3, 8, 20), 1e-3
    root = root_of(matrix, power, damping)
    values, vectors = torch.linalg.eigh(root)
    restored = (vectors * values.pow(-1 / power)[:, None, :]) @ vectors.mT
    largest = torch.linalg.matrix_norm(matrix, ord=2)[:, None, None]
    expected = matrix / largest + damping * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(restored, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_rank_deficient_matrices_give_a_bounded_result(rank, root_of):
    root = root_of(gram(2, 8, rank), 0.25, 1e-6)
    assert root.isfinite().all()
    assert torch.linalg.matrix_norm(root, ord=2).max() <= 1e-6**-0.25 * 1.001


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_eigenvalues_below_zero_for_rounding_count_as_zero(rank):
    root = inverse_power(gram(2, 8, rank).float(), 0.25, 1e-6)
    assert torch.linalg.matrix_norm(root, ord=2).max() <= 1e-6**-0.25 * 1.001


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(scale, root_of):
    matrix = gram(2, 6, 12).float()
    torch.testing.assert_close(
        root_of(matrix * scale, 0.25, 1e-4), root_of(matrix, 0.25, 1e-4), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
def test_zero_and_non_finite_matrices_give_the_identity_beside_good_ones(root_of):
    bad = [torch.zeros(4, 4), torch.full((4, 4), torch.nan), torch.full((4, 4), torch.inf)]
    roots = root_of(torch.stack([*bad, torch.eye(4)]), 0.5, 1e-6)
    for root in roots:
        torch.testing.assert_close(root, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 33])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_newton_finds_what_eigenvalues_give(spectrum, size, power):
    matrix = with_eigenvalues(spectrum(size))
    expected = inverse_power(matrix, power, 1e-6)
    difference = torch.linalg.matrix_norm(newton(matrix, power, 1e-6) - expected)
    assert difference < 1e-8 * torch.linalg.matrix_norm(expected)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("lowest", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_newton_takes_a_crowd_at_the_largest_eigenvalue_for_it_within_a_percent(lowest, power):
    matrix = with_eigenvalues(torch.linspace(lowest, 1, 200, dtype=torch.float64))
    expected = inverse_power(matrix, power, 1e-6)
    torch.testing.assert_close(newton(matrix, power, 1e-6), expected, rtol=0.01, atol=1e-4)


def test_newton_bears_eigenvalues_below_zero_for_rounding():
    matrix = gram(4, 96, 40).float()  # 56 of its eigenvalues would be zero
    expected = inverse_power(matrix, 0.5, 1e-6)
    difference = torch.linalg.matrix_norm(newton(matrix, 0.5, 1e-6) - expected)
    assert (difference < 0.02 * torch.linalg.matrix_norm(expected)).all()


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 12),
    rank=st.integers(1, 20),
    p=st.integers(1, 6),
    exponent=st.floats(-6, -1),
    seed=st.integers(0, 1000),
)
def test_newton_inverts_the_damped_matrix_and_commutes_with_it(size, rank, p, exponent, seed):
    matrix, damping = gram(1, size, rank, seed), 10.0**exponent
    root = newton(matrix, 1 / p, damping)
    largest = torch.linalg.matrix_norm(matrix, ord=2, keepdim=True)
    relative = matrix / largest
    damped = relative + damping * torch.eye(size, dtype=torch.float64)
    one = torch.linalg.matrix_power(root, p) @ damped
    # Rounding is relative to the largest eigenvalue, 1 / damping above the smallest; so is what
    # the estimate of the largest may miss where others are close to it.
    torch.testing.assert_close(
        one, torch.eye(size, dtype=torch.float64).expand_as(one), atol=0.01, rtol=0
    )
    torch.testing.assert_close(
        root @ relative, relative @ root, atol=1e-8 / damping ** (1 / p), rtol=0
    )
    torch.testing.assert_close(root, root.mT, atol=1e-8 / damping ** (1 / p), rtol=0)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("lower", [0.05, 5e-4, 5e-7])
def test_newton_coefficients_drive_every_eigenvalue_to_one(lower, p):
    x = torch.logspace(0, 1, 1000, base=lower, dtype=torch.float64).pow(1 / p)
    coefficients = newton_coefficients(p, lower)
    for s, a in coefficients:
        x = s * x * (a - x**p)
    assert (x - 1).abs().max() < 1e-12
    assert len(coefficients) <= 16


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
def test_roots_are_the_same_bits_again(root_of):
    matrix = gram(3, 40, 60).float()
    assert torch.equal(root_of(matrix, 0.5, 1e-6), root_of(matrix, 0.5, 1e-6))


@pytest.mark.parametrize("root_of", ROOTS.values(), ids=ROOTS)
def test_a_root_does_not_depend_on_the_other_matrices_of_the_batch(root_of):
    matrix = gram(3, 40, 60)
    matrix[1] *= 1e20
    together = root_of(matrix, 0.5, 1e-6)
    alone = torch.cat([root_of(matrix[i : i + 1], 0.5, 1e-6) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("power", "damping", "served"),
    [
        (1.0, 1e-6, True),
        (0.5, 1e-6, True),
        (1 / 3, 1e-6, True),
        (0.25, 1e-3, True),
        (0.3, 1e-6, False),
        (2.0, 1e-6, False),
        (0.5, 1e-9, False),
    ],
)
def test_newton_serves_reciprocals_of_whole_numbers_and_damping_above_rounding(
    power, damping, served
):
    assert newton_serves(torch.zeros(1, 2, 2), power, damping) is served


def test_the_cpu_decomposes_and_says_so():
    matrix = gram(1, 4, 6)
    assert inverse_power.backend_for(matrix, 0.5, 1e-6) == "reference"
    with backend("reference"):
        assert torch.equal(
            inverse_power(matrix, 0.5, 1e-6), inverse_power.reference(matrix, 0.5, 1e-6)
        )
