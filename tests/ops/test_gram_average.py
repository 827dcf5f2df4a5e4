import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.ops import backend, gram_average

BACKENDS = ["reference", "automatic"]
ROUNDING = 2.0**-8
"""The relative rounding error of an operand in bfloat16."""


def run(name, *args):
    if name == "automatic":
        return gram_average(*args)
    with backend(name):
        return gram_average(*args)


def example(batch, rows, columns, of_rows, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(batch, rows, columns, generator=generator) * scale
    size = rows if of_rows else columns
    old = torch.randn(batch, size, size, generator=generator)
    gram = old @ old.mT / size
    kept = torch.rand(batch, generator=generator)
    return gram, grad, grad.abs().amax((-2, -1)), kept, 0.05, of_rows


def expected_and_bound(gram, grad, scale, kept, share, of_rows):
    """In float64, and how far the rounding of keys and of float32 sums may move each entry."""
    keys = grad.double() / scale.double()[:, None, None]
    keys = keys if of_rows else keys.mT
    old = kept.double()[:, None, None] * gram.double()
    bound = 2.1 * ROUNDING * share * keys.abs() @ keys.abs().mT + 1e-6 * (1 + old.abs())
    return old + share * keys @ keys.mT, bound


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("of_rows", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 7), (64, 64), (64, 200), (97, 65), (257, 300), (768, 130)]
)
def test_it_is_the_average_with_the_gram_matrix_of_rows_or_columns(rows, columns, of_rows, name):
    args = example(2, rows, columns, of_rows)
    expected, bound = expected_and_bound(*args)
    found = run(name, *args)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= bound).all()
    torch.testing.assert_close(found, found.mT, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 140),
    of_rows=st.booleans(),
    exponent=st.integers(-36, 36),
    seed=st.integers(0, 1000),
)
def test_it_holds_for_every_shape_and_scale(rows, columns, of_rows, exponent, seed):
    args = example(1, rows, columns, of_rows, seed, 10.0**exponent)
    expected, bound = expected_and_bound(*args)
    assert ((gram_average(*args) - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_rounded_keys_add_less_than_the_default_damping_to_any_eigenvalue(name):
    # Keys of rank 8: all other eigenvalues are what rounding has made of zero.
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(1, 96, 8, generator=generator) @ torch.randn(1, 8, 384, generator=generator)
    zero, one = torch.zeros(1, 96, 96), torch.ones(1)
    gram = run(name, zero, grad, grad.abs().amax((-2, -1)), one, 1.0, True)
    values = torch.linalg.eigvalsh(gram.double())[0]
    assert values[-9].abs() < 1e-6 * values[-1]
    assert values[0] > -1e-6 * values[-1]


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_gradients_add_nothing_and_others_of_the_batch_do_not_matter(name):
    gram, grad, scale, kept, share, of_rows = example(3, 70, 90, True)
    grad[0], scale[0] = 0, 0
    grad[2] = torch.nan
    scale[2] = torch.nan
    found = run(name, gram, grad, scale, kept, share, of_rows)
    torch.testing.assert_close(found[0], kept[0] * gram[0])
    assert found[2].isnan().all()
    alone = run(name, gram[1:2], grad[1:2], scale[1:2], kept[1:2], share, of_rows)
    torch.testing.assert_close(found[1:2], alone)


@pytest.mark.parametrize("name", BACKENDS)
def test_it_takes_matrices_of_any_strides(name):
    gram, grad, *rest = example(2, 70, 90, True)
    strided = grad.mT.contiguous().mT
    assert torch.allclose(run(name, gram.mT, strided, *rest), run(name, gram, grad, *rest))


@pytest.mark.parametrize("name", BACKENDS)
def test_it_gives_the_same_bits_again_and_leaves_its_arguments_alone(name):
    args = example(2, 96, 130, False)
    before = [value.clone() for value in args[:4]]
    assert torch.equal(run(name, *args), run(name, *args))
    for value, old in zip(args, before, strict=False):
        assert torch.equal(value, old)


def test_it_is_an_operator():
    torch.library.opcheck(torch.ops.deepopt.gram_average.default, example(2, 65, 70, True))
