"""CMS levels learn once per chunk, from the mean gradient of the chunk."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepopt.hope import CMS, ChunkedUpdates

SEQ_LEN = 8


def make(chunks: tuple[int, ...]) -> CMS:
    torch.manual_seed(0)
    return CMS(4, 2, chunks).double()


def batch(step: int) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def run(
    model: CMS, optimizer: torch.optim.Optimizer, updates: ChunkedUpdates | None, steps: range
) -> None:
    for step in steps:
        model(batch(step)).square().mean().backward()
        if updates is None:
            optimizer.step()
        else:
            with updates.step():
                optimizer.step()
        optimizer.zero_grad()


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_chunks_within_the_sequence_are_plain_training() -> None:
    plain, chunked = make((2, 8)), make((2, 8))
    run(plain, torch.optim.AdamW(plain.parameters()), None, range(1, 7))
    run(
        chunked,
        torch.optim.AdamW(chunked.parameters()),
        ChunkedUpdates(chunked, SEQ_LEN),
        range(1, 7),
    )
    assert equal(snapshot(plain), snapshot(chunked))


def test_a_slow_level_moves_every_fourth_step_by_the_mean_gradient() -> None:
    model = make((8, 32))
    fast, slow = model.levels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updates = ChunkedUpdates(model, SEQ_LEN)
    start = snapshot(slow)
    total = [torch.zeros_like(p) for p in start]
    for step in range(1, 5):
        model(batch(step)).square().mean().backward()
        for t, p in zip(total, slow.parameters(), strict=True):
            assert p.grad is not None
            t += p.grad
        before = snapshot(fast), snapshot(slow)
        with updates.step():
            optimizer.step()
        optimizer.zero_grad()
        assert not equal(before[0], snapshot(fast))
        assert equal(before[1], snapshot(slow)) == (step < 4)
    for p, s, t in zip(slow.parameters(), start, total, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.1 * t / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop]
)
def test_resumes_bit_for_bit_in_mid_chunk(optimizer_class: type[torch.optim.Optimizer]) -> None:
    whole = make((8, 32))
    optimizer = optimizer_class(whole.parameters(), lr=0.01)  # type: ignore[call-arg]
    updates = ChunkedUpdates(whole, SEQ_LEN)
    run(whole, optimizer, updates, range(1, 7))
    saved = copy.deepcopy([x.state_dict() for x in (whole, optimizer, updates)])
    run(whole, optimizer, updates, range(7, 14))

    resumed = make((8, 32))
    optimizer = optimizer_class(resumed.parameters(), lr=0.01)  # type: ignore[call-arg]
    updates = ChunkedUpdates(resumed, SEQ_LEN)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    updates.load_state_dict(saved[2])
    run(resumed, optimizer, updates, range(7, 14))
    assert equal(snapshot(whole), snapshot(resumed))


def test_gradients_are_left_as_they_were_and_a_failed_step_does_not_count() -> None:
    model = make((8, 16))
    updates = ChunkedUpdates(model, SEQ_LEN)
    model(batch(1)).square().mean().backward()
    grads = [p.grad for p in model.parameters()]

    def fail() -> None:
        with updates.step():
            assert all(p.grad is None for p in model.levels[1].parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))
    assert updates.state_dict() == {"steps": 0, "pending": {}}


def test_due_names_the_slow_parameters_in_their_step() -> None:
    updates = ChunkedUpdates(make((8, 16, 32)), SEQ_LEN)
    assert updates.due(1) == []
    assert {name.split(".")[1] for name in updates.due(2)} == {"1"}
    assert {name.split(".")[1] for name in updates.due(4)} == {"1", "2"}


@pytest.mark.parametrize("chunks", [(), (0,), (-4, 8), (8, 12), (16, 8), (4.0,)])
def test_bad_chunks_are_named(chunks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cms_chunks="):
        CMS(4, 2, chunks)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="seq_len=0"):
        ChunkedUpdates(make((8,)), 0)
    with pytest.raises(ValueError, match="pending gradients"):
        ChunkedUpdates(make((8,)), 8).load_state_dict({"steps": 1, "pending": {"x": torch.ones(1)}})
