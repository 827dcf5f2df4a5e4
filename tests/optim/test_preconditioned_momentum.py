import numpy as np
import pytest
import torch
from torch import nn

from deepopt import PreconditionedMomentum
from tests import literal

SHAPES = [(4, 6), (6, 4), (7,), (), (3, 2, 2, 2)]


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def as_matrix(tensor):
    return (tensor.flatten(1) if tensor.ndim > 1 else tensor).numpy()


def train(make, dtype=torch.float32, steps=10):
    """Ten gradients for parameters of all shapes, with a learning rate that halves midway."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    optimizer = make(params)
    for step in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.param_groups[0]["lr"] = 0.1 if step < 5 else 0.05
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.9])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_a_preconditioner_it_is_sgd_with_momentum(dtype, alpha, maximize):
    found = train(
        lambda p: PreconditionedMomentum(p, betas=(alpha, 0.999), maximize=maximize), dtype
    )
    expected = train(lambda p: torch.optim.SGD(p, momentum=alpha, maximize=maximize), dtype)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5,), (3, 2, 2, 2)])
def test_it_is_the_printed_update_with_any_left_matrix(shape):
    start, P = random(*shape), random(shape[0], shape[0])
    param = nn.Parameter(start.clone())
    optimizer = PreconditionedMomentum([param], lr=0.03, preconditioner=lambda g: P @ g)
    reference = literal.PreconditionedMomentum(
        as_matrix(start), eta=0.03, alpha=0.9, P=lambda g: P.numpy() @ g
    )
    for _ in range(6):
        grad = random(*shape)
        param.grad = grad
        optimizer.step()
        expected = reference.step(as_matrix(grad))
        np.testing.assert_allclose(param.detach().numpy(), expected.reshape(shape), atol=1e-12)


@pytest.mark.parametrize("name", ["diagonal", "left_gram"])
def test_a_preconditioner_evens_out_rows_of_unequal_size(name):
    """½‖D W‖² with rows of unequal weight: the identity is slow where the weight is small."""
    weights = torch.tensor([1.0, 0.3, 0.1, 0.03])[:, None]

    def end(preconditioner):
        param = nn.Parameter(torch.ones(4, 6) + 0.1 * torch.eye(4, 6))
        optimizer = PreconditionedMomentum([param], lr=0.02, preconditioner=preconditioner)
        for _ in range(60):
            optimizer.zero_grad()
            (weights * param).square().sum().backward()
            optimizer.step()
        return float(param.detach()[3].norm())

    assert end(name) < 0.5 * end("identity")


def test_every_parameter_takes_the_rule_and_none_adamw():
    params = [nn.Parameter(torch.ones(s)) for s in SHAPES]
    optimizer = PreconditionedMomentum(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(set(state) == {"step", "momentum"} for state in optimizer.state.values())


def test_a_function_is_named_in_checkpoints_and_must_be_the_same_to_load():
    def optimizer(preconditioner):
        return PreconditionedMomentum([nn.Parameter(torch.ones(3))], preconditioner=preconditioner)

    saved = optimizer(torch.nn.functional.softsign).state_dict()
    assert saved["param_groups"][0]["preconditioner"] == "torch.nn.functional.softsign"
    loaded = optimizer(torch.nn.functional.softsign)
    loaded.load_state_dict(saved)
    assert loaded.param_groups[0]["preconditioner"] is torch.nn.functional.softsign
    with pytest.raises(ValueError, match=r"checkpoint's preconditioner is torch\.nn\.f.*softsign"):
        optimizer("diagonal").load_state_dict(saved)
