"""The delta write's kernel against its reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import backend, delta_write

kernel = delta_write.overload
needs_kernel = pytest.mark.skipif(
    "cpu" not in delta_write.implementations, reason="no kernel, or no AVX512-BF16"
)
ROUNDING = 2.0**-8  # of a product of two numbers in bfloat16


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
    momentum, norm, erasure = (tensor.double() for tensor in found)
    size = torch.linalg.matrix_norm(given_[0].double())
    error = torch.linalg.matrix_norm(momentum - expected[0])
    # What is retained and what is new is not rounded. What is erased is at most rate * momentum, of
    # operands rounded three times and the square of a norm rounded up.
    assert (error <= (3 * ROUNDING * rate + 1e-6) * size).all()
    assert ((norm / expected[1] - 1).abs() <= ROUNDING).all()
    assert ((erasure - expected[2]).abs() <= 3 * ROUNDING * 0.1 * rate + 1e-7).all()


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
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_empty_stacks_and_empty_matrices_are_taken(shape):
    empty = torch.zeros(shape)
    scalars = torch.ones(shape[0])
    momentum, norm, erasure = kernel(empty, empty, scalars, scalars, 0.3, 0.95)
    assert momentum.shape == shape
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
@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64)])
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
@pytest.mark.parametrize("rank", [1, 2, 8, 64])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_no_key_is_larger_than_one(shape, rank):
    """The norm bounds the largest singular value, also after its Gram matrix was rounded."""
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(20, shape[0], rank, generator=generator)
    right = torch.randn(20, rank, shape[1], generator=generator)
    grad = left @ right
    zeros = torch.zeros(20)
    _, norm, _ = kernel(torch.zeros_like(grad), grad, zeros, zeros, 0.3, 0.95)
    bound = norm.double() / 0.1**0.5
    largest = torch.linalg.matrix_norm(grad.double(), ord=2)
    assert (bound >= largest).all()
    assert (bound <= largest * min(shape) ** 0.125 * (1 + ROUNDING)).all()


@needs_kernel
def test_zero_gradients_and_zero_momenta_stay_finite():
    momentum, grad, norm, erasure = stack(3, 64, 80)
    momentum[0], grad[1] = 0.0, 0.0
    momentum[2], grad[2], norm[2] = 0.0, 0.0, 0.0
    new, norms, erasures = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    torch.testing.assert_close(new[0], 0.05 * grad[0])
    torch.testing.assert_close(new[1], 0.95 * momentum[1])
    assert not new[2].any()
    assert norms[2] == 0
    assert norms[1] > 0
    torch.testing.assert_close(erasures, 0.9 * erasure)


@needs_kernel
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_says_so_and_leaves_the_others_alone(value):
    momentum, grad, norm, erasure = stack(2, 64, 80)
    expected = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    grad[0, 3, 5] = value
    found = kernel(momentum, grad, norm, erasure, 0.3, 0.95)
    assert not found[0][0].isfinite().any()
    assert not found[2][0].isfinite()
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new[1], old[1])


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 96, 160), (1, 160, 96), (3, 64, 64)])
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
def test_the_kernel_is_chosen_for_large_float32_matrices_alone():
    large = stack(1, 64, 80)
    assert delta_write.backend_for(*large, 0.3, 0.95) == "cpu"
    assert delta_write.backend_for(*stack(1, 63, 80), 0.3, 0.95) == "reference"
    wide = [tensor.double() for tensor in large]
    assert delta_write.backend_for(*wide, 0.3, 0.95) == "reference"
    assert delta_write.backend_for(*large, 0.3, torch.tensor(0.95)) == "reference"
    with backend("reference"):
        assert delta_write.backend_for(*large, 0.3, 0.95) == "reference"


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
