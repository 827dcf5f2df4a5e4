"""Cached decoding is exact, and sampling does what its options say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.hope import Hope, HopeConfig, generate


@pytest.fixture
def model() -> Hope:
    torch.manual_seed(0)
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


@pytest.mark.parametrize("options", [{"length": -1}, {"temperature": -0.5}, {"top_k": 0}])
def test_bad_options_are_named(model: Hope, prompt: Tensor, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        generate(model, prompt, **{"length": 3, **options})
