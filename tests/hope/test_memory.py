"""The chunk-parallel memories do what their token-by-token definition says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.hope.memory import (
    GENERATORS,
    Gates,
    MemoryState,
    generate,
    self_modifying,
    self_modifying_reference,
)

BATCH, HEADS, DIM, HIDDEN = 2, 2, 3, 5


def leaf(*shape: int, scale: float = 1.0, generator: torch.Generator) -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
    return values.requires_grad_()


def make_state(count: int, momentum: bool, g: torch.Generator) -> MemoryState:
    """A state in mid-chunk: running weights, momenta and anchors all differ."""
    m = 2 if momentum else 1
    lead = (BATCH, HEADS, count)
    return MemoryState(
        leaf(*lead, HIDDEN, m * DIM, scale=0.5, generator=g),
        leaf(*lead, m * DIM, HIDDEN, scale=0.5, generator=g),
        leaf(*lead, HIDDEN, DIM, scale=0.5, generator=g),
        leaf(*lead, DIM, HIDDEN, scale=0.5, generator=g),
    )


def inputs(
    tokens: int, momentum: bool
) -> tuple[tuple[Tensor, Tensor, MemoryState, MemoryState, Gates], list[Tensor]]:
    g = torch.Generator().manual_seed(tokens)
    z = leaf(BATCH, HEADS, DIM, tokens, generator=g)
    q = leaf(BATCH, HEADS, DIM, tokens, generator=g)
    generators = make_state(len(GENERATORS), momentum, g)
    memory = make_state(1, momentum, g)
    theta = leaf(HEADS, generator=g) if momentum else None
    gates = Gates(leaf(HEADS, generator=g), leaf(HEADS, generator=g), theta, 0.5)
    leaves = [z, q, *generators, *memory, gates.eta, gates.alpha]
    return (z, q, generators, memory, gates), leaves + ([theta] if theta is not None else [])


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    weighted = [(x * torch.randn(x.shape, dtype=x.dtype, generator=g)).sum() for x in outputs]
    loss = torch.stack(weighted).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(
    ("tokens", "memory_chunk", "projection_chunk", "position"),
    [
        (1, 4, 4, 0),
        (1, 1, 1, 3),
        (11, 4, 4, 0),
        (13, 3, 5, 7),
        (9, 16, 2, 5),
        (12, 5, 16, 21),
        (6, 1, 3, 0),
    ],
)
def test_chunk_parallel_form_equals_token_by_token_form(
    tokens: int, memory_chunk: int, projection_chunk: int, position: int, momentum: bool
) -> None:
    arguments, leaves = inputs(tokens, momentum)
    chunks: dict[str, Any] = {
        "memory_chunk": memory_chunk, "projection_chunk": projection_chunk, "position": position
    }  # fmt: skip
    fast_out, *fast_states = self_modifying(*arguments, **chunks)
    slow_out, *slow_states = self_modifying_reference(*arguments, **chunks)
    fast = [fast_out, *(x for state in fast_states for x in state)]
    slow = [slow_out, *(x for state in slow_states for x in state)]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [self_modifying, self_modifying_reference])
def test_anchors_are_the_running_weights_at_the_end_of_the_last_full_chunk(form: Any) -> None:
    """Eq 90: after 10 tokens in chunks of 4 the anchor is the state after token 8."""
    (z, q, generators, memory, gates), _ = inputs(10, True)

    def run(tokens: int) -> tuple[MemoryState, MemoryState]:
        chunks = {"memory_chunk": 4, "projection_chunk": 4}
        return form(z[..., :tokens], q[..., :tokens], generators, memory, gates, **chunks)[1:]

    for after_10, after_8 in zip(run(10), run(8), strict=True):
        torch.testing.assert_close(after_10.anchor_w2, after_8.w2[..., :DIM])
        torch.testing.assert_close(after_10.anchor_w1, after_8.w1[..., :DIM, :])
        assert not torch.allclose(after_10.anchor_w2, after_10.w2[..., :DIM])


def test_keys_and_values_have_norm_one() -> None:
    (z, _, generators, _, gates), _ = inputs(5, False)
    made = generate(z, generators.anchor_w2, generators.anchor_w1, gates)
    for columns in (made.key, made.value):
        norms = columns.norm(dim=-2)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=1e-4)
    assert (made.log_alpha < 0).all()
    assert (made.eta > 0).all()
    assert (made.eta < gates.max_eta).all()
