"""CMS levels learn once per chunk, from the mean gradient of the chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepopt.hope import CMS, chunk_groups
from deepopt.optim.continuum import Continuum

SEQ_LEN = 8


def make(chunks: tuple[int, ...]) -> CMS:
    torch.manual_seed(0)
    return CMS(4, 2, chunks).double()


def batch(step: int) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def groups(model: CMS) -> list[dict[str, Any]]:
    return chunk_groups(model, [{"params": list(model.named_parameters())}], SEQ_LEN)


def run(model: CMS, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_levels_of_one_frequency_share_a_group_and_keep_its_other_values() -> None:
    model = make((8, 16, 32))
    names = [name for name, _ in model.named_parameters()]
    split = chunk_groups(
        model,
        [
            {"params": list(model.named_parameters())[:4], "lr": 0.1},
            {"params": list(model.parameters())[4:]},
        ],
        SEQ_LEN,
    )
    assert [(g["chunk"], g.get("lr"), len(g["params"])) for g in split] == [
        (1, 0.1, 3),
        (2, 0.1, 1),
        (2, None, 2),
        (4, None, 3),
    ]
    assert [name for group in split[:2] for name, _ in group["params"]] == names[:4]


def test_chunks_within_the_sequence_are_plain_training() -> None:
    plain, chunked = make((2, 8)), make((2, 8))
    run(plain, torch.optim.AdamW(plain.parameters()), range(1, 7))
    run(chunked, Continuum(torch.optim.AdamW(groups(chunked))), range(1, 7))
    assert equal(snapshot(plain), snapshot(chunked))


def test_a_slow_level_moves_every_fourth_step_by_the_mean_gradient() -> None:
    model = make((8, 32))
    fast, slow = model.levels
    optimizer = Continuum(torch.optim.SGD(groups(model), lr=0.1))
    start = snapshot(slow)
    total = [torch.zeros_like(p) for p in start]
    for step in range(1, 5):
        model(batch(step)).square().mean().backward()
        for t, p in zip(total, slow.parameters(), strict=True):
            assert p.grad is not None
            t += p.grad
        before = snapshot(fast), snapshot(slow)
        optimizer.step()
        optimizer.zero_grad()
        assert not equal(before[0], snapshot(fast))
        assert equal(before[1], snapshot(slow)) == (step < 4)
    for p, s, t in zip(slow.parameters(), start, total, strict=True):
        torch.testing.assert_close(p.detach(), s - 0.1 * t / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [(), (0,), (-4, 8), (8, 12), (16, 8), (4.0,)])
def test_bad_chunks_are_named(chunks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cms_chunks="):
        CMS(4, 2, chunks)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="seq_len=0"):
        chunk_groups(make((8,)), [], 0)
