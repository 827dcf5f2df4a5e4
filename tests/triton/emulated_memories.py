"""Runs Hope's memories on the CPU, in Triton's interpreter, as ``emulated.py`` does the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepopt.hope import fused
from deepopt.ops.triton.memories import fits, memories
from deepopt.ops.triton.memories_gradient import memories_gradient
from tests.hope import test_memory
from tests.hope.test_fused import arguments
from tests.triton import interpreter  # noqa: F401  # as the other kernels are run


def given(position: int, dtype: torch.dtype, **options: Any) -> fused.MemoryArguments:
    """Random arguments in mid-chunk; a floor that a scalar in float32 holds exactly."""
    case = test_memory.Case(memory_floor=2.0**-13, **options)
    found = arguments(case, position)
    return fused.MemoryArguments._make(
        x.detach().to(dtype) if isinstance(x, torch.Tensor) else x for x in found
    )


@pytest.mark.parametrize(
    ("options", "position", "dim", "dtype"),
    [
        ({"tokens": 5, "retention": "zero"}, 3, 3, torch.float64),
        (
            {"tokens": 4, "memory_chunk": 3, "projection_chunk": 5, "hidden": 9,
             "projection_hidden": 17}, 7, 5, torch.float64,
        ),
        (
            {"tokens": 22, "memory_chunk": 16, "projection_chunk": 32, "hidden": 3,
             "sharpness": 2.0}, 13, 17, torch.float64,
        ),
        ({"tokens": 20, "memory_chunk": 16, "projection_chunk": 16}, 0, 16, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_memories_and_their_gradients_are_those_of_the_reference(
    options: dict[str, Any],
    position: int,
    dim: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, size in {"DIM": dim, "BATCH": 1 + (dim == 3), "HEADS": 1 + (dim == 5)}.items():
        monkeypatch.setattr(test_memory, name, size)
    values = given(position, dtype, **options)
    within = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype]

    def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape
            scale = float(theirs.abs().max()) if theirs.numel() else 1.0
            torch.testing.assert_close(ours, theirs, rtol=0, atol=within * scale)

    expected = fused.memories.reference(True, values)
    same(memories(True, values), expected)
    same(memories(False, values)[:-1], expected[:-1])
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in expected[:-1]]
    grads[position % 9] = torch.zeros(0, dtype=dtype)  # a result that is not used
    found = memories_gradient(grads, expected[-1], values)
    wanted = fused.memories_gradient.reference(grads, expected[-1], values)
    if values.initial_w2 is None:
        found[11:15] = wanted[11:15] = []
    same(found, wanted)


def test_wide_memories_do_not_fit() -> None:
    assert fits(given(0, torch.float32, tokens=2))
    assert not fits(given(0, torch.float32, tokens=2, hidden=65))
