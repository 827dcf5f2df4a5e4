"""The Titans layer is causal and goes on exactly where it stopped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepopt.hope import Hope, HopeConfig, SelfModifyingTitans, reference, scan, titans
from deepopt.hope.memory import Inputs
from deepopt.hope.titans import Turns


@pytest.fixture(params=[True, False], ids=["momentum", "plain"])
def layer(request: pytest.FixtureRequest) -> SelfModifyingTitans:
    torch.manual_seed(0)
    config = HopeConfig(
        dim=8,
        heads=2,
        memory_chunk=4,
        projection_chunk=6,
        max_inner_lr=0.5,
        momentum=request.param,
    )
    return SelfModifyingTitans(config).double()


def text(tokens: int) -> Tensor:
    return torch.randn(
        2, tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("pieces", [[1] * 21, [3, 7, 11], [20, 1], [1, 20], [12, 9]])
def test_pieces_equal_the_whole(layer: SelfModifyingTitans, pieces: list[int]) -> None:
    x = text(21)
    whole, end = layer(x)
    outputs, state = [], None
    for piece in x.split(pieces, 1):
        out, state = layer(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-10)
    assert state is not None
    assert state.positions == end.positions == (21, 21)
    for a, b in zip(state[:3], end[:3], strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.phase, end.phase, rtol=0, atol=1e-6)


def test_gradients_flow_through_a_carried_state(layer: SelfModifyingTitans) -> None:
    x = text(13)

    def gradients(pieces: list[int]) -> tuple[Tensor, ...]:
        state, total = None, x.new_zeros(())
        for piece in x.split(pieces, 1):
            out, state = layer(piece, state)
            total = total + out.square().sum()
        return torch.autograd.grad(total, list(layer.parameters()))

    for a, b in zip(gradients([13]), gradients([5, 8]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_the_future_does_not_move_the_past(layer: SelfModifyingTitans) -> None:
    x = text(15)
    changed = x.clone()
    changed[:, 9:] += 1.0
    before, after = layer(x)[0], layer(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_memories_carry_the_past_beyond_the_convolutions(layer: SelfModifyingTitans) -> None:
    x = text(15)
    changed = x.clone()
    changed[:, 0] += 1.0
    difference = (layer(x)[0] - layer(changed)[0])[:, 4:].abs()
    assert difference.amax((0, 2)).min() > 1e-9


def counted(rates: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """400 letters of two kinds, the queries of two heads, of which the first turns, and its phase.

    Rows of `rates`: the amount and the gate's logit; columns: the inputs of the two letters.
    """
    turns = Turns(dim=2, heads=1, sharpness=6.0)
    turns.rates.weight.data.copy_(torch.tensor(rates))
    letters = torch.randint(2, (1, 400), generator=torch.Generator().manual_seed(0))
    query = torch.zeros(1, 2, 4, 400)
    query[:, :, 0] = query[:, :, 3] = 1.0
    x = torch.nn.functional.one_hot(letters, 2).float()
    turned, phase = turns(x, query, torch.zeros(1, 1))
    assert torch.equal(turned[:, 1], query[:, 1])
    assert 0 <= phase.item() < 2 * math.pi
    return letters, turned[:, 0], phase[0]


def check_turned(turned: Tensor, phase: Tensor, angle: Tensor) -> None:
    expected = [angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)]
    torch.testing.assert_close(turned, torch.stack(expected, 1), rtol=0, atol=1e-4)
    torch.testing.assert_close((phase - angle[:, -1]).cos(), torch.ones(1), rtol=0, atol=1e-6)


def test_a_phase_counts_one_letter_modulo_five_and_passes_over_the_other() -> None:
    letters, turned, phase = counted([[0.3, 2 * math.pi / 5], [-1.0, 1.0]])
    check_turned(turned, phase, 2 * math.pi / 5 * (letters.cumsum(1) % 5))


def test_a_phase_counts_down_by_negative_amounts() -> None:
    letters, turned, phase = counted([[-0.1, 0.1], [1.0, 1.0]])
    check_turned(turned, phase, 0.1 * (2 * letters - 1).cumsum(1))


def test_a_phase_is_exact_at_the_end_of_a_long_text() -> None:
    turns = Turns(dim=1, heads=1, sharpness=6.0)
    turns.rates.weight.data.copy_(torch.tensor([[1.0], [1.0]]))
    query = torch.tensor([1.0, 0.0, 0.0]).expand(1, 1, 200_000, 3).mT
    turned, phase = turns(torch.ones(1, 200_000, 1), query, torch.zeros(1, 1))
    assert turned[0, 0, 0, -1].item() == pytest.approx(math.cos(200_000), abs=1e-6)
    assert phase.item() == pytest.approx(math.remainder(200_000, 2 * math.pi) % (2 * math.pi))


@pytest.mark.parametrize(("heads", "turning"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_half_of_the_heads_turn(heads: int, turning: int) -> None:
    layer = SelfModifyingTitans(HopeConfig(dim=12, heads=heads))
    assert layer.initial_state(2).phase.shape == (2, turning)
    layer = SelfModifyingTitans(HopeConfig(dim=12, heads=heads, turns=False))
    assert layer.initial_state(2).phase.shape == (2, 0)


def test_the_phase_of_a_model_in_bfloat16_is_kept_in_float32() -> None:
    model = Hope(HopeConfig(vocab_size=7, dim=8, layers=1, heads=2, cms_chunks=(8,)))
    state = model.bfloat16()(torch.zeros(1, 5, dtype=torch.long)).state
    assert state is not None
    assert state.blocks[0].phase.dtype == torch.float32


def test_turns_start_small_and_learn() -> None:
    torch.manual_seed(0)
    model = Hope(HopeConfig(vocab_size=7, dim=12, heads=2, layers=1))
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(7, (2, 20))
    out = model(tokens, tokens)
    assert out.state.blocks[0].phase.cos().min() > 0.5
    out.loss.backward()
    gradient = model.get_parameter("blocks.0.titans.turns.rates.weight").grad
    assert gradient is not None
    assert gradient.count_nonzero() == gradient.numel()


def test_tokens_change_the_weights_of_both_stacks() -> None:
    torch.manual_seed(0)
    layer = SelfModifyingTitans(HopeConfig(dim=8, heads=2))
    start = layer.initial_state(2)
    _, end = layer(text(9).float(), start)
    assert not torch.equal(start.memory.w1, end.memory.w1)
    assert not torch.equal(start.generators.w2, end.generators.w2)


def test_queries_have_norm_one(layer: SelfModifyingTitans, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(inputs: Inputs, *rest: object, **options: object) -> object:
        seen.append(inputs.query)
        return scan.self_modifying(inputs, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(titans, "self_modifying", spy)
    layer(text(5))
    norms = seen[0].norm(dim=-2)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-3, atol=1e-3)


def test_a_whole_model_gives_the_same_with_the_token_by_token_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=7, dim=8, layers=2, heads=2, memory_chunk=4, projection_chunk=6, cms_chunks=(8,)
    )
    model = Hope(config).double()
    model.head.weight.data.normal_()
    tokens = torch.randint(0, 7, (2, 15))

    def run() -> list[Tensor]:
        out = model(tokens, tokens)
        assert out.loss is not None
        return [out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))]

    fast = run()
    monkeypatch.setattr(titans, "self_modifying", reference.self_modifying)
    for a, b in zip(fast, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_model_in_bfloat16_runs() -> None:
    model = Hope(HopeConfig(vocab_size=7, dim=8, layers=1, heads=2, cms_chunks=(8,))).bfloat16()
    tokens = torch.randint(0, 7, (1, 9))
    loss = model(tokens, tokens).loss
    assert loss is not None
    loss.backward()
    assert loss.isfinite()
