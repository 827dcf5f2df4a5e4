"""Sampling from a Hope model, one token at a time, from its carried state."""

from __future__ import annotations

import torch
from torch import Tensor

from deepopt.hope.model import Hope


@torch.no_grad()
def generate(
    model: Hope,
    prompt: Tensor,
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Continues a prompt. Exact: every token has the logits that a full forward pass gives.

    Args:
        model: the model.
        prompt: (batch, tokens), integers; at least one token.
        length: number of tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None for all.
        generator: source of randomness; None for torch's global one.
        mask: (batch, tokens) bool, False where a prompt is padded, on its left; None for prompts of
            one length.

    Returns:
        prompt and continuation, (batch, tokens + length).

    Raises:
        ValueError: an argument out of range, or a prompt that ends with padding.
        FloatingPointError: the logits are not finite.
    """
    if length < 0:
        raise ValueError(f"length={length}: must be at least 0, the number of tokens to add")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must be at least 0; 0 means greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for no limit")
    if mask is not None and not mask[:, -1].all():
        raise ValueError("mask is False at the end of a prompt: pad on the left")
    prompt = prompt.long()
    pieces = [prompt]
    tokens, state = prompt, None
    for _ in range(length):
        logits, _, state = model(tokens, state=state, mask=mask)
        mask = None  # only the prompt has padding
        tokens = _draw(logits[:, -1], temperature, top_k, generator)
        pieces.append(tokens)
    return torch.cat(pieces, 1)


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row of logits (batch, vocab_size); (batch, 1)."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its memories have diverged")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k).indices
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept, logits.gather(1, kept))
    logits = logits - logits.amax(-1, keepdim=True)  # so that a tiny temperature cannot overflow
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
