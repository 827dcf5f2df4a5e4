import math

import pytest
import torch

from benchmarks.transformer import Transformer, TransformerConfig
from deepopt.hope import stack_levels

CONFIG = TransformerConfig(vocab_size=11, dim=16, layers=2, heads=2)


def perturbed():
    """A model whose zero-initialized weights are not zero."""
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for param in model.parameters():
        param.data.add_(0.1 * torch.randn_like(param))
    return model


def test_the_first_loss_is_that_of_a_uniform_guess():
    tokens = torch.randint(0, 11, (2, 8))
    assert math.isclose(Transformer(CONFIG)(tokens, tokens).loss.item(), math.log(11), rel_tol=1e-6)


def test_later_tokens_do_not_move_earlier_logits():
    model, tokens = perturbed(), torch.randint(0, 11, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 11
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_positions_matter():
    model = perturbed()
    once = model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1]
    assert not torch.allclose(once, model(torch.tensor([[2, 1, 3, 4]])).logits[0, -1])


def test_every_parameter_gets_a_gradient():
    model, tokens = perturbed(), torch.randint(0, 11, (2, 8))
    model(tokens, tokens).loss.backward()
    assert all(param.grad.any() for param in model.parameters())


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=3 must divide dim=16"):
        TransformerConfig(dim=16, heads=3)


def test_its_mlps_become_levels() -> None:
    levels = stack_levels(Transformer(CONFIG), (8, 16))
    assert [level.name for level in levels] == [f"blocks.{i}.mlp" for i in range(CONFIG.layers)]
