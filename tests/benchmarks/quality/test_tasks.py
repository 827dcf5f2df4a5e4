"""What single workloads promise beyond what all do: their data, and the measures of their own."""

import math

import pytest
import torch

from benchmarks.quality import datasets, online
from benchmarks.quality.workload import Unavailable, built_in, digest, find
from benchmarks.quality.workloads import (
    LOCKED,
    lm_aba,
    modular_addition,
    parity_dyck,
    permuted_digits,
    quadratic,
    recall,
)


def test_what_is_locked_is_there_and_in_no_tier_but_its_own():
    from benchmarks.quality.tiers import TIERS

    assert set(LOCKED) <= set(built_in())
    assert TIERS["locked"].workloads == LOCKED
    assert not any(
        set(LOCKED) & set(tier.workloads) for name, tier in TIERS.items() if name != "locked"
    )


def test_recall_asks_for_values_of_keys_that_the_text_begins_with():
    for step, pairs in enumerate((4, 8, 16, 32, 4)):
        tokens, targets = recall.data(0, step)
        assert tokens.shape == (16, 128)
        assert targets.shape == (16, 128 - 2 * pairs)
        for text, sought in zip(tokens, targets, strict=True):
            known = dict(text[: 2 * pairs].view(-1, 2).tolist())
            assert len(known) == pairs
            assert [known[key] for key in text[2 * pairs :].tolist()] == sought.tolist()
    assert tokens[:, : 2 * pairs : 2].max() < 128 <= targets.min()


def test_recall_embeds_a_token_with_the_one_before_it_alone():
    model = recall.model().transformer
    assert model.head.weight is model.embedding.embedding.weight
    tokens = recall.data(0, 0).tokens[:1]
    changed = tokens.clone()
    changed[0, 5] += 1
    differs = (model.embedding(tokens) != model.embedding(changed)).any(-1).squeeze(0)
    assert differs.nonzero().flatten().tolist() == [5, 6]


def test_modular_addition_holds_half_of_the_pairs_out():
    train, val, _ = modular_addition.pairs()
    kept = set(map(tuple, train.inputs.tolist()))
    assert len(kept | set(map(tuple, val.inputs.tolist()))) == 97**2
    assert len(kept) + len(val.inputs) == 97**2
    assert all(
        (a + b) % 97 == c for (a, b), c in zip(val.inputs.tolist(), val.targets, strict=True)
    )


def test_the_words_of_two_languages_have_letters_of_their_own():
    tokens, targets = parity_dyck.data(0, 0)
    assert tokens.shape == (64, 40)
    assert set(tokens[:32].unique().tolist()) == {0, 1}
    assert set(tokens[32:].unique().tolist()) == {2, 3}
    assert torch.equal(targets[:32], tokens[:32].cumsum(1) % 2)
    depth = (2 * (tokens[32:] - 2) - 1).cumsum(1)
    assert (depth >= 0).all()
    assert torch.equal(targets[32:] - 2, (depth > 0).long())


def test_the_quadratic_is_at_its_optimum_with_the_sought_matrix_and_at_one_with_zero():
    sought, model = quadratic.problem(), quadratic.model()
    with torch.no_grad():
        for layer in model:
            layer.weight.zero_()
            layer.bias.zero_()
    assert quadratic.metrics(model)["val_loss"] == pytest.approx(1.0)
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(sought.weight)
            layer.bias.copy_(sought.bias)
    assert quadratic.metrics(model)["val_loss"] == 0.0
    batch = quadratic.data(0, 0)
    exact = quadratic.Batch(batch.inputs, batch.outputs[:1].expand_as(batch.outputs))
    assert quadratic.loss(model, exact).item() < 1e-9
    assert quadratic.loss(model, batch).item() > 1e-3


def test_the_quadratics_excess_is_that_of_its_loss_over_many_batches():
    torch.manual_seed(0)
    model = quadratic.model()
    with torch.no_grad():
        found = [
            quadratic.loss(torch.nn.ModuleList([model[0]]), quadratic.Batch(x, y[:1])).item()
            for x, y in (quadratic.data(0, step) for step in range(200))
        ]
        zero = [
            quadratic.loss(torch.nn.ModuleList([still()]), quadratic.Batch(x, y[:1])).item()
            for x, y in (quadratic.data(0, step) for step in range(200))
        ]
    assert sum(found) / sum(zero) == pytest.approx(quadratic.metrics(model)["noise_0"], rel=0.02)


def still():
    layer = torch.nn.Linear(quadratic.SIDE, quadratic.SIDE)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def test_the_quadratics_hessian_has_the_stated_condition():
    sought = quadratic.problem()
    conditions = [torch.linalg.cond(root.double()).item() ** 2 for root in sought[2:]]
    assert math.prod(conditions) == pytest.approx(quadratic.CONDITION, rel=1e-3)


def test_pixels_change_their_places_with_the_task_alone():
    try:
        find("permuted_digits").sha256()
    except Unavailable as reason:
        pytest.skip(str(reason))
    task = permuted_digits.TASK
    assert not torch.equal(permuted_digits.places(0), permuted_digits.places(1))
    for step in (0, task - 1, task):
        inputs, targets = permuted_digits.data(0, step)
        plain = datasets.digits().batch(permuted_digits.BATCH, 0, step)
        assert torch.equal(inputs, plain.inputs[:, permuted_digits.places(step // task)])
        assert torch.equal(targets, plain.targets)
    seen = torch.cat([permuted_digits.data(0, step).inputs for step in range(task)])
    assert len(seen.unique(dim=0)) == task * permuted_digits.BATCH  # no digit twice in a pass


def test_a_model_keeps_the_losses_of_its_training_and_no_others():
    model = online.Online(torch.nn.Linear(2, 1))
    loss = model(torch.ones(1, 2)).sum()
    assert online.kept(model, loss) is loss
    with torch.no_grad():
        online.kept(model, loss)
    assert online.losses(model) == [loss.item()]
    with pytest.raises(TypeError, match="model=Linear: must be an Online"):
        online.losses(torch.nn.Linear(2, 1))


def test_the_text_changes_after_a_phase_and_what_was_forgotten_is_counted(monkeypatch):
    monkeypatch.setattr(lm_aba, "PHASE", 30)
    code, text = lm_aba.data(0, 29), lm_aba.data(0, 30)
    assert digest(code) == digest(find("lm_code").data(0, 29))
    assert digest(text) != digest(find("lm_code").data(0, 30))
    assert digest(lm_aba.data(0, 60)) == digest(find("lm_code").data(0, 60))
    first, second = [5.0] * 10 + [2.0] * 20, [4.0] * 30
    back = [3.0] * 6 + [2.0] * 24
    assert lm_aba.returns(first + second + back) == {"forgotten": 1.0, "relearned_steps": 11}
    assert lm_aba.returns(first + second + [3.0] * 30)["relearned_steps"] == 30
    assert lm_aba.returns(first + second) == {}
