"""CMS levels learn once per chunk of tokens, in the paper's three variants and ad hoc."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepopt
from deepopt.hope import CMS, Hope, HopeConfig, chunk_groups, stack_levels
from deepopt.hope.cms import CMSLevel, levels_of
from deepopt.optim.continuum import Continuum


def make(chunks: tuple[int, ...], variant: str = "sequential") -> CMS:
    torch.manual_seed(0)
    return CMS(4, 8, chunks, variant).double()


def batch(step: int, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 4, dtype=torch.float64, generator=generator)


def groups(model: CMS, tokens: int) -> list[dict[str, Any]]:
    return chunk_groups(model, [{"params": list(model.named_parameters())}], tokens)


def step(model: CMS, optimizer: torch.optim.Optimizer, number: int) -> None:
    model(batch(number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def run(model: CMS, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        step(model, optimizer, number)


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- the variants ------------------------------------------------------------------------------


def mlp(level: CMSLevel, x: Tensor) -> Tensor:
    """Eq 70's MLP with what is omitted there, the norm; a nested level's weights added up."""
    x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()
    up, down = level.up.weight, level.down.weight
    if level.up_change is not None:
        up, down = up + level.up_change, down + level.down_change
    return F.gelu((x * level.norm.weight) @ up.T) @ down.T


@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_a_chain_applies_the_fastest_level_first(variant: str) -> None:
    """Eq 70 with residuals."""
    model, x = make((2, 4, 8), variant), batch(1)
    for param in model.parameters():
        param.data.add_(0.1 * torch.randn_like(param))
    expected = x
    for level in model.levels:
        expected = expected + mlp(level, expected)
    assert [level.cms_chunk for level in model.levels] == [2, 4, 8]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_independent_levels_are_summed_with_learned_weights() -> None:
    """Eq 74: every level sees the same input."""
    model, x = make((2, 4), "independent"), batch(1)
    model.weights.data = torch.tensor([0.5, -2.0]).double()
    first, second = model.levels
    torch.testing.assert_close(model(x), x + 0.5 * mlp(first, x) - 2.0 * mlp(second, x))
    model(x).sum().backward()
    assert model.weights.grad.all()
    assert [g["chunk"] for g in groups(model, 2) if "weights" in dict(g["params"])] == [1]


# -- chunks in tokens --------------------------------------------------------------------------


def test_parameters_of_one_frequency_share_a_group_and_keep_its_other_values() -> None:
    model = make((8, 16, 32))
    names = [name for name, _ in model.named_parameters()]
    split = chunk_groups(
        model,
        [
            {"params": list(model.named_parameters())[:4], "lr": 0.1},
            {"params": list(model.parameters())[4:]},
        ],
        8,
    )
    assert [(g["chunk"], g["tokens"], g.get("lr"), len(g["params"])) for g in split] == [
        (8, 8, 0.1, 3),
        (16, 8, 0.1, 1),
        (16, 8, None, 2),
        (32, 8, None, 3),
    ]
    assert [name for group in split[:2] for name, _ in group["params"]] == names[:4]


def test_chunks_within_a_step_are_plain_training() -> None:
    plain, chunked = make((2, 8)), make((2, 8))
    run(plain, torch.optim.AdamW(plain.parameters()), range(1, 7))
    run(chunked, Continuum(torch.optim.AdamW(groups(chunked, 8))), range(1, 7))
    assert equal(snapshot(plain), snapshot(chunked))


def test_a_slow_level_moves_every_fourth_step_by_the_mean_gradient() -> None:
    model = make((8, 32))
    fast, slow = model.levels
    optimizer = Continuum(torch.optim.SGD(groups(model, 8), lr=0.1))
    start = snapshot(slow)
    total = [torch.zeros_like(p) for p in start]
    for number in range(1, 5):
        model(batch(number)).square().mean().backward()
        for t, p in zip(total, slow.parameters(), strict=True):
            assert p.grad is not None
            t += p.grad
        before = snapshot(fast), snapshot(slow)
        optimizer.step()
        optimizer.zero_grad()
        assert not equal(before[0], snapshot(fast))
        assert equal(before[1], snapshot(slow)) == (number < 4)
    for p, s, t in zip(slow.parameters(), start, total, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.1 * t / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("chunk", "tokens"), [(256, 100), (100, 256), (256, 64), (7, 3), (5, 5)])
def test_a_level_learns_once_per_chunk_of_tokens_also_where_steps_do_not_divide_it(
    chunk: int, tokens: int
) -> None:
    model = make((chunk,))
    optimizer = Continuum(torch.optim.SGD(groups(model, tokens), lr=0.1))
    for number in range(1, 14):
        before = snapshot(model)
        step(model, optimizer, number)
        passed = tokens * number
        ends = passed // chunk > (passed - tokens) // chunk
        assert equal(before, snapshot(model)) != ends


def test_training_counts_the_tokens_of_the_whole_batch(tmp_path: Any) -> None:
    from deepopt.hope.trainer import TrainConfig, Trainer

    text = tmp_path / "text"
    text.write_text("some words and more words\n" * 60)
    sizes = HopeConfig(dim=8, layers=1, heads=1, cms_chunks=(16, 96))
    trainer = Trainer(
        TrainConfig(
            out=tmp_path / "run", data=text, batch_size=4, seq_len=16, steps=9, model=sizes, lr=0.1
        )
    )
    fast, slow = trainer.model.blocks[0].cms.levels
    moved = []
    for _ in range(6):
        before = snapshot(fast), snapshot(slow)
        trainer.train_step()
        moved.append([not equal(x, snapshot(y)) for x, y in zip(before, (fast, slow), strict=True)])
    # 64 tokens a step: 96 have passed in the second, 192 in the third, 288 in the fifth, ...
    assert moved == [[True, slow] for slow in (False, True, True, False, True, True)]


# -- nested levels (Eq 72) ---------------------------------------------------------------------


def test_a_nested_level_starts_again_at_the_end_of_the_slower_levels_chunk() -> None:
    model = make((8, 32), "nested")
    fast, slow = model.levels
    optimizer = Continuum(torch.optim.SGD(groups(model, 8), lr=0.1))
    changes, initial = (fast.up_change, fast.down_change), (fast.up.weight, fast.down.weight)
    for number in range(1, 10):
        before = [x.detach().clone() for x in (*changes, *initial, slow.up.weight)]
        step(model, optimizer, number)
        ends = number % 4 == 0
        assert all(bool(x.any()) != ends for x in changes)
        assert equal(before[2:], [x.detach() for x in (*initial, slow.up.weight)]) != ends


def test_what_a_nested_level_starts_from_learns_from_the_loss_of_the_adapted_weights() -> None:
    """The meta-gradient through one inner step is that at the adapted weights, to first order."""
    model = make((8, 16), "nested")
    fast = model.levels[0]
    names = [name for name, _ in model.named_parameters() if "levels.0" in name]
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).square().mean()

    def exact(rate: float) -> Tensor:
        """d/d up of the second batch's loss after an inner step on the first."""

        def after(up: Tensor) -> Tensor:
            start = {**params, "levels.0.up.weight": up}
            inner = torch.func.grad(loss)(start, batch(1))
            change = {n: start[n] - rate * inner[n] for n in names if n.endswith("_change")}
            return loss({**start, **change}, batch(2))

        return torch.func.grad(after)(params["levels.0.up.weight"])

    def ours(rate: float) -> Tensor:
        twin = copy.deepcopy(model)
        optimizer = Continuum(torch.optim.SGD(groups(twin, 8), lr=rate))
        step(twin, optimizer, 1)
        twin(batch(2)).square().mean().backward()
        return twin.levels[0].up.weight.grad

    assert fast.up_change is not None
    torch.testing.assert_close(ours(0.0), exact(0.0))
    gaps = [(ours(rate) - exact(rate)).norm() for rate in (0.02, 0.01)]
    assert 1.8 < gaps[0] / gaps[1] < 2.2  # the neglected term is linear in the rate


def test_a_nested_continuum_is_saved_and_goes_on_in_the_middle_of_a_chunk() -> None:
    whole = make((8, 32), "nested")
    optimizer = Continuum(torch.optim.AdamW(groups(whole, 8)))
    run(whole, optimizer, range(1, 8))
    broken = make((8, 32), "nested")
    first = Continuum(torch.optim.AdamW(groups(broken, 8)))
    run(broken, first, range(1, 4))
    resumed = copy.deepcopy(broken)
    second = Continuum(torch.optim.AdamW(groups(resumed, 8)))
    second.load_state_dict(first.state_dict())
    run(resumed, second, range(4, 8))
    assert equal(snapshot(whole), snapshot(resumed))


# -- ad-hoc level stacking (section 7.3) -------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(5))).double()


def test_consecutive_mlps_take_the_chunks_in_turn_and_compute_what_they_did() -> None:
    model = transformer()
    before, names = model(batch(1)), list(model.state_dict())
    levels = stack_levels(model, (8, 16))
    assert [(level.name, level.chunk) for level in levels] == [
        (f"{i}.mlp", (8, 16)[i % 2]) for i in range(5)
    ]
    assert torch.equal(model(batch(1)), before)
    assert list(model.state_dict()) == names


def test_a_stacked_level_learns_at_its_chunk_and_a_rate_of_zero_changes_no_bit() -> None:
    for rate in (0.1, 0.0):
        model = transformer()
        stack_levels(model, (8, 16))
        before = snapshot(model[0]), snapshot(model[1])
        split = chunk_groups(model, deepopt.param_groups(model), tokens=8)
        options = {"lr": rate, "weight_decay": 0.0}
        optimizer = Continuum(deepopt.DeepMomentum(split, **options))
        logits = model(batch(9))
        step(model, optimizer, 1)
        assert equal(before[0], snapshot(model[0])) == (rate == 0)
        assert equal(before[1], snapshot(model[1]))
        step(model, optimizer, 2)
        assert equal(before[1], snapshot(model[1])) == (rate == 0)
        assert torch.equal(model(batch(9)), logits) == (rate == 0)


def test_the_levels_of_hope_attention_take_other_chunks() -> None:
    model = Hope(HopeConfig(dim=8, heads=2, layers=3, mixer="attention", cms_chunks=(1,)))
    levels = stack_levels(model, (4, 8, 16))
    assert [level.chunk for level in levels_of(model)] == [4, 8, 16] == [x.chunk for x in levels]
    (two, _) = stack_levels(model, (2, 8), mlps=["blocks.1.cms.levels.0", "blocks.2.cms.levels.0"])
    assert (two.name, two.chunk) == ("blocks.1.cms.levels.0", 2)


def test_the_reasons_of_a_routing_stay_with_their_parameters() -> None:
    model = Hope(HopeConfig(dim=32, heads=2, layers=1))
    groups = deepopt.param_groups(model)
    known = {
        name: reason
        for group in groups
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }
    for group in chunk_groups(model, groups, 256):
        names = [name for name, _ in group["params"]]
        assert [known[name] for name in names] == group["reasons"]


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [(), (0,), (-4, 8), (8, 12), (16, 8), (4.0,), (True,), 8])
def test_bad_chunks_are_named(chunks: Any) -> None:
    with pytest.raises(ValueError, match=r"^chunks="):
        CMS(4, 8, chunks)
    with pytest.raises(ValueError, match=r"^chunks="):
        stack_levels(transformer(), chunks)


def test_bad_arguments_are_named() -> None:
    for tokens in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"tokens={tokens}"):
            chunk_groups(make((8,)), [], tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="groups has an entry of type Parameter: must be"):
        chunk_groups(make((8,)), list(make((8,)).parameters()), 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is of type NoneType: must be a"):
        stack_levels(None, (4,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^variant='parallel'"):
        make((8,), "parallel")
    with pytest.raises(ValueError, match=r"chunks=\(4,\): the model has 0 MLPs for 1 levels"):
        stack_levels(nn.Linear(4, 4), (4,))
    with pytest.raises(ValueError, match=r"mlps has '9\.mlp'"):
        stack_levels(transformer(), (4,), mlps=["9.mlp"])
    for name in ("levels.0", "levels.1"):  # the slowest one's chunk is also the other's lifetime
        with pytest.raises(ValueError, match=f"{name} is a nested level"):
            stack_levels(make((8, 16), "nested"), (8,), [name])
