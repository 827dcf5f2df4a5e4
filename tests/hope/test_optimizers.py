"""The optimizers of the training command: which parameters decay, at which rate."""

import pytest
import torch

import deepopt
from deepopt.hope import Hope, HopeConfig, chunk_groups
from deepopt.hope.optimizers import RATES, build_optimizers, optimizers_by_name

CONFIG = HopeConfig(dim=32, heads=2, layers=1)


@pytest.mark.parametrize("name", sorted(optimizers_by_name()))
def test_vectors_do_not_decay_and_all_else_does(name: str) -> None:
    model = Hope(CONFIG)
    decays = {
        param: group["weight_decay"]
        for optimizer in build_optimizers(model, name, 1e-3, 0.1, None, 256)
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert decays.keys() == set(model.parameters())
    for param, decay in decays.items():
        if param.ndim < 2:
            assert decay == 0
        else:
            assert decay in (0.1, pytest.approx(0.1 / RATES.get(name, 1.0)))


def test_a_step_without_gradients_leaves_the_gates_where_they_are() -> None:
    """They decay to a memory that holds nothing otherwise."""
    model = Hope(CONFIG)
    (optimizer,) = build_optimizers(model, "DeepMomentum", 0.5, 0.1, None, 256)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    retention = model.blocks[0].titans.alpha_bias.clone()
    embedding = model.embedding.weight.clone()
    optimizer.step()
    assert torch.equal(model.blocks[0].titans.alpha_bias, retention)
    assert model.embedding.weight.norm() < embedding.norm()


def test_the_reasons_of_a_routing_stay_with_their_parameters() -> None:
    model = Hope(CONFIG)
    groups = deepopt.param_groups(model)
    known = {
        name: reason
        for group in groups
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }
    for group in chunk_groups(model, groups, 256):
        names = [name for name, _ in group["params"]]
        assert [known[name] for name in names] == group["reasons"]
