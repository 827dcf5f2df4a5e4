"""Cached decoding is exact, and sampling does what its options say."""

from __future__ import annotations

import gc
import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.hope import Hope, HopeConfig, complete, generate, stream
from deepopt.hope.state import INTEGERS


@pytest.fixture
def model() -> Hope:
    torch.manual_seed(1)
    config = HopeConfig(
        vocab_size=11, dim=8, heads=2, memory_chunk=4, projection_chunk=6, max_inner_lr=0.3
    )
    model = Hope(config).double()
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def prompt() -> Tensor:
    return torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))


def test_greedy_decoding_equals_full_forward_passes(model: Hope, prompt: Tensor) -> None:
    expected = prompt
    for _ in range(14):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, prompt, 14, temperature=0), expected)
    assert torch.equal(generate(model, prompt, 14, top_k=1), expected)


def test_same_generator_same_text(model: Hope, prompt: Tensor) -> None:
    def draw(seed: int) -> Tensor:
        return generate(model, prompt, 12, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(draw(0)[:, :5], prompt)


def test_top_k_draws_among_the_k_likeliest(model: Hope, prompt: Tensor) -> None:
    out = generate(model, prompt, 20, top_k=3, temperature=5.0)
    logits = model(out[:, :-1]).logits[:, 4:]
    chosen = logits.gather(-1, out[:, 5:, None])
    assert (chosen >= logits.topk(3).values[..., -1:] - 1e-9).all()


def test_no_tokens_to_add_returns_the_prompt(model: Hope, prompt: Tensor) -> None:
    assert torch.equal(generate(model, prompt, 0), prompt)


def test_top_p_draws_among_the_likeliest_that_reach_it(model: Hope, prompt: Tensor) -> None:
    out = generate(model, prompt, 40, top_p=0.6, temperature=2.0)
    shares = (model(out[:, :-1]).logits[:, 4:] / 2).softmax(-1)
    chosen = shares.gather(-1, out[:, 5:, None])
    likelier = (shares * (shares > chosen)).sum(-1)
    assert (likelier < 0.6 + 1e-9).all()
    assert (likelier > 0.3).any()  # others than the first few are drawn
    assert torch.equal(generate(model, prompt, 9, top_p=1e-9), generate(model, prompt, 9, top_k=1))


def test_draws_follow_the_shares_that_the_options_leave(model: Hope) -> None:
    """Against the probabilities written out, at temperature, among the k, among those of p."""
    prompt = torch.zeros(4000, 1, dtype=torch.long)
    logits = model(prompt[:1]).logits[0, 0]
    shares = torch.zeros(11, dtype=torch.float64)
    for index in logits.argsort(descending=True)[:5]:
        shares[index] = (logits[index] / 1.5).exp()
    shares /= shares.sum()
    for index in shares.argsort()[:-2]:  # all but those of p
        if shares[shares > shares[index]].sum() >= 0.7:
            shares[index] = 0
    shares /= shares.sum()
    (drawn,) = stream(model, prompt, 1, temperature=1.5, top_k=5, top_p=0.7)
    found = torch.bincount(drawn, minlength=11) / 4000
    assert found[shares == 0].sum() == 0
    assert torch.allclose(found.double(), shares, atol=5 * (0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_options_draw_the_likeliest_or_from_all_that_are_left(
    model: Hope, prompt: Tensor, dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    greedy = generate(model, prompt, 9, temperature=0)
    for options in ({"temperature": 1e-300}, {"temperature": 5e-324}, {"top_p": 1e-300}):
        assert torch.equal(generate(model, prompt, 9, **options), greedy), options
    many = torch.zeros(400, 1, dtype=torch.long)
    kept = model(many[:1]).logits[0, 0].topk(2).indices
    (drawn,) = stream(model, many, 1, temperature=1e300, top_k=2)
    assert torch.equal(drawn.unique(), kept.sort().values)


@pytest.mark.parametrize("prefill", [1, 2, 3, 5, 1024])
def test_a_prompt_read_in_parts_has_the_same_continuation(
    model: Hope, prompt: Tensor, prefill: int
) -> None:
    expected = generate(model, prompt, 6, temperature=0)
    assert torch.equal(generate(model, prompt, 6, temperature=0, prefill=prefill), expected)


def test_streamed_tokens_are_those_that_are_generated(model: Hope, prompt: Tensor) -> None:
    streamed = list(stream(model, prompt.int(), 7, temperature=0))
    whole = generate(model, prompt, 7, temperature=0)
    assert torch.equal(torch.stack(streamed, 1), whole[:, 5:])
    assert torch.is_grad_enabled()
    assert not next(stream(model, prompt, 1)).requires_grad


def test_a_token_is_there_before_the_next_is_computed(model: Hope, prompt: Tensor) -> None:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    tokens = stream(model, prompt, 5)
    for count in range(1, 6):
        next(tokens)
        assert len(calls) == count
    assert next(tokens, None) is None
    assert len(calls) == 5


def test_texts_end_at_their_stop_and_the_batch_with_the_last(model: Hope, prompt: Tensor) -> None:
    whole = generate(model, prompt, 30, temperature=0)[:, 5:].tolist()
    stop = next(
        whole[0][i : i + 2] for i in range(20) if whole[0][i : i + 2] != whole[1][i : i + 2]
    )

    def end(row: list[int]) -> int:
        ends = [i + 2 for i in range(29) if row[i : i + 2] == stop]
        return ends[0] if ends else 30

    ends = [end(row) for row in whole]
    assert ends[0] < 30
    stopped = generate(model, prompt, 30, temperature=0, stop=stop)[:, 5:].tolist()
    for row, full, last in zip(stopped, whole, ends, strict=True):
        assert row[:last] == full[:last]
        assert row[last:] == [-1] * (max(ends) - last)
    alone = generate(model, prompt[:1], 30, temperature=0, stop=bytes(stop))
    assert alone[0, 5:].tolist() == whole[0][: ends[0]]


def test_what_is_kept_does_not_grow_with_the_text(model: Hope, prompt: Tensor) -> None:
    def tensors() -> list[Tensor]:
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]

    others = tensors()
    aside = {id(tensor) for tensor in others}
    tokens = stream(model, prompt, 40)
    sizes = []
    for count in range(40):
        last = next(tokens)
        if count in (7, 39):
            sizes.append(sum(tensor.numel() for tensor in tensors() if id(tensor) not in aside))
    assert last is not None
    assert sizes[0] == sizes[1] > 0


def test_a_mask_goes_with_its_part_of_the_prompt(
    model: Hope, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    forward = Hope.forward

    def recording(self: Hope, tokens: Tensor, state: Any = None, **more: Tensor) -> Any:
        given.append({name: tensor.tolist() for name, tensor in more.items()})
        return forward(self, tokens, state=state)

    monkeypatch.setattr(Hope, "forward", recording)
    mask = torch.tensor([[False, False, True, True, True], [True] * 5])
    generate(model, prompt, 2, mask=mask, prefill=3)
    parts = [{"mask": mask[:, :3].tolist()}, {"mask": mask[:, 3:].tolist()}]
    assert given == [*parts, {}]


@pytest.fixture
def byte_model() -> Hope:
    torch.manual_seed(0)
    model = Hope(HopeConfig(dim=8, heads=2, layers=1, memory_chunk=4, projection_chunk=4))
    torch.nn.init.normal_(model.head.weight)
    return model


def test_text_goes_in_and_comes_out_in_whole_characters(
    byte_model: Hope, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\N{EURO SIGN}\N{GREEK SMALL LETTER ALPHA}\xe9".encode() + b"\xff.\xe2"
    module = importlib.import_module("deepopt.hope.generate")
    monkeypatch.setattr(module, "_draw", lambda *_: torch.tensor([[next(bytes_)]]))
    bytes_ = iter(text)
    pieces = list(complete(byte_model, "caf\xe9", len(text)))
    assert "".join(pieces) == text.decode(errors="replace")
    assert pieces[:3] == ["a", "\N{EURO SIGN}", "\N{GREEK SMALL LETTER ALPHA}"]
    escaped = [complete(byte_model, x, 5, temperature=0) for x in ("\udcff\xe9", b"\xff\xc3\xa9")]
    monkeypatch.undo()
    assert "".join(escaped[0]) == "".join(escaped[1])
    monkeypatch.setattr(module, "_draw", lambda *_: torch.tensor([[next(bytes_)]]))
    bytes_ = iter(b"one\n\ntwo")
    assert "".join(complete(byte_model, "count", 99, stop=b"\n\n")) == "one\n\n"


@pytest.mark.parametrize(
    "options",
    [
        {"length": -1},
        {"temperature": -0.5},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": []},
        {"stop": [11]},
        {"prefill": 0},
        {"length": "5"},
        {"length": 2.5},
        {"temperature": "1"},
        {"top_k": 2.5},
        {"top_p": "0.9"},
        {"prefill": None},
    ],
)
def test_bad_options_are_named_before_anything_is_computed(
    model: Hope, prompt: Tensor, options: dict[str, Any]
) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(
        (ValueError, TypeError), match=rf"^{name}={re.escape(repr(value))}: must be"
    ):
        stream(model, prompt, **{"length": 3, **options})


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        ("text", TypeError, "prompt is of type str: .*call complete"),
        (torch.zeros(0, 3).long(), ValueError, r"prompt has shape \(0, 3\)"),
        (torch.zeros(3).long(), ValueError, r"prompt has shape \(3,\)"),
        (torch.zeros(1, 3), ValueError, "dtype torch.float32: must be integers"),
        (torch.zeros(1, 3) > 1, ValueError, "dtype torch.bool: must be integers"),
        (torch.tensor([[3, 11]]), ValueError, "prompt has 11: tokens must lie in 0 ... 10"),
        (torch.tensor([[-1, 3]]), ValueError, "prompt has -1: "),
    ],
)
def test_bad_prompts_are_named_with_the_remedy(
    model: Hope, prompt: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        stream(model, prompt, 3)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_prompts_may_have_any_integer_type(byte_model: Hope, dtype: torch.dtype) -> None:
    prompt = torch.tensor([[3, 100, 7]])
    expected = generate(byte_model, prompt, 3, temperature=0)
    assert torch.equal(generate(byte_model, prompt.to(dtype), 3, temperature=0), expected)


def test_other_bad_input_is_named_with_the_remedy(model: Hope, byte_model: Hope) -> None:
    prompt = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="state belongs to a batch of 5, tokens to one of 2"):
        stream(model, prompt, 3, state=model.initial_state(5))
    with pytest.raises(TypeError, match="state is of type str"):
        stream(model, prompt, 3, state="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"stop='ab' is text: must be tokens, such as b'ab'"):
        stream(model, prompt, 3, stop="ab")
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2\): must have that of prompt"):
        stream(model, prompt, 3, mask=torch.ones(2, 2).bool())
    with pytest.raises(ValueError, match="mask is False at the end of a prompt: pad on the left"):
        stream(model, prompt, 3, mask=torch.tensor([[True] * 3, [True, True, False]]))
    with pytest.raises(ValueError, match=r"generator lies on meta.*torch.Generator\('cpu'\)"):
        stream(model, prompt, 3, generator=SimpleNamespace(device=torch.device("meta")))
    with pytest.raises(ValueError, match="the model has vocab_size=11: text needs one of bytes"):
        complete(model, "text", 3)
    with pytest.raises(ValueError, match="text is empty"):
        complete(byte_model, "", 3)
    with pytest.raises(ValueError, match=r"text has '\\ud800', half of a character"):
        complete(byte_model, "a\ud800b", 3)
    torch.nn.init.constant_(model.head.weight, torch.nan)
    with pytest.raises(FloatingPointError, match=r"not finite.*a smaller learning rate"):
        generate(model, prompt, 1)


@pytest.mark.parametrize("other", ["m", None, torch.nn.Linear(2, 2), Hope])
def test_what_is_no_model_is_refused_by_name(other: Any, prompt: Tensor) -> None:
    said = rf"^model is of type {type(other).__name__}: must be a deepopt.hope.Hope, such as"
    for call in (generate, stream):
        with pytest.raises(TypeError, match=said):
            call(other, prompt, 3)
    with pytest.raises(TypeError, match=said):
        complete(other, "text", 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": True}, "length=True: must be a whole number"),
        ({"temperature": False}, "temperature=False: must be a number"),
        ({"top_p": "0.9"}, "top_p='0.9': must be a number"),
        ({"stop": 3}, "stop=3: must be tokens"),
        ({"stop": [1.5]}, r"stop=\[1.5\]: must be tokens"),
        ({"mask": [[True] * 5] * 2}, "mask is of type list: must be a tensor"),
        ({"generator": 0}, "generator=0: must be a torch.Generator"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(
    options: dict[str, Any], said: str, model: Hope, prompt: Tensor
) -> None:
    with pytest.raises(TypeError, match=said):
        generate(model, prompt, **{"length": 3, **options})
    with pytest.raises(TypeError, match="text is of type list: must be text or bytes"):
        complete(model, [1, 2], 3)
