"""The models that are compared with Hope: one size, causal, and what their equations say."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.hope import models
from benchmarks.hope.delta_net import GatedDeltaNet, gated_delta_rule
from deepopt.hope import Hope, HopeConfig

CONFIG = HopeConfig(vocab_size=11, dim=16, layers=2, heads=2)
RIVALS = ("Hope-Attention", *models.BASELINES)


def perturbed(name):
    """A model none of whose weights is zero."""
    torch.manual_seed(0)
    model = models.build(name, CONFIG)
    for param in model.parameters():
        param.data.add_(0.1 * torch.randn_like(param))
    return model


def token_by_token(q, k, v, log_alpha, beta):
    """The recurrence of the docstring, one matrix of every head at a time."""
    batch, heads, tokens, width = q.shape
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            state = q.new_zeros(width, width)
            for t in range(tokens):
                key, rate = k[b, h, t], beta[b, h, t]
                left = torch.eye(width, dtype=q.dtype) - rate * torch.outer(key, key)
                state = log_alpha[b, h, t].exp() * left @ state
                state = state + rate * torch.outer(key, v[b, h, t])
                out[b, h, t] = q[b, h, t] @ state
    return out


@pytest.mark.parametrize("tokens", [1, 5, 8, 21])
@pytest.mark.parametrize("max_beta", [1.0, 2.0])
def test_the_chunked_delta_rule_and_its_gradients_are_those_of_the_token_loop(tokens, max_beta):
    torch.manual_seed(tokens)
    q, k, v = (torch.randn(2, 3, tokens, 4, dtype=torch.float64) for _ in range(3))
    inputs = [
        q,
        F.normalize(k, dim=-1),
        v,
        -torch.rand(2, 3, tokens, dtype=torch.float64),
        max_beta * torch.rand(2, 3, tokens, dtype=torch.float64),
    ]
    for x in inputs:
        x.requires_grad_()
    fast, slow = gated_delta_rule(*inputs, chunk=8), token_by_token(*inputs)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(slow)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((slow * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_large_beta_makes_eigenvalues_negative():
    layer = GatedDeltaNet(16, 2, max_beta=2.0).double()
    assert layer.max_beta == 2.0
    key = torch.tensor([[[[1.0, 0.0]] * 2]], dtype=torch.float64)
    value = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]], dtype=torch.float64)
    beta = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64)
    found = gated_delta_rule(key, key, value, torch.zeros(1, 1, 2, dtype=torch.float64), beta, 2)
    torch.testing.assert_close(found[0, 0], torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double())


@pytest.mark.parametrize("name", RIVALS)
def test_later_tokens_do_not_move_earlier_logits(name):
    model, tokens = perturbed(name), torch.randint(0, 11, (1, 70))
    changed = tokens.clone()
    changed[0, 66] = (tokens[0, 66] + 1) % 11
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :66], after[:, :66])
    assert not torch.allclose(before[:, 66:], after[:, 66:])


@pytest.mark.parametrize("name", models.NAMES)
def test_the_first_loss_is_that_of_a_uniform_guess(name):
    tokens = torch.randint(0, 11, (2, 8))
    loss = models.build(name, CONFIG)(tokens, tokens).loss
    assert math.isclose(loss.item(), math.log(11), rel_tol=1e-6)


@pytest.mark.parametrize("name", RIVALS)
def test_every_parameter_gets_a_gradient(name):
    model, tokens = perturbed(name), torch.randint(0, 11, (2, 8))
    model(tokens, tokens).loss.backward()
    assert all(param.grad.any() for param in model.parameters())


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("config", [HopeConfig(), HopeConfig(dim=64, heads=2, vocab_size=5)])
def test_rivals_have_as_many_parameters_as_hope(name, config):
    with torch.device("meta"):
        hope = models.parameters(Hope(config))
    found = models.parameters(models.build(name, config))
    assert abs(found - hope) <= 3 * config.dim * config.layers / 2


def test_frozen_memories_learn_nothing_and_others_do():
    tokens = torch.randint(0, 11, (1, 70))
    for name, learns in (("Hope", True), ("Hope, memories frozen", False)):
        model = perturbed(name)
        for block, after in zip(model.blocks, model(tokens).state.blocks, strict=True):
            for initial, end in (
                (block.titans.memory.w2, after.memory.w2[0]),
                (block.titans.memory.w1, after.memory.w1[0]),
                (block.titans.generators.w1, after.generators.w1[0]),
            ):
                moved = (initial - end).abs().max() > 1e-6
                assert moved == learns, name


def test_every_changed_part_changes_the_configuration_and_the_paper_has_all_of_its_own():
    for part, options in models.ABLATIONS.items():
        config = models.config_of(f"Hope, {part}", CONFIG)
        assert config != CONFIG
        assert config == dataclasses.replace(CONFIG, **options)
    printed = models.config_of("Hope, the printed layer (HopeConfig.paper)", HopeConfig())
    assert printed == HopeConfig.paper()


def test_an_unknown_model_is_refused_with_the_names_that_there_are():
    with pytest.raises(ValueError, match="'Hop': must be one of Hope, Hope-Attention, Transformer"):
        models.build("Hop", CONFIG)


def test_a_line_of_a_baseline_counts_while_its_own_sizes_hold():
    """And whatever else changes in Hope; one of Hope counts while all of its options do."""
    changed = dataclasses.replace(CONFIG, memory_chunk=8)
    assert models.described("Transformer++", CONFIG) == models.described("Transformer++", changed)
    assert models.described("Hope", CONFIG) != models.described("Hope", changed)
    larger = dataclasses.replace(CONFIG, cms_expansion=4)
    assert models.described("Transformer++", CONFIG) != models.described("Transformer++", larger)
