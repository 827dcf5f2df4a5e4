import torch

from deepopt.ops import coordinate_mlp, coordinate_mlp_gradient, normalized, root_mean_square

BATCH, UNITS, FEATURES, ROWS, COLUMNS = 3, 5, 2, 4, 6


def example():
    features = torch.randn(FEATURES, BATCH, ROWS, COLUMNS, dtype=torch.float64)
    weights = torch.randn(BATCH, UNITS, FEATURES + 1, dtype=torch.float64)
    return list(features), weights


def test_the_value_is_that_of_the_formula_at_every_entry():
    features, weights = example()
    stacked = torch.stack(features, -1)
    drive = torch.einsum("bmnf,bkf->bmnk", stacked, weights[..., :-1])
    expected = torch.einsum("bmnk,bk->bmn", drive.tanh(), weights[..., -1])
    torch.testing.assert_close(coordinate_mlp(features, weights), expected)


def test_the_gradient_is_autograds():
    features, weights = example()
    weights.requires_grad_()
    error = torch.randn(BATCH, ROWS, COLUMNS, dtype=torch.float64)
    (expected,) = torch.autograd.grad((coordinate_mlp(features, weights) * error).sum(), weights)
    found = coordinate_mlp_gradient(features, weights.detach(), error)
    torch.testing.assert_close(found, expected)


def test_it_is_odd_and_differentiable():
    features, weights = example()
    mirrored = coordinate_mlp([-feature for feature in features], weights)
    torch.testing.assert_close(mirrored, -coordinate_mlp(features, weights))
    inputs = [tensor.requires_grad_() for tensor in (*features, weights)]
    assert torch.autograd.gradcheck(
        lambda a, b, w: coordinate_mlp([a, b], w), inputs, fast_mode=True
    )


def test_normalized_matrices_have_a_root_mean_square_of_one_at_any_scale():
    matrices = torch.randn(4, 3, 5) * torch.tensor([1e-30, 1.0, 1e30, 0.0])[:, None, None]
    size = root_mean_square(normalized(matrices)).flatten()
    torch.testing.assert_close(size, torch.tensor([1.0, 1.0, 1.0, 0.0]))
