"""Runs the kernels program by program on the CPU, in Triton's interpreter.

The interpreter has to be chosen before the kernels are imported: ``test_kernels.py`` runs this file
in a process of its own, with TRITON_INTERPRET=1.
"""

import importlib

import numpy as np
import pytest
import torch

import deepopt.ops
from deepopt.memory import Delta
from deepopt.ops import frobenius, polar_express
from deepopt.ops.triton import (
    delta_write,
    erase,
    newton_schulz,
    scaling,
    split_product,
    symmetric_product,
)
from tests.triton.interpreter import as_bfloat16

on_triton = importlib.import_module("deepopt.ops.triton.newton_schulz")  # not the function
on_covariance = importlib.import_module("deepopt.ops.triton.covariance")

reference = deepopt.ops.newton_schulz.reference

HALF = 2.0**-24  # of a unit in the last place of float32
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 1, 1), (1, 32, 16), (3, 33, 45), (1, 70, 20), (2, 8, 99), (0, 8, 8), (2, 0, 3)]


def _within(found, expected, bound):
    """Every element is as near as its own sum allows."""
    assert found.shape == expected.shape
    excess = (found.double() - expected).abs() - bound
    assert found.numel() == 0 or float(excess.max()) <= 0


def _strided(tensor, layout):
    """The same numbers, transposed in memory or with gaps."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "gaps":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]
    return tensor


def test_bfloat16_in_the_interpreter_rounds_as_torch_does():
    numbers = torch.cat([torch.randn(1000), torch.tensor([0.0, 1e-40, 3.39e38, torch.inf])])
    numbers = torch.cat([numbers, -numbers, torch.tensor([1.00390625, 1.01171875])])
    rounded = torch.from_numpy(as_bfloat16(numbers.numpy()).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(rounded, numbers.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, "rows") for shape in SHAPES] + [((3, 33, 45), "transposed"), ((3, 33, 45), "gaps")],
)
def test_a_symmetric_product_is_as_near_as_its_sums_allow(shape, dtype, layout):
    batch, size, depth = shape
    x = torch.randn(shape).to(dtype)
    addend = torch.randn(batch, size, size)
    addend = (addend + addend.mT).to(dtype)
    view = _strided(x, layout)
    wide, eye = x.double(), torch.eye(size, dtype=torch.float64)
    expected = 0.5 * wide @ wide.mT - 0.25 * addend.double() + 2 * eye
    total = 0.5 * wide.abs() @ wide.abs().mT + 0.25 * addend.double().abs() + 2 * eye
    for out in (torch.float32, dtype):
        found = symmetric_product(view, view, addend, alpha=0.5, beta=-0.25, shift=2.0, dtype=out)
        assert found.dtype == out
        assert torch.equal(found, found.mT)
        _within(found, expected, (depth + 4) * HALF * total + ROUNDING[out] * expected.abs())


def test_products_of_commuting_matrices_are_symmetric_to_the_last_bit():
    x = torch.randn(2, 50, 20, dtype=torch.float64) / 7
    gram = x @ x.mT
    power = gram @ gram
    found = symmetric_product(gram.half(), power.half(), dtype=torch.float32)
    assert torch.equal(found, found.mT)
    expected = gram.half().double() @ power.half().double()
    lower = torch.tril(torch.ones(50, 50, dtype=torch.bool))
    bound = 24 * HALF * (gram.abs() @ power.abs())
    _within(found[:, lower], expected[:, lower], 2 * bound[:, lower])


@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2,
                                   (torch.float32, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("shape", [*SHAPES, (1, 31, 290)])
def test_erase_is_as_near_as_its_sums_allow(shape, types):
    batch, m, n = shape
    depth = max(min(m, n), 1)
    momentum, grad = torch.randn(2, batch, m, n)
    a = _strided(torch.randn(batch, m, depth).to(types[0]), "gaps")
    b = _strided(torch.randn(batch, depth, n).to(types[1]), "transposed")
    factor, cut = torch.rand(2, batch)
    found, erased, before = erase(momentum, grad, a, b, factor, 0.9, cut)
    keep, fresh = torch.tensor(0.9).double(), (1 - torch.tensor(0.9)).double() * cut.double()
    wide_a, wide_b = a.to(types[1]).double(), b.double()
    product = factor.double()[:, None, None] * (wide_a @ wide_b)
    expected = keep * momentum.double() - product + fresh[:, None, None] * grad.double()
    total = factor.double()[:, None, None] * (wide_a.abs() @ wide_b.abs())
    bound = (depth + 4) * HALF * total
    _within(found, expected, bound + 8 * HALF * (momentum.abs() + grad.abs()))
    norm = torch.linalg.matrix_norm(product)
    # A sum in pairs within each tile, then in pairs over the tiles.
    _within(erased, norm, torch.linalg.matrix_norm(bound) + 32 * HALF * norm)
    norm = torch.linalg.matrix_norm(momentum.double())
    _within(before, norm, 32 * HALF * norm)


@pytest.mark.parametrize(
    "scales", [(1.0, 1.0), (1e-20, 1e15), (1e30, 1e-9), (1e-38, 5e37), (5e37, 1e-38)]
)
@pytest.mark.parametrize(("shape", "layout"), [((2, 33, 45), "transposed"), ((1, 40, 16), "gaps")])
def test_a_split_product_is_as_near_as_float32(shape, layout, scales):
    batch, _, depth = shape
    a = _strided(scales[0] * torch.randn(shape), layout)
    b = _strided(scales[1] * torch.randn(batch, depth, 35), layout)
    a[:, ::3] *= 1e-3  # entries of many sizes
    expected = a.double() @ b.double()
    # Both operands lose 2^-22, and what is far below their norms 2^-36 of those.
    norms = torch.linalg.matrix_norm(a.double()) * torch.linalg.matrix_norm(b.double())
    bound = (depth + 12) * HALF * (a.double().abs() @ b.double().abs())
    _within(split_product(a, b), expected, bound + 2.0**-34 * norms[:, None, None])


def test_a_split_product_of_bounded_matrices_needs_no_units():
    a, b = torch.randn(2, 40, 33), torch.randn(2, 33, 17)
    expected = a.double() @ b.double()
    bound = 45 * HALF * (a.double().abs() @ b.double().abs())
    _within(split_product(a, b, bounded=True), expected, bound + 2.0**-30)


def test_a_split_product_without_depth_is_zero():
    assert torch.equal(
        split_product(torch.ones(1, 3, 0), torch.ones(1, 0, 4)), torch.zeros(1, 3, 4)
    )


@pytest.mark.parametrize("shape", [(2, 33, 72), (1, 48, 17)])
def test_gram_average_is_that_of_rounded_keys(shape):
    grad, scale, kept = torch.randn(shape), torch.full(shape[:1], 6.0), torch.rand(shape[0])
    of_rows = shape[1] <= shape[2]
    gram = torch.randn(shape[0], min(shape[1:]), min(shape[1:]))
    gram = gram @ gram.mT
    found = on_covariance.gram_average(gram, grad, scale, kept, 0.05, of_rows)
    keys = (grad / 6.0).bfloat16().double()
    keys = keys if of_rows else keys.mT
    expected = kept.double()[:, None, None] * gram.double() + 0.05 * keys @ keys.mT
    total = gram.double().abs() + 0.05 * keys.abs() @ keys.abs().mT
    assert torch.equal(found, found.mT)
    _within(found, expected, (max(shape[1:]) + 4) * HALF * total)


@pytest.mark.parametrize("power", [0.5, 0.25])
@pytest.mark.parametrize("rank", [10, 60])
def test_roots_are_those_of_eigenvalues(power, rank):
    """The Gram matrix is in float32: its rounding bounds what any method knows of small values."""
    factor = torch.randn(1, 34, rank)
    gram = factor @ factor.mT
    found = on_covariance.inverse_power(gram, power, 1e-6)
    exact = deepopt.ops.inverse_power.reference(gram.double(), power, 1e-6)
    assert (found - exact).norm() < (0.02 if rank < 34 else 1e-3) * exact.norm()


def test_norms_survive_squares_beyond_float32():
    momentum = torch.randn(2, 40, 40) * torch.tensor([1e-30, 1e30])[:, None, None]
    a, b = momentum, torch.eye(40).expand(2, 40, 40)
    ones = torch.ones(2)
    _, erased, before = erase(momentum, momentum, a, b, ones, torch.tensor([0.5]), ones)
    norms = torch.linalg.matrix_norm(momentum.double()).float()
    torch.testing.assert_close(erased, norms)
    torch.testing.assert_close(before, norms)


def test_a_norm_beyond_the_largest_float_is_that_and_no_infinity():
    found = scaling.norms(torch.stack([torch.full((40, 50), x) for x in (3e38, torch.nan)]))
    assert 3.3e38 < found[0] < torch.inf
    assert found[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 20, 70), (1, 50, 40), (1, 33, 33), (1, 5, 2)])
def test_delta_write_follows_the_memory(shape, dtype):
    """The reference is the memory in float64, the tolerance that of operands in ``dtype``."""
    grad = torch.randn(shape)
    state = Delta(rate=0.3).init(grad.double())
    state["momentum"] = torch.randn(shape).double()
    state["norm"] = frobenius(grad).double() * torch.rand(shape[0])
    state["erasure"] = torch.rand(shape[0]).double() / 10
    old, *scalars = (state[key].float() for key in ("momentum", "norm", "erasure"))
    found = delta_write(old, grad, *scalars, 0.3, 0.9, dtype)
    ahead = Delta(rate=0.3).write_and_read(state, grad.double(), 0.9)
    # Keys, momentum, Gram matrix and the product in between: four roundings at most, of a term
    # that is at most as large as the momentum.
    slack = 4 * ROUNDING[dtype] + 64 * HALF
    largest = 0.3 * torch.linalg.matrix_norm(old, 2).max() + old.abs().max()
    assert (found[0].double() - state["momentum"]).abs().max() <= slack * largest
    torch.testing.assert_close(found[1].double(), state["norm"], rtol=slack, atol=0)
    torch.testing.assert_close(found[2].double(), state["erasure"], rtol=slack, atol=0)
    # Twice what is erased, enlarged by at most 1 + 0.1 / 0.1.
    assert (found[3].double() - ahead).abs().max() <= 4 * slack * (largest + grad.abs().max())


@pytest.mark.parametrize("shape", [(1, 40, 64), (1, 64, 40)])
@pytest.mark.parametrize("size", [1e36, 1e37, 1e38])
def test_delta_write_stays_finite_where_norms_leave_the_range(shape, size):
    grad = torch.full(shape, size)
    found = expected = (torch.zeros(shape), *torch.zeros(2, 1), None)
    for _ in range(4):
        found = delta_write(found[0], grad, *found[1:3], 0.3, 0.9)
        expected = deepopt.ops.delta_write.reference(expected[0], grad, *expected[1:3], 0.3, 0.9)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.isfinite().all()
            # Equal entries are all rounded alike.
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)


def test_a_gradient_of_zero_erases_nothing():
    momentum = torch.randn(1, 8, 9)
    zero = torch.zeros(1)
    found, norm, erasure, ahead = delta_write(momentum, torch.zeros(1, 8, 9), zero, zero, 0.3, 0.5)
    torch.testing.assert_close(found, momentum / 2)
    torch.testing.assert_close(ahead, momentum / 4)
    assert norm < 1e-30
    assert erasure == 0


@pytest.mark.parametrize("shape", [(1, 33, 72), (2, 48, 17), (1, 40, 40), (1, 1, 3), (0, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_follows_the_reference(shape, dtype):
    matrices = torch.randn(shape)
    before = matrices.clone()
    found = newton_schulz(matrices, polar_express(5), dtype)
    expected = reference(matrices.double(), polar_express(5), torch.float64)
    assert torch.equal(matrices, before)
    assert found.dtype == torch.float32
    # A few roundings of the last segment, and what is left of float32 sums of |a| + |b| + |c| = 48.
    rounding = ROUNDING[torch.float16 if dtype == torch.bfloat16 else dtype] + 48 * HALF
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * rounding)


def test_the_same_bits_every_time():
    matrices = torch.randn(1, 33, 36)
    first = newton_schulz(matrices, polar_express(2), torch.bfloat16)
    assert torch.equal(first, newton_schulz(matrices, polar_express(2), torch.bfloat16))
    zeros = torch.zeros(1)
    written = delta_write(matrices, matrices, zeros, zeros, 0.3, 0.9)
    again = delta_write(matrices, matrices, zeros, zeros, 0.3, 0.9)
    assert all(map(torch.equal, written, again))


def _rounded_product(a, b, addend=None, *, alpha=1.0, beta=1.0, shift=0.0, dtype=None):
    """What the kernel computes, by torch, for matrices that would take the interpreter minutes."""
    total = alpha * (a.float() @ b.float().mT)
    total = total if addend is None else total + beta * addend.float()
    total = (total + shift * torch.eye(a.shape[-2])).to(dtype or a.dtype)
    return total.tril() + total.tril(-1).mT


def _spectrum(kind, m):
    if kind == "random":
        return None
    values = {
        "three hundred to one": torch.logspace(0, -2.5, m),
        "a million to one": torch.logspace(0, -6, m),
        "clustered": torch.where(torch.arange(m) < m // 2, 1.0, 0.03),
        "of low rank": torch.where(torch.arange(m) < m // 16, 1.0, 1e-3),
        "rank deficient": (torch.arange(m) < m // 4).float(),
    }
    return values[kind].double()


@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize("kind", ["random", "three hundred to one", "a million to one", "clustered",
                                  "of low rank", "rank deficient"])  # fmt: skip
def test_singular_values_are_nearer_to_exact_ones_than_in_bfloat16(monkeypatch, kind, n):
    """Both forms in float16, against the reference's in bfloat16."""
    m = 128
    matrix = torch.randn(m, n, dtype=torch.float64)
    if (values := _spectrum(kind, m)) is not None:
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = (u * values) @ vh
    assert on_triton.saves(m, n, 3) == (n == 512)
    monkeypatch.setattr(on_triton, "symmetric_product", _rounded_product)
    coefficients = polar_express(5)

    def errors(result):
        difference = torch.linalg.svdvals(result[0].double()) - exact
        return difference.square().mean().sqrt(), difference.abs().max()

    exact = torch.linalg.svdvals(reference(matrix[None], coefficients, torch.float64)[0])
    ours = errors(newton_schulz(matrix[None].float(), coefficients, torch.bfloat16))
    reference_in_bfloat16 = errors(reference(matrix[None].float(), coefficients, torch.bfloat16))
    assert ours[0] < reference_in_bfloat16[0]
    assert ours[1] < reference_in_bfloat16[1]


def test_wild_coefficients_are_computed_as_asked():
    """Products of them may not fit float16, nor the Gram form."""
    matrices = torch.randn(1, 4, 9)
    coefficients = [(300.0, -500.0, 300.0)] * 2
    found = newton_schulz(matrices, coefficients, torch.bfloat16)
    expected = reference(matrices.double(), coefficients, torch.float64)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_operators_have_the_backend_and_keep_it_from_the_cpu():
    matrices, norm = torch.randn(1, 8, 9), torch.ones(1)
    for operator, kernel, arguments in (
        (deepopt.ops.newton_schulz, newton_schulz, (matrices, polar_express(5), torch.float32)),
        (deepopt.ops.delta_write, delta_write, (matrices, matrices, norm, norm, 0.3, 0.9)),
    ):
        found = operator.implementations["triton"]
        assert not found.supports(*arguments)
        for result, expected in zip(found.run(*arguments), kernel(*arguments), strict=True):
            assert torch.equal(result, expected)
