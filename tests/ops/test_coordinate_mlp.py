import torch

from deepopt.ops import coordinate_mlp, coordinate_mlp_gradient, normalized, root_mean_square

BATCH, UNITS, FEATURES, ROWS, COLUMNS = 3, 5, 2, 4, 6


def example():
    """The arguments of the value; all of them matter."""
    matrices = torch.randn(1 + FEATURES, BATCH, ROWS, COLUMNS, dtype=torch.float64)
    weights = torch.randn(BATCH, UNITS, FEATURES + 1, dtype=torch.float64)
    base, *features = matrices
    reach, scales = torch.rand(BATCH).double(), torch.rand(BATCH, FEATURES).double()
    return [base, reach, features, scales, weights]


def test_the_value_is_that_of_the_formula_at_every_entry():
    base, reach, features, scales, weights = given = example()
    keys = torch.stack(features, -1) * scales[:, None, None]
    drive = torch.einsum("bmnf,bkf->bmnk", keys, weights[..., :-1])
    value = torch.einsum("bmnk,bk->bmn", drive.tanh(), weights[..., -1])
    expected = base + reach[:, None, None] * value.tanh()
    torch.testing.assert_close(coordinate_mlp(*given), expected)


def test_the_gradient_is_autograds():
    given = example()
    given[-1].requires_grad_()
    target, unit = torch.randn_like(given[0]), torch.rand(BATCH).double() + 0.5
    errors = (coordinate_mlp(*given) - target) / unit[:, None, None]
    (expected,) = torch.autograd.grad(errors.square().mean((1, 2)).sum() / 2, given[-1])
    found = coordinate_mlp_gradient(*given[:-1], given[-1].detach(), target, unit)
    torch.testing.assert_close(found, expected)


def test_it_is_odd_and_differentiable():
    base, reach, features, scales, weights = given = example()
    mirrored = coordinate_mlp(-base, reach, [-feature for feature in features], scales, weights)
    torch.testing.assert_close(mirrored, -coordinate_mlp(*given))
    inputs = [tensor.requires_grad_() for tensor in (base, reach, *features, scales, weights)]
    assert torch.autograd.gradcheck(
        lambda base, reach, a, b, *rest: coordinate_mlp(base, reach, [a, b], *rest),
        inputs,
        fast_mode=True,
    )


def test_normalized_matrices_have_a_root_mean_square_of_one_at_any_scale():
    matrices = torch.randn(4, 3, 5) * torch.tensor([1e-30, 1.0, 1e30, 0.0])[:, None, None]
    size = root_mean_square(normalized(matrices))
    torch.testing.assert_close(size, torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_it_is_odd_keeps_nan_and_comes_to_one_for_large_values():
    """One unit that hands its feature on, within its straight part: the value is tanh(x)."""
    x = torch.cat([torch.linspace(-12, 12, 9973), torch.tensor([1e4, float("inf"), float("nan")])])
    ones, weights = torch.ones(1), torch.tensor([[[2.0**-14, 2.0**14]]])

    def value(x):
        return coordinate_mlp(torch.zeros_like(x), ones, [x], ones[None], weights)[0, 0]

    x = x[None, None]
    found, exact = value(x), torch.tanh(2.0**14 * torch.tanh(2.0**-14 * x[0, 0].double()))
    assert torch.equal(value(-x)[:-1], -found[:-1])
    assert found[-3:-1].tolist() == [1.0, 1.0]
    assert found[-1].isnan()
    assert found[:-1].abs().max() == 1.0
    spacing = 2.0 ** (exact[:-1].abs().clamp_min(1e-30).log2().ceil() - 24)
    # 6 units in the last place of each of the two; the slope of the second is at most 1.
    assert ((found[:-1] - exact[:-1]).abs() <= 12 * spacing).all()
