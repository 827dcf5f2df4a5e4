"""Gains after Newton-Schulz: what holds for any MLP, and for one that says nothing."""

import pytest
import torch

from deepopt.memory import Linear
from deepopt.meta.gains import FEATURES, Gains, eigenvectors, with_gains
from deepopt.meta.tasks import draw
from deepopt.meta.training import train
from deepopt.optim import DeepMomentum
from deepopt.optim.output_map import Orthogonal

SILENT = torch.zeros(2, FEATURES + 2).tolist()
LOUD = [[20.0, *[0.0] * FEATURES, 0.5], [-10.0, *[0.0] * FEATURES, -0.5]]
"""Enlarges what has much energy, and shrinks what has little."""


def moved(optimizer, shape, steps=3, unit=1.0):
    """What a few steps on random gradients, times a unit, make of a weight of zeros."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.zeros(shape))
    made = optimizer([weight])
    for _ in range(steps):
        weight.grad = unit * torch.randn(shape, generator=generator)
        made.step()
    return weight.detach()


def gained(phi, directions):
    gains = Gains(directions, phi)
    return lambda params: with_gains(gains)(params, memory="linear", lr=0.1)


@pytest.mark.parametrize("directions", [True, False])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_a_read_out_of_zeros_is_the_linear_memory(directions, shape):
    linear = moved(lambda params: DeepMomentum(params, memory="linear", lr=0.1), shape)
    torch.testing.assert_close(moved(gained(SILENT, directions), shape), linear)
    assert not torch.allclose(moved(gained(LOUD, directions), shape), linear, rtol=0.05)


@pytest.mark.parametrize("directions", [True, False])
def test_gains_keep_the_size_of_an_update(directions):
    silent, loud = (moved(gained(phi, directions), (16, 24), steps=1) for phi in (SILENT, LOUD))
    torch.testing.assert_close(loud.norm(), silent.norm())


def test_gains_of_directions_turn_with_the_coordinates():
    """Rows are not special: turning all gradients from the left turns the update."""
    generator = torch.Generator().manual_seed(2)
    grads = torch.randn(1, 16, 24, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
    plain = Orthogonal(row_norm=False, update_rms=0.2)

    def update(grad, directions):
        chosen = Gains(directions, LOUD, plain)
        state = {**chosen.init(grad), "step": torch.ones(1)}
        return chosen(grad, state, grad, (0.9, 0.99))

    torch.testing.assert_close(update(turn @ grads, True), turn @ update(grads, True))
    assert not torch.allclose(update(turn @ grads, False), turn @ update(grads, False), rtol=0.05)


def test_eigenvectors_exist_where_a_matrix_is_zero_tiny_or_not_finite():
    matrices = torch.randn(4, 6, 8)
    matrices[0] = 0.0
    matrices[1] *= 1e-30
    matrices[2, 0, 0] = torch.nan
    found = eigenvectors(matrices)
    torch.testing.assert_close(found.mT @ found, torch.eye(6).expand(4, 6, 6), atol=1e-5, rtol=0)
    turned = found[1].mT @ matrices[1] * 1e30
    gram = turned @ turned.mT
    assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.abs().max()


@pytest.mark.parametrize("directions", [True, False])
def test_candidates_do_not_see_one_another(directions):
    task, gains = draw(3, (12, 12)), Gains(directions, SILENT)
    phis = torch.stack([torch.tensor(SILENT), torch.tensor(LOUD)])
    together = train(task, Linear(), 0.03, phis=phis, gains=gains)
    alone = torch.cat([train(task, Linear(), 0.03, phis=phi[None], gains=gains) for phi in phis])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:1], train(task, Linear(), 0.03), rtol=1e-4, atol=1e-5)
    assert together.unique().numel() > 1


@pytest.mark.parametrize("directions", [True, False])
def test_gains_do_not_depend_on_the_unit_of_the_gradient(directions):
    moves = [
        moved(gained(LOUD, directions), (16, 24), unit=unit, steps=1) for unit in (1.0, 1e15, 1e-15)
    ]
    for other in moves[1:]:
        torch.testing.assert_close(other, moves[0], rtol=1e-3, atol=1e-4)
