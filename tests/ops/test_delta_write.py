"""The delta write's kernels against its reference in float64.

From a short side of 64 on they multiply in bfloat16 where the processor does, below in float32.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import backend, delta_write
from deepopt.ops.operator import OPERATORS
from deepopt.ops.products import LONGEST, SHORTEST, multiplies_bfloat16

kernel = delta_write.overload
needs_kernel = pytest.mark.skipif("cpu" not in delta_write.implementations, reason="not built")


def rounding(shape):
    """The relative error of a product of matrices, in the dtype that the kernel multiplies in."""
    rounded = min(shape[-2:]) >= SHORTEST and multiplies_bfloat16()
    return 2.0**-8 if rounded else 2.0**-24 * max(shape[-2:])


def stack(batch, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    momentum, grad = torch.randn(2, batch, rows, columns, generator=generator)
    norm, erasure = torch.rand(2, batch, generator=generator)
    return momentum, grad, norm * rows, erasure * 0.1


def assert_close_to_reference(found, given_, rate, retention):
    expected = delta_write.reference(*(tensor.double() for tensor in given_), rate, retention)
    for new, wide in zip(found, expected, strict=True):
        assert new.dtype == torch.float32
        assert new.shape == wide.shape
    momentum, norm, erasure, ahead = (tensor.double() for tensor in found)
    size = torch.linalg.matrix_norm(given_[0].double())
    error = torch.linalg.matrix_norm(momentum - expected[0])
    # What is retained and what is new is not rounded. What is erased is at most rate * momentum, of
    # operands rounded three times and the square of a norm rounded up.
    off = rounding(given_[0].shape)
    assert (error <= (3 * off * rate + 1e-6) * size).all()
    # The look-ahead has twice the retained share of what is erased, enlarged.
    gain = 1 + given_[3].double() / (1 - retention)
    error = torch.linalg.matrix_norm(ahead - expected[3])
    assert (error <= 2 * gain * (3 * off * rate + 1e-6) * size).all()
    assert ((norm / expected[1] - 1).abs() <= max(off, 1e-6)).all()
    assert ((erasure - expected[2]).abs() <= 3 * off * 0.1 * rate + 1e-7).all()


@needs_kernel
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_every_shape_agrees_with_the_reference_to_the_rounding_of_operands(
    batch, rows, columns, rate
):
    given_ = stack(batch, rows, columns)
    assert_close_to_reference(kernel(*given_, rate, 0.95), given_, rate, 0.95)


@needs_kernel
@pytest.mark.parametrize("rate", [0.0, 0.7])
@pytest.mark.parametrize("columns", [1024, 1025, 2100])
def test_rows_longer_than_what_takes_in_the_gradient_at_a_time_agree_too(columns, rate):
    given_ = stack(1, 64, columns)
    assert_close_to_reference(kernel(*given_, rate, 0.95), given_, rate, 0.95)


@needs_kernel
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_empty_stacks_and_empty_matrices_are_taken(shape):
    empty = torch.zeros(shape)
    scalars = torch.ones(shape[0])
    momentum, norm, erasure, ahead = kernel(empty, empty, scalars, scalars, 0.3, 0.95)
    assert momentum.shape == ahead.shape == shape
    assert norm.shape == erasure.shape == (shape[0],)


@needs_kernel
@pytest.mark.parametrize("transposed", [False, True])
def test_strides_do_not_matter(transposed):
    momentum, grad, norm, erasure = stack(2, 40, 72)
    if transposed:
        momentum, grad = momentum.mT, grad.mT
    expected = kernel(momentum.contiguous(), grad.contiguous(), norm, erasure, 0.3, 0.95)
    grad = torch.stack([grad, -grad], -1)[..., 0]
    found = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    assert all(map(torch.equal, found, expected))


@needs_kernel
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64), (16, 17), (17, 16), (63, 63)])
@pytest.mark.parametrize("exponent", [-36, -20, 0, 20, 36])
def test_any_scale_of_the_gradient_and_of_the_momentum_keeps_its_accuracy(shape, exponent):
    momentum, grad, norm, erasure = stack(2, *shape)
    scale = 10.0**exponent
    found = kernel(momentum, grad * scale, norm * scale, erasure, 0.3, 0.95)
    plain = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    erased, expected = (new - 0.05 * g for new, g in ((found[0], grad * scale), (plain[0], grad)))
    if exponent <= 0:
        torch.testing.assert_close(erased, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[2], plain[2], atol=1e-6, rtol=0)
    found = kernel(momentum * scale, grad, norm, erasure, 0.3, 0.95)
    torch.testing.assert_close(found[2], plain[2], atol=1e-6, rtol=0)


@needs_kernel
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (16, 17)])
def test_momenta_at_the_end_of_the_range_are_written_like_others(shape):
    momentum, grad, norm, erasure = stack(2, *shape)
    scale = 2.0**119
    found = kernel(momentum * scale, grad * scale, norm * scale, erasure, 0.7, 0.9)
    plain = kernel(momentum, grad, norm, erasure, 0.7, 0.9)
    torch.testing.assert_close(found[0] / scale, plain[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[3] / scale, plain[3], atol=1e-4, rtol=0)


@needs_kernel
@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (63, 96), (96, 63)])
def test_no_key_is_larger_than_one(shape, rank):
    """The norm bounds the largest singular value, also after its Gram matrix was rounded."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(20, shape[0], rank, generator=generator)
    right = torch.randn(20, rank, shape[1], generator=generator)
    grad = left @ right
    zeros = torch.zeros(20)
    _, norm, *_ = kernel(torch.zeros_like(grad), grad, zeros, zeros, 0.3, 0.95)
    bound = norm.double() / 0.1**0.5
    largest = torch.linalg.matrix_norm(grad.double(), ord=2)
    in_float32 = 1e-6  # as the reference, which does not round up
    assert (bound >= largest * (1 if rounding(shape) > in_float32 * 100 else 1 - in_float32)).all()
    assert (bound <= largest * min(shape) ** 0.125 * (1 + max(rounding(shape), in_float32))).all()


@needs_kernel
@pytest.mark.parametrize("shape", [(64, 80), (9, 13), (13, 9)])
def test_zero_gradients_and_zero_momenta_stay_finite(shape):
    momentum, grad, norm, erasure = stack(3, *shape)
    momentum[0], grad[1] = 0.0, 0.0
    momentum[2], grad[2], norm[2] = 0.0, 0.0, 0.0
    new, norms, erasures, ahead = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    torch.testing.assert_close(new[0], 0.05 * grad[0])
    torch.testing.assert_close(new[1], 0.95 * momentum[1])
    assert ahead.isfinite().all()
    assert not new[2].any()
    assert not ahead[2].any()
    assert norms[2] == 0
    assert norms[1] > 0
    torch.testing.assert_close(erasures, 0.9 * erasure)


@needs_kernel
@pytest.mark.parametrize("shape", [(64, 80), (9, 13), (13, 9)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_says_so_and_leaves_the_others_alone(value, shape):
    momentum, grad, norm, erasure = stack(2, *shape)
    expected = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    grad[0, 3, 5] = value
    found = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    assert not found[0][0].isfinite().any()
    assert not found[2][0].isfinite()
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new[1], old[1])


@needs_kernel
@pytest.mark.parametrize(
    "shape", [(1, 96, 160), (1, 160, 96), (3, 64, 64), (500, 2, 3), (1, 64, 1100), (7, 200, 48)]
)
def test_the_same_bits_every_time_with_any_number_of_threads(shape):
    given_ = stack(*shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(kernel(*given_, 0.3, 0.95))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@needs_kernel
def test_the_kernel_is_chosen_for_float32_matrices_that_are_small_or_rounded(monkeypatch):
    large, small = stack(1, 64, 80), stack(1, 63, 80)
    for given_ in (*[large] * multiplies_bfloat16(), small, stack(1, LONGEST, 63)):
        assert delta_write.backend_for(*given_, 0.3, 0.95) == "cpu"
        wide = [tensor.double() for tensor in given_]
        assert delta_write.backend_for(*wide, 0.3, 0.95) == "reference"
        for index in range(4):
            mixed = [*given_[:index], given_[index].double(), *given_[index + 1 :]]
            assert delta_write.backend_for(*mixed, 0.3, 0.95) == "reference"
        assert delta_write.backend_for(*given_, 0.3, torch.tensor(0.95)) == "reference"
        with backend("reference"):
            assert delta_write.backend_for(*given_, 0.3, 0.95) == "reference"
    assert delta_write.backend_for(*stack(1, LONGEST + 1, 63), 0.3, 0.95) == "reference"
    monkeypatch.setattr(OPERATORS["gram_average"], "implementations", {})
    assert delta_write.backend_for(*large, 0.3, 0.95) == "reference"
    assert delta_write.backend_for(*small, 0.3, 0.95) == "cpu"


@needs_kernel
def test_nothing_is_rounded_just_below_the_short_side_from_which_on_operands_are():
    for short, rounded in ((SHORTEST - 1, False), (SHORTEST, multiplies_bfloat16())):
        given_ = stack(1, short, 80)
        expected = delta_write.reference(*(tensor.double() for tensor in given_), 1.0, 0.95)
        off = (kernel(*given_, 1.0, 0.95)[0] - expected[0]).abs().max()
        assert (off > 1e-4) == rounded


@needs_kernel
def test_shapes_that_do_not_fit_are_refused():
    momentum, grad, norm, erasure = stack(2, 64, 80)
    with pytest.raises(RuntimeError, match="of one shape"):
        kernel(momentum, grad[:, :60], norm, erasure, 0.3, 0.95)
    with pytest.raises(RuntimeError, match="one number for every matrix"):
        kernel(momentum, grad, norm[:1], erasure, 0.3, 0.95)
    with pytest.raises(RuntimeError, match="grad must be a float32 tensor"):
        kernel(momentum, grad.double(), norm, erasure, 0.3, 0.95)


@needs_kernel
def test_torch_accepts_the_operator():
    torch.library.opcheck(kernel, (*stack(2, 6, 9), 0.3, 0.95))
