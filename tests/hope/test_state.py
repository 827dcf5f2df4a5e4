"""Packing, padding and carrying the state give the numbers of one unpadded run."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.hope import Hope, HopeConfig, HopeState, generate
from deepopt.hope.state import AttentionState

SMALL: dict[str, Any] = {
    "vocab_size": 11, "dim": 12, "heads": 2, "layers": 2, "memory_chunk": 4, "projection_chunk": 6,
    "max_inner_lr": 0.3, "cms_chunks": (8,),
}  # fmt: skip
LENGTHS = (9, 1, 14, 5)


@pytest.fixture(
    params=[
        {},
        {"turns": False},
        {"momentum": True, "memory_hidden": 0},
        {"conv_width": 1},
        {"mixer": "attention"},
    ],
    ids=["default", "still", "linear", "narrow", "attention"],
)
def model(request: pytest.FixtureRequest) -> Hope:
    torch.manual_seed(0)
    model = Hope(HopeConfig(**SMALL, **request.param)).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(11, (1, n), generator=g) for n in lengths]


def assert_same_state(a: HopeState, b: HopeState, row: int = 0) -> None:
    """Row `row` of a is the only row of b."""
    for one, other in zip(a.blocks, b.blocks, strict=True):
        count = one.positions[row]
        assert count == other.positions[0]
        if isinstance(one, AttentionState):
            for x, y in ((one.keys, other.keys), (one.values, other.values)):
                found, expected = x[row : row + 1, :, :count], y[:, :, :count]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
            continue
        for part, same in zip(one[:3], other[:3], strict=True):
            for x, y in zip(part, same, strict=True):
                if x is not None:
                    torch.testing.assert_close(x[row : row + 1], y, rtol=0, atol=1e-10)
        torch.testing.assert_close(one.phase[row : row + 1], other.phase, rtol=0, atol=1e-10)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples."""
    if isinstance(tree, tuple):
        return [tensor for part in tree for tensor in tensors(part)]
    return [tree] if isinstance(tree, Tensor) else []


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - row.shape[1], None) if left else slice(row.shape[1])
        tokens[i, where], mask[i, where] = row[0], True
    return tokens, mask


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(model: Hope, left: bool) -> None:
    rows = texts()
    tokens, mask = padded(rows, left)
    together = model(tokens, mask=mask)
    for i, row in enumerate(rows):
        alone = model(row)
        torch.testing.assert_close(together.logits[i][mask[i]], alone.logits[0], rtol=0, atol=1e-10)
        assert_same_state(together.state, alone.state, i)
    assert not together.logits[~mask].any()


def test_documents_of_a_packed_sequence_do_not_meet(model: Hope) -> None:
    documents = texts()
    tokens = torch.cat(documents, 1)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [0, 9, 10, 24]] = True
    packed = model(tokens, starts=starts)
    alone = [model(document) for document in documents]
    torch.testing.assert_close(
        packed.logits, torch.cat([x.logits for x in alone], 1), rtol=0, atol=1e-10
    )
    assert_same_state(packed.state, alone[-1].state)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_document_that_starts_on_padding_starts_wherever_the_text_is_cut(
    model: Hope, cut: int
) -> None:
    tokens = torch.randint(7, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 4:8] = mask[1, 9:] = False
    starts = torch.zeros_like(mask)
    starts[0, 4] = starts[1, 11] = True
    whole = model(tokens, mask=mask, starts=starts)
    parts, state = [], None
    for piece in (slice(0, cut), slice(cut, 12)):
        found = model(tokens[:, piece], state=state, mask=mask[:, piece], starts=starts[:, piece])
        parts.append(found.logits)
        state = found.state
    parted = torch.cat(parts, 1)
    torch.testing.assert_close(parted[mask], whole.logits[mask], rtol=0, atol=1e-10)
    assert state is not None
    for i in range(2):
        assert_same_state(state, whole.state.rows([i], whole.state), i)
    assert whole.state.blocks[0].positions == (4, 0)


def test_sequences_at_different_positions_go_on_exactly(model: Hope) -> None:
    """A batch whose texts have different lengths goes on, now packed and padded too."""
    first, second = texts(), texts((7, 8, 3, 10))
    tokens, mask = padded(first, left=True)
    state = model(tokens, mask=mask).state
    tokens, mask = padded(second, left=False)
    starts = torch.zeros_like(mask)
    starts[1, 5] = starts[3, 0] = True
    found = model(tokens, state=state, mask=mask, starts=starts)
    again = model(first[0], state=found.state.rows([0], found.state))
    for i in (0, 2):
        whole = torch.cat([first[i], second[i]], 1)
        expected = model(whole)
        n = second[i].shape[1]
        torch.testing.assert_close(found.logits[i, :n], expected.logits[0, -n:], rtol=0, atol=1e-10)
        assert_same_state(found.state, expected.state, i)
    torch.testing.assert_close(
        found.logits[1, 5:8], model(second[1][:, 5:]).logits[0], rtol=0, atol=1e-10
    )
    assert_same_state(found.state, model(second[3]).state, 3)
    whole = torch.cat([first[0], second[0], first[0]], 1)
    torch.testing.assert_close(again.logits[0], model(whole).logits[0, -9:], rtol=0, atol=1e-10)


def test_gradients_of_a_packed_batch_are_those_of_its_documents(model: Hope) -> None:
    documents = texts()
    tokens = torch.cat([documents[0], documents[2], torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, -3:] = False
    starts = torch.zeros_like(mask)
    starts[0, 9] = True
    params = list(model.parameters())
    packed = torch.autograd.grad(model(tokens, tokens, mask=mask, starts=starts).loss, params)
    total = 0.0
    for document in (documents[0], documents[2]):
        total = total + model(document, document).loss * document.shape[1] / 23
    for a, b in zip(packed, torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_padding_and_ignored_targets_are_not_in_the_loss(model: Hope) -> None:
    (text,) = texts((8,))
    targets = text.clone()
    targets[0, 5:] = -100
    expected = model(text[:, :5], text[:, :5]).loss
    torch.testing.assert_close(model(text, targets).loss, expected)
    tokens, mask = padded([text[:, :5], text[:, :0]], left=True)
    torch.testing.assert_close(model(tokens, tokens, mask=mask).loss, expected)


def test_a_text_without_tokens_keeps_its_state(model: Hope) -> None:
    rows = texts((4, 6))
    tokens, mask = padded(rows, left=True)
    state = model(tokens, mask=mask).state
    nothing = model(tokens, state=state, mask=torch.zeros_like(mask)).state
    tokens, mask = padded([rows[0], rows[0][:, :0]], left=True)
    one = model(tokens, state=state, mask=mask).state
    for i, row in enumerate(rows):
        assert_same_state(nothing, model(row).state, i)
    assert_same_state(one, model(rows[1]).state, 1)


def test_left_padded_prompts_are_continued_as_alone(model: Hope) -> None:
    prompts = texts((5, 9, 2))
    tokens, mask = padded(prompts, left=True)
    together = generate(model, tokens, 12, temperature=0, mask=mask)
    for i, prompt in enumerate(prompts):
        alone = generate(model, prompt, 12, temperature=0)
        assert torch.equal(together[i, -12:], alone[0, -12:])
    with pytest.raises(ValueError, match="mask is False at the end"):
        generate(model, tokens, 1, mask=mask.flip(1))


def test_a_detached_state_goes_on_and_stops_gradients(model: Hope) -> None:
    (text,) = texts((12,))
    state = model(text).state
    kept = model(text, state=state).loss, model(text, text, state=state.detach()).loss
    assert kept[0] is None
    for _ in range(2):  # twice: nothing is freed that a second backward pass would need
        out = model(text, text, state=state.detach())
        out.loss.backward()
    torch.testing.assert_close(out.logits, model(text, state=state).logits)
    assert not any(tensor.requires_grad for tensor in tensors(state.detach()))


def test_a_state_is_moved_saved_and_loaded(model: Hope) -> None:
    (text,) = texts((12,))
    state = model(text).state
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    loaded = HopeState.from_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(text, state=loaded).logits, model(text, state=state).logits)
    moved = state.to(torch.float32)
    assert {tensor.dtype for tensor in tensors(moved)} == {torch.float32}
    assert moved.blocks[0].positions == (12,)
    pairs = zip(tensors(state), tensors(state.to(torch.float64, copy=True)), strict=True)
    assert not any(a.numel() and a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_a_state_in_a_narrow_dtype_keeps_its_phases_wide(model: Hope) -> None:
    narrow = model(*texts((12,))).state.to(torch.bfloat16)
    for name, tensor in narrow.state_dict().items():
        if isinstance(tensor, Tensor):
            wide = name.endswith("phase")
            assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), name
    again = model.bfloat16().initial_state(1)
    assert [x.dtype for x in tensors(narrow)] == [x.dtype for x in tensors(again)]


def test_the_state_of_a_text_of_padding_shares_no_memory_with_the_model(model: Hope) -> None:
    (text,) = texts((4,))
    state = model(text, mask=torch.zeros_like(text, dtype=torch.bool)).state
    kept = [x.clone() for x in tensors(state)]
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)
    assert all(torch.equal(x, y) for x, y in zip(tensors(state), kept, strict=True))


def test_a_state_of_another_dtype_or_device_is_refused_with_the_remedy(model: Hope) -> None:
    text, more = texts((4, 5))
    state = model(text).state
    with pytest.raises(ValueError, match=r"of dtype .*float32, the .*float64: move .*state\.to"):
        model(more, state=state.to(torch.float32))
    with pytest.raises(ValueError, match="of device meta, the model's has cpu"):
        model(more, state=state.to("meta"))
    first, later = state.blocks[0], model(more).state.blocks[1]
    with pytest.raises(ValueError, match=r"positions \(4,\) in one block and \(5,\) in another"):
        model(more, state=HopeState((first, later)))


@pytest.mark.parametrize("grad", [True, False])
def test_a_state_keeps_nothing_alive_but_its_own_numbers(model: Hope, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        for steps in ((14,), (13, 1), (1, 1)):
            state = None
            for text in texts(steps):
                state = model(text, state=state).state
            for tensor in tensors(state):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_saved_state_that_lacks_an_entry_is_refused_by_its_name(model: Hope) -> None:
    entries = model(*texts((12,))).state.state_dict()
    for name in entries:
        rest = {key: value for key, value in entries.items() if key != name}
        with pytest.raises(ValueError, match=re.escape(f"entries lack {name}: pass all")):
            HopeState.from_state_dict(rest)
    second = {name: value for name, value in entries.items() if name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"entries lack blocks\.0\."):
        HopeState.from_state_dict(second)
    with pytest.raises(ValueError, match="entries have no block"):
        HopeState.from_state_dict({})
    for wrong in ([-1], [1.5], [3, 3], [], [[3]], 3, None, "a"):
        said = re.escape(f"'blocks.0.positions'] is {wrong!r}: must")
        with pytest.raises(ValueError, match=said):
            HopeState.from_state_dict({**entries, "blocks.0.positions": wrong})
    name = next(iter(entries))
    with pytest.raises(TypeError, match="must be a tensor"):
        HopeState.from_state_dict({**entries, name: 3})


@pytest.mark.parametrize(
    "other",
    [
        {"momentum": True}, {"memory_hidden": 0}, {"memory_hidden": 6}, {"projection_hidden": 0},
        {"turns": False}, {"conv_width": 2}, {"heads": 4}, {"dim": 16},
    ],
    ids=str,
)  # fmt: skip
def test_the_state_of_a_model_with_other_sizes_is_refused(other: dict[str, Any]) -> None:
    a, b = Hope(HopeConfig(**SMALL)), Hope(HopeConfig(**{**SMALL, **other}))
    tokens = texts()[0]
    for one, two in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"state has [\w.]+ of size .*: give the state of a"):
            one(tokens, state=two(tokens).state)


def test_the_state_of_hope_attention_with_other_heads_is_refused() -> None:
    a, b = (Hope(HopeConfig(**{**SMALL, "mixer": "attention", "heads": n})) for n in (2, 3))
    with pytest.raises(ValueError, match=r"state has keys of size \(3, 4\), the model's"):
        a(texts()[0], state=b(texts()[0]).state)


def test_what_is_no_saved_state_is_named() -> None:
    with pytest.raises(TypeError, match="entries is of type int: pass the dict"):
        HopeState.from_state_dict(3)  # type: ignore[arg-type]
