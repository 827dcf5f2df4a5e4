"""What the kernel checks itself, and what the parity table, which counts errors, does not draw."""

import pytest
import torch

from deepopt.ops import backend, horizons_write

kernel = horizons_write.overload
needs_kernel = pytest.mark.skipif("cpu" not in horizons_write.implementations, reason="not built")
OFF = {"foresight": 2, "grad_size": 3, "phi": 4, "step": 5}


def arguments(scales=2, sizes=(3, 4, 5), units=2):
    grad, b = torch.randn(sizes), sizes[0]
    averages = [torch.randn(sizes) for _ in range(scales)]
    sized = [torch.zeros(b, scales), torch.ones(b), torch.randn(b, units, 3 * scales + 2)]
    return [averages, grad, *sized, torch.full((b,), 7.0), [0.9, 0.7, 0.5, 0.99, 0.0][:scales]]


@needs_kernel
@pytest.mark.parametrize("name", OFF)
def test_tensors_that_do_not_fit_are_refused(name):
    given = arguments()
    given[OFF[name]] = given[OFF[name]][:2]
    with pytest.raises(RuntimeError, match="horizons_write: tensors must be float32"):
        kernel(*given)


@needs_kernel
def test_every_average_needs_its_retention():
    with pytest.raises(RuntimeError, match="one retention for each average"):
        kernel(*arguments()[:-1], [0.9])


def test_more_averages_than_kernels_take_go_to_the_reference():
    given = arguments()
    given[0], given[-1] = [given[0][0]] * 9, [0.9] * 9
    given[2], given[4] = torch.zeros(3, 9), torch.randn(3, 2, 29)
    assert horizons_write.backend_for(*given) == "reference"
    assert len(horizons_write(*given)) == 13


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_in_the_read_of_its_matrix_alone(name, bad):
    if name not in ("reference", *horizons_write.implementations):
        pytest.skip("not built")
    given = arguments()
    given[1][1, 2, 3] = bad
    with backend(name):
        *_, foresight, size, weights, read = horizons_write(*given)
    for found in (foresight, size, weights, read):
        assert found[1].isnan().all()
        assert found[::2].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_gradient_of_the_largest_size_is_compared_with_an_average_of_the_largest_size(name):
    """Both norms are beyond 1e30, and their cosine is 1."""
    if name not in ("reference", *horizons_write.implementations):
        pytest.skip("not built")
    given = arguments()
    given[0] = [1e30 * given[1].sign(), 1e30 * given[1].sign()]
    given[1] = 1e30 * given[1].sign()
    with backend(name):
        foresight = horizons_write(*given)[2]
    torch.testing.assert_close(foresight, torch.full((3, 2), 0.3))
