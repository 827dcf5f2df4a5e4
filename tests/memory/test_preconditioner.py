import pytest
import torch

from deepopt.memory.preconditioner import BUILT_IN, Diagonal, LeftGram, resolve


def read(preconditioner, grads, matrices=None):
    state = preconditioner.init(grads[0])
    for step, grad in enumerate(grads):
        state["step"] = torch.full((len(grad),), step + 1.0)
        preconditioner.write(state, grad)
    return preconditioner.read(state, grads[-1] if matrices is None else matrices)


def inverse_root(gram, kept):
    """L^-1/2 with damped eigenvalues, on ``kept``, with the norm of ``kept``; written out."""
    values, vectors = torch.linalg.eigh(gram)
    values = values / values[..., -1:] + 1e-6
    turned = vectors @ (values.rsqrt()[..., None] * (vectors.mT @ kept))
    return turned * (kept.norm(dim=(1, 2)) / turned.norm(dim=(1, 2)))[:, None, None]


@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (3, 5), (4, 4), (6, 1), (1, 1)])
def test_diagonal_divides_rows_by_their_running_root_mean_square(rows, columns):
    grads = torch.randn(4, 2, rows, columns, dtype=torch.float64)
    mean = torch.zeros(2, rows, dtype=torch.float64)
    for grad in grads:
        mean = 0.8 * mean + 0.2 * grad.square().sum(-1)
    expected = inverse_root(torch.diag_embed(mean), grads[-1])
    torch.testing.assert_close(read(Diagonal(0.8), list(grads)), expected)


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (4, 4), (1, 6)])
def test_left_gram_is_the_inverse_root_of_the_rows_running_gram_matrix(rows, columns):
    grads = torch.randn(11, 2, rows, columns, dtype=torch.float64)
    gram = torch.zeros(2, rows, rows, dtype=torch.float64)
    for grad in grads:
        gram = 0.8 * gram + 0.2 * grad @ grad.mT
    found = read(LeftGram(0.8), list(grads))  # the root of the eleventh write is fresh
    torch.testing.assert_close(found, inverse_root(gram, grads[-1]))


def test_left_gram_of_a_tall_matrix_is_its_diagonal():
    grads = list(torch.randn(3, 2, 5, 4))
    assert torch.equal(read(LeftGram(0.8), grads), read(Diagonal(0.8), grads))


def test_left_gram_and_diagonal_agree_where_rows_are_orthogonal():
    grad = torch.diag_embed(torch.rand(2, 4, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(read(LeftGram(), [grad]), read(Diagonal(), [grad]))


def test_left_gram_keeps_no_momentum():
    assert set(LeftGram().init(torch.zeros(1, 3, 4))) == {"gram_left", "root_left", "scale"}


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e30])
def test_the_size_of_a_gradient_is_kept_at_every_scale(name, scale):
    grads = [torch.randn(2, 4, 6) * scale for _ in range(3)]
    found = read(resolve(name, 0.9), grads) / scale
    torch.testing.assert_close(found.norm(dim=(1, 2)), (grads[-1] / scale).norm(dim=(1, 2)))


@pytest.mark.parametrize("name", BUILT_IN)
def test_zero_gradients_stay_zero_and_leave_no_trace(name):
    grads = [torch.zeros(1, 4, 6)] * 2
    assert torch.equal(read(resolve(name, 0.9), grads), grads[0])
    later = [torch.randn(1, 4, 6) for _ in range(11)]
    found = read(resolve(name, 0.9), [torch.zeros(1, 4, 6)] * 10 + later)
    torch.testing.assert_close(found, read(resolve(name, 0.9), later))


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_written_is_not_written_to(name):
    grad = torch.randn(2, 4, 6)
    before = grad.clone()
    read(resolve(name, 0.9), [grad])
    assert torch.equal(grad, before)


def test_a_function_is_applied_as_it_is():
    matrix = torch.randn(4, 4)
    grad = torch.randn(3, 4, 6)
    assert torch.equal(read(resolve(lambda g: matrix @ g, 0.9), [grad]), matrix @ grad)


def test_a_function_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"of \(1, 4, 6\); it must keep the shape"):
        read(resolve(lambda g: g[..., :1], 0.9), [torch.randn(1, 4, 6)])


def test_unknown_names_and_other_objects_are_refused():
    with pytest.raises(ValueError, match="choose 'identity', 'diagonal', 'left_gram' or pass"):
        resolve("gram", 0.9)
    with pytest.raises(TypeError, match="Invalid preconditioner: 3 cannot be called"):
        resolve(3, 0.9)


@pytest.mark.parametrize("name", BUILT_IN)
def test_derivatives_are_finite_where_a_row_is_silent(name):
    grad = torch.randn(1, 4, 6, dtype=torch.float64)
    grad[:, 1] = 0
    grad.requires_grad_()
    read(resolve(name, 0.9), [grad]).sum().backward()
    assert grad.grad.isfinite().all()


def test_one_that_decides_on_the_host_is_refused_where_that_must_not_be():
    with pytest.raises(
        RuntimeError, match="preconditioner='left_gram' does not support capturable"
    ):
        resolve("left_gram", 0.9, capturable=True)
    assert resolve("diagonal", 0.9, capturable=True) == Diagonal(0.9)
