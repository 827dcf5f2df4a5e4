"""Every form of Newton-Schulz against its polynomial of the singular values in float64.

The forms: float32 and bfloat16 in torch, step by step or two steps on one Gram matrix, and the
CPU's kernels, which compute symmetric products by half: one in bfloat16, and one in float32 for
small matrices.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import backend, newton_schulz, polar_express
from deepopt.ops.operator import OPERATORS
from deepopt.ops.products import LONGEST, multiplies_bfloat16

kernel = newton_schulz.overload
needs_kernels = pytest.mark.skipif("cpu" not in newton_schulz.implementations, reason="not built")
needs_kernel = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="no kernel in bfloat16, or no AVX512-BF16"
)
either_kernel = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, marks=needs_kernels),
        pytest.param(torch.bfloat16, marks=needs_kernel),
    ],
)
MUON = [(3.4445, -4.775, 2.0315)] * 5
SHAPES = [(40, 120), (120, 40), (33, 37), (96, 96)]


def orthogonal(rows, columns, generator):
    random = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(random).Q


def spectra(rank):
    """Singular values of what gradients look like, and of what breaks a Gram matrix."""
    flat = torch.ones(rank, dtype=torch.float64)
    one, ten, half, low = flat * 1e-3, flat * 3e-3, flat.clone(), flat * 0
    one[0] = 1
    ten[:10] = 1
    half[rank // 2 :] = 1e-3 * rank**0.5
    low[:5] = torch.tensor([1, 0.5, 0.2, 0.1, 0.05])
    decay = [torch.logspace(0, -power, rank, dtype=torch.float64) for power in (0.3, 1, 3, 6)]
    return {
        "flat": flat, "one": one, "ten": ten, "half": half, "low rank": low,
        "condition 2": decay[0], "1e1": decay[1], "1e3": decay[2], "1e6": decay[3],
    }  # fmt: skip


def matrices(rows, columns, seed=0):
    """One matrix of every spectrum, with random singular vectors, and with a block or axes."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(rows, columns)
    made = {}
    for name, values in spectra(rank).items():
        left = orthogonal(rows, rank, generator)
        right = orthogonal(columns, rank, generator)
        made[name] = (left * values) @ right.T
        if rows == rank:
            made[f"{name}, its rows orthogonal"] = values[:, None] * right.T
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    made["normal"] = normal
    block = 1e-4 * normal
    size = max(4, rank // 8)
    block[:size, :size] += normal[:size, :1] * normal[:1, :size] + 0.05 * normal[:size, :size]
    made["block"] = block
    return made


def exact(matrix, coefficients):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / torch.linalg.vector_norm(values)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return (left * values) @ right, values.sort(descending=True).values


def deviation(found, matrix, coefficients):
    """The largest error of a singular value, and the error of the matrix relative to its norm."""
    expected, values = exact(matrix, coefficients)
    found = found.double()
    of_values = (torch.linalg.svdvals(found) - values).abs().max()
    return float(of_values), float((found - expected).norm() / expected.norm())


in_float32 = pytest.mark.parametrize(
    "run", [newton_schulz.reference, pytest.param(kernel, marks=needs_kernels)]
)


def float32_rounding(coefficients):
    """The polynomials enlarge by the product of their slopes what it does to small values."""
    return 16 * 2.0**-24 * math.prod(a for a, _, _ in coefficients)


@in_float32
@pytest.mark.parametrize("coefficients", [polar_express(5), polar_express(8), MUON])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_float32_is_exact_to_its_rounding_in_every_form(rows, columns, coefficients, run):
    rounding = float32_rounding(coefficients)
    for name, matrix in matrices(rows, columns).items():
        narrow = matrix.float()  # what float32 makes of the matrix is no error of the iteration
        found = run(narrow[None], coefficients, torch.float32)[0]
        values, whole = deviation(found, narrow.double(), coefficients)
        assert values < rounding, name
        assert whole < rounding, name


@needs_kernels
@pytest.mark.parametrize(("rows", "columns"), [(8, 9), (16, 17), (63, 63), (48, 256), (512, 7)])
def test_small_matrices_come_as_close_to_semi_orthogonal_as_the_reference_does(rows, columns):
    for steps in (5, 8):
        coefficients = polar_express(steps)
        for name, matrix in matrices(rows, columns).items():
            narrow = matrix.float()[None]
            off = [
                (torch.linalg.svdvals(run(narrow, coefficients, torch.float32).double()) - 1).abs()
                for run in (kernel, newton_schulz.reference)
            ]
            assert (off[0] < off[1] + float32_rounding(coefficients)).all(), name


@needs_kernel
@pytest.mark.parametrize(
    "coefficients",
    [*map(polar_express, (1, 2, 3, 4, 5, 6, 9)), MUON],
    ids=["1", "2", "3", "4", "5", "6", "9", "muon"],
)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_kernel_is_as_exact_as_bfloat16_step_by_step(rows, columns, coefficients):
    for name, matrix in matrices(rows, columns).items():
        narrow = matrix.float()[None]
        found = kernel(narrow, coefficients, torch.bfloat16)[0]
        values, whole = deviation(found, narrow[0].double(), coefficients)
        plain = newton_schulz.reference(narrow, coefficients, torch.bfloat16)[0]
        plain_values, plain_whole = deviation(plain, narrow[0].double(), coefficients)
        assert values < 1.5 * plain_values + 0.11, name
        assert whole < 1.5 * plain_whole + 0.1, name


@needs_kernel
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_kernel_brings_singular_values_as_close_to_one_as_float32_does(rows, columns):
    coefficients = polar_express(5)
    for name, matrix in matrices(rows, columns).items():
        narrow = matrix.float()[None]
        found = torch.linalg.svdvals(kernel(narrow, coefficients, torch.bfloat16)[0].double())
        wanted = torch.linalg.svdvals(
            newton_schulz(narrow, coefficients, torch.float32)[0].double()
        )
        # 0.124 is the distance that five steps leave; 0.06 more is what rounding may add.
        assert found.max() < 1.124 + 0.06, name
        reached = wanted > 0.876 - 1e-3
        assert (found[reached] > 0.876 - 0.11).all(), name


def carried_by_few_rows(count, rows, columns):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(count, rows, columns, generator=generator)
    return stack * 10 ** -(2 * torch.rand(count, rows, 1, generator=generator))


FEW_ROWS = [(2, 3), (3, 4), (4, 16), (6, 24), (8, 32)]


@pytest.mark.parametrize(("rows", "columns"), FEW_ROWS)
@pytest.mark.parametrize(
    "run",
    [
        "reference",
        pytest.param("float32", marks=needs_kernels),
        pytest.param("bfloat16", marks=needs_kernel),
    ],
)
def test_what_few_rows_carry_is_not_pushed_over_the_edge_of_a_polynomial(run, rows, columns):
    """Their rounding does not average out: two steps on one Gram matrix lost one in a thousand."""
    stack = carried_by_few_rows(4000, rows, columns)
    if run == "reference":
        found = newton_schulz.reference(stack, polar_express(5), torch.float32)
    else:
        found = kernel(stack, polar_express(5), getattr(torch, run))
    assert torch.linalg.svdvals(found).max() < 1.124 + (0.06 if run == "bfloat16" else 1e-3)


def step_by_step(stack, coefficients):
    """The kernel's result without a first pair: two steps X ← X, exact ones, take its place."""
    return kernel(stack, [(1.0, 0.0, 0.0)] * 2 + list(coefficients), torch.bfloat16)


@needs_kernel
@pytest.mark.parametrize(
    "coefficients", [polar_express(5), polar_express(8), MUON], ids=["5", "8", "muon"]
)
@pytest.mark.parametrize(("rows", "columns"), FEW_ROWS)
def test_a_first_pair_is_certified_or_taken_again_step_by_step(rows, columns, coefficients):
    stack = carried_by_few_rows(2000, rows, columns)
    found = kernel(stack, coefficients, torch.bfloat16)
    slow = step_by_step(stack, coefficients)
    again = (found == slow).all(-1).all(-1)
    assert 0 < again.sum() < 0.1 * len(again)
    highest = torch.linalg.svdvals(slow).max()
    assert torch.linalg.svdvals(found[~again]).max() < highest + 0.03
    for index in [*again.nonzero()[:3], *(~again).nonzero()[:3]]:  # whatever came before them
        assert torch.equal(kernel(stack[index], coefficients, torch.bfloat16), found[index])


@needs_kernel
@pytest.mark.parametrize("shape", [(96, 384), (384, 96), (100, 130)])
def test_the_first_pair_is_kept_where_many_rows_carry_a_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(8, *shape, generator=generator)
    found = kernel(stack, polar_express(5), torch.bfloat16)
    assert (found != step_by_step(stack, polar_express(5))).any(-1).any(-1).all()


@needs_kernel
def test_the_kernel_is_closer_to_one_than_muon():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 96, 384, generator=generator)
    ours = torch.linalg.svdvals(kernel(matrix, polar_express(5), torch.bfloat16))
    muon = torch.linalg.svdvals(newton_schulz(matrix, MUON, torch.float32))
    assert (ours - 1).abs().max() < 0.16 < (muon - 1).abs().max()
    assert (ours - 1).square().mean() < (muon - 1).square().mean()


@either_kernel
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    steps=st.sampled_from([1, 2, 5]),
)
def test_every_shape_is_taken_and_a_transpose_is_a_transpose(batch, rows, columns, steps, dtype):
    generator = torch.Generator().manual_seed(rows * 71 + columns)
    stack = torch.randn(batch, rows, columns, generator=generator)
    coefficients = polar_express(steps)
    found = kernel(stack, coefficients, dtype)
    assert found.shape == stack.shape
    assert found.dtype == torch.float32
    for one, matrix in zip(found, stack.double(), strict=True):
        values, _ = deviation(one, matrix, coefficients)
        rounding = 0.25 if dtype == torch.bfloat16 else float32_rounding(coefficients)
        assert values < rounding  # few entries: their rounding does not average out
    turned = kernel(stack.mT, coefficients, dtype)
    if rows != columns:  # of a square matrix either side may be taken for the short one
        assert torch.equal(turned.mT, found)


@either_kernel
@pytest.mark.parametrize("shape", [(0, 64, 80), (2, 0, 80), (2, 64, 0), (0,) * 3])
def test_empty_stacks_and_empty_matrices_stay_empty(shape, dtype):
    assert kernel(torch.zeros(shape), polar_express(5), dtype).shape == shape


@either_kernel
def test_leading_dimensions_and_strides_do_not_matter(dtype):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(2, 3, 40, 48, generator=generator)
    found = kernel(stack, polar_express(5), dtype)
    flat = kernel(stack.flatten(0, 1), polar_express(5), dtype)
    assert torch.equal(found.flatten(0, 1), flat)
    spread = torch.stack([stack, -stack], -1)[..., 0]
    assert torch.equal(kernel(spread, polar_express(5), dtype), found)
    assert torch.equal(kernel(stack[0, 0], polar_express(5), dtype), found[0, 0])


@either_kernel
@pytest.mark.parametrize("exponent", [-38, -30, -10, 10, 30, 37])
def test_the_kernel_does_not_see_the_scale(exponent, dtype):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(1, 64, 96, generator=generator)
    expected = kernel(stack, polar_express(5), dtype)
    found = kernel(stack * 10.0**exponent, polar_express(5), dtype)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    scaled = kernel(stack * 2.0**40, polar_express(5), dtype)
    assert torch.equal(scaled, expected)


@either_kernel
@pytest.mark.parametrize("shape", [(64, 96), (9, 13), (13, 9)])
def test_zero_matrices_stay_zero_and_matrices_that_are_not_finite_say_so(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(4, *shape, generator=generator)
    expected = kernel(stack, polar_express(5), dtype)
    stack[0], stack[1, 2, 3], stack[2, 0, 0] = 0.0, float("nan"), float("inf")
    found = kernel(stack, polar_express(5), dtype)
    assert not found[0].any()
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[3], expected[3])


@either_kernel
@pytest.mark.parametrize("shape", [(1, 96, 160), (1, 160, 96), (5, 64, 64), (500, 2, 3)])
def test_the_same_bits_every_time_with_any_number_of_threads(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(shape, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(kernel(stack, polar_express(5), dtype))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, results[0]) for found in results)
    alone = kernel(stack[-1:], polar_express(5), dtype)
    assert torch.equal(alone[0], results[0][-1])


@needs_kernel
def test_products_in_bfloat16_are_chosen_for_large_float32_matrices_alone():
    large, small = torch.randn(1, 64, 80), torch.randn(1, 63, 80)
    steps = polar_express(5)
    assert newton_schulz.backend_for(large, steps, torch.bfloat16) == "cpu"
    assert newton_schulz.backend_for(small, steps, torch.bfloat16) == "reference"
    assert newton_schulz.backend_for(large, steps, torch.float32) == "reference"
    assert newton_schulz.backend_for(large.bfloat16(), steps, torch.bfloat16) == "reference"
    with backend("reference"):
        assert newton_schulz.backend_for(large, steps, torch.bfloat16) == "reference"


@needs_kernels
def test_products_in_float32_are_chosen_for_small_float32_matrices_alone():
    steps = polar_express(5)

    def chosen(rows, columns, dtype=torch.float32, product=torch.float32):
        return newton_schulz.backend_for(torch.ones(1, rows, columns, dtype=dtype), steps, product)

    for shape in [(1, 1), (63, 64), (63, LONGEST), (LONGEST, 63)]:
        assert chosen(*shape) == "cpu"
    for shape in [(64, 64), (63, LONGEST + 1), (LONGEST + 1, 1)]:
        assert chosen(*shape) == "reference"
    assert chosen(8, 9, product=torch.float64) == chosen(8, 9, torch.float64) == "reference"
    assert chosen(8, 9, torch.bfloat16) == chosen(8, 9, torch.float64, torch.float64) == "reference"


@needs_kernels
def test_without_products_in_bfloat16_small_matrices_keep_their_kernel(monkeypatch):
    monkeypatch.setattr(OPERATORS["gram_average"], "implementations", {})
    large, small = torch.randn(1, 64, 80), torch.randn(1, 63, 80)
    assert newton_schulz.backend_for(large, polar_express(5), torch.bfloat16) == "reference"
    assert newton_schulz.backend_for(small, polar_express(5), torch.float32) == "cpu"


@needs_kernels
@pytest.mark.skipif(multiplies_bfloat16(), reason="there are products in bfloat16")
def test_products_in_bfloat16_that_are_not_there_are_refused():
    with pytest.raises(RuntimeError, match="no products in bfloat16 for this processor"):
        kernel(torch.randn(1, 64, 80), polar_express(5), torch.bfloat16)


@needs_kernels
def test_what_is_not_understood_is_refused():
    stack = torch.randn(1, 64, 80)
    with pytest.raises(RuntimeError, match="matrices must be a float32 tensor"):
        kernel(stack.double(), polar_express(5), torch.float32)
    with pytest.raises(RuntimeError, match="multiplies in float32 or bfloat16"):
        kernel(stack, polar_express(5), torch.float64)
    with pytest.raises(RuntimeError, match="must be a float32 tensor"):
        kernel(stack.bfloat16(), polar_express(5), torch.float32)
    with pytest.raises(RuntimeError, match=r"coefficients must be \(a, b, c\)"):
        kernel(stack, [(1.0, 2.0)], torch.float32)
    with pytest.raises(RuntimeError, match="at least two dimensions"):
        kernel(stack[0, 0], polar_express(5), torch.float32)


def test_the_cubic_iteration_converges_in_bfloat16():
    """Its c is 0, and torch.baddbmm in bfloat16 on the CPU forgets beta where alpha is 0."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1, 24, 64, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        found = newton_schulz(matrix, [(1.5, -0.5, 0.0)] * 12, dtype)
        torch.testing.assert_close(
            torch.linalg.svdvals(found), torch.ones(1, 24), atol=0.02, rtol=0
        )


@needs_kernel
def test_no_steps_are_refused_in_bfloat16_and_leave_the_normalized_matrix_in_float32():
    stack = torch.randn(1, 6, 9)
    with pytest.raises(RuntimeError, match="at least one step"):
        kernel(stack, [], torch.bfloat16)
    torch.testing.assert_close(kernel(stack, [], torch.float32), stack / stack.norm())


@either_kernel
def test_torch_accepts_the_operator(dtype):
    torch.library.opcheck(kernel, (torch.randn(2, 6, 9), polar_express(5), dtype))
