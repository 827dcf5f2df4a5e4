import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import newton_schulz, polar_express


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    rank = len(values)
    u = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64)).Q
    return (u * values) @ v.T


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 64), (64, 16)])
@pytest.mark.parametrize(
    ("dtype", "slack"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 0.02)]
)
def test_singular_values_from_a_thousandth_on_land_within_an_eighth_of_one(
    rows, columns, dtype, slack
):
    rank = min(rows, columns)
    values = torch.logspace(0, -2.5, rank, dtype=torch.float64)
    matrix = with_singular_values(values, rows, columns).float()
    out = newton_schulz(matrix[None], polar_express(5), dtype)[0].double()
    found = torch.linalg.svdvals(out)
    assert found.min() >= 0.876 - slack
    assert found.max() <= 1.124 + slack


def test_singular_vectors_are_kept():
    torch.manual_seed(0)
    matrix = with_singular_values(torch.linspace(1, 0.1, 12, dtype=torch.float64), 12, 20)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ newton_schulz(matrix[None], polar_express(9), torch.float64)[0] @ vh.T
    torch.testing.assert_close(rotated, torch.eye(12, dtype=torch.float64), atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    exponent=st.integers(-36, 36),
)
def test_the_scale_of_the_matrix_does_not_matter(batch, rows, columns, exponent):
    torch.manual_seed(rows * columns)
    matrices = torch.randn(batch, rows, columns)
    expected = newton_schulz(matrices, polar_express(5), torch.float32)
    found = newton_schulz(matrices * 10.0**exponent, polar_express(5), torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_a_zero_matrix_stays_zero_beside_another_one():
    matrices = torch.stack([torch.zeros(4, 6), torch.randn(4, 6)])
    out = newton_schulz(matrices, polar_express(5), torch.float32)
    assert torch.equal(out[0], torch.zeros(4, 6))
    assert out[1].isfinite().all()


def test_the_argument_is_not_written_to():
    matrices = torch.randn(2, 6, 4)
    before = matrices.clone()
    newton_schulz(matrices, polar_express(3), torch.float32)
    assert torch.equal(matrices, before)


def test_polar_express_steps_compose_to_a_function_near_one():
    """From 1.03 thousandths on: the guard against rounding costs 3 % at the lower end."""
    x = torch.logspace(-2.98, 0, 20_001, dtype=torch.float64)
    y = x
    for a, b, c in polar_express(5):
        y = a * y + b * y**3 + c * y**5
    assert (y - 1).abs().max() < 0.124
    y = x
    for a, b, c in polar_express(8):
        y = a * y + b * y**3 + c * y**5
    assert (y - 1).abs().max() < 1e-4


def test_one_quintic_is_the_minimax_polynomial():
    (coefficients,) = polar_express(1, lower=0.2)
    x = torch.linspace(0.2, 1, 10_001, dtype=torch.float64)
    powers = torch.stack([x, x**3, x**5])

    def worst(abc: torch.Tensor) -> float:
        return float((abc @ powers - 1).abs().max())

    best = torch.tensor(coefficients, dtype=torch.float64)
    for direction in torch.randn(50, 3, dtype=torch.float64):
        assert worst(best + 1e-3 * direction) > worst(best)


def test_published_coefficients_are_reproduced():
    """The first five of arXiv 2505.16932, before their shrinking by 1 %."""
    published = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845749518, 0.4188073119525673),
    ]
    for found, expected in zip(polar_express(6), published, strict=False):
        unshrunk = [c * 1.01 ** (2 * i + 1) for i, c in enumerate(found)]
        assert unshrunk == pytest.approx(expected, rel=1e-8)


def test_fact_7_muons_quintic_spreads_singular_values_and_leaves_tiny_ones_small():
    """Five steps of (3.4445, -4.7750, 2.0315), which do not converge to 1 but to around it."""
    quintic = [(3.4445, -4.7750, 2.0315)] * 5
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(20, 16, 64, dtype=torch.float64, generator=generator)
    found = torch.linalg.svdvals(newton_schulz(wide, quintic, torch.float64))
    assert 0.68 < found.min() < 0.8
    assert 1.05 < found.max() < 1.14
    square = torch.randn(20, 64, 64, dtype=torch.float64, generator=generator)
    found = torch.linalg.svdvals(newton_schulz(square, quintic, torch.float64))
    assert found.min() < 0.5
    assert found.max() < 1.21
