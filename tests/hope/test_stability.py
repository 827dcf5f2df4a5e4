"""No text, however long, and no weights, however large, make a memory run away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepopt.hope import Hope, HopeConfig
from deepopt.hope.memory import GENERATORS, Form, Gates, Initial, Inputs, MemoryState, Weights
from deepopt.hope.scan import self_modifying
from deepopt.hope.trainer import TrainConfig, Trainer

OPTIONS: list[dict[str, Any]] = [
    {}, {"update": "dgd"}, {"update": "gd"}, {"objective": "dot"}, {"momentum": True},
    {"memory_hidden": 0}, {"memory_hidden": 0, "update": "dgd", "max_erase": None},
    {"memory_hidden": 0, "update": "dgd"}, {"retention": "zero", "per_channel": True},
]  # fmt: skip
LONG: list[dict[str, Any]] = [{}, {"memory_hidden": 0, "update": "dgd"}]


@pytest.mark.parametrize(
    ("options", "tokens"), [(x, 65536 if x in LONG else 4096) for x in OPTIONS], ids=str
)
@torch.no_grad()
def test_long_texts_at_the_largest_rates(options: dict[str, Any], tokens: int) -> None:
    """Constant, random and alternating texts; nothing fades, weights are ten times too large."""
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=16, dim=12, layers=1, heads=2, memory_chunk=128, projection_chunk=128,
        max_inner_lr=1.0, max_delta=2.0, **options,
    )  # fmt: skip
    model = Hope(config)
    titans = model.blocks[0].titans
    for name, param in titans.named_parameters():
        if name.endswith(("_bias", "_range")):
            param.fill_(20.0)
        elif "w1" in name or "w2" in name:
            param.mul_(10.0)
    g = torch.Generator().manual_seed(1)
    text = torch.randint(16, (3, tokens), generator=g)
    text[0], text[2] = 3, torch.arange(tokens) // 64 % 2
    out = model(text)
    assert out.logits.isfinite().all()
    for memories in out.state.blocks[0][:2]:
        for weights in memories:
            assert weights is None or weights.isfinite().all()


@st.composite
def adversaries(draw: st.DrawFn) -> tuple[Inputs, Gates, Form, float]:
    """Inputs that repeat, oppose and outgrow each other, and rates anywhere in their range."""
    heads, d, tokens = 1, 4, 128
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    few = torch.randn(draw(st.integers(1, 4)), 3, d, generator=g)
    picks = torch.tensor(draw(st.lists(st.integers(0, len(few) - 1), min_size=8, max_size=8)))
    sign = torch.tensor(draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=8, max_size=8)))
    columns = few[picks] * sign[:, None, None] * 10.0 ** draw(st.floats(-4, 4))
    columns = columns.repeat(tokens // 8, 1, 1).permute(1, 2, 0)[:, None, None]
    inputs = Inputs(*columns)
    logits = draw(st.lists(st.floats(-20, 20), min_size=6, max_size=6))
    momentum = draw(st.booleans())
    theta = torch.full((heads,), draw(st.floats(-5, 5))) if momentum else None
    gates = Gates(*(torch.full((heads,), x) for x in logits), theta)
    chunk = draw(st.sampled_from([1, 2, 16, 64]))
    form = Form(
        draw(st.sampled_from(["l2", "dot"])), draw(st.sampled_from(["delta", "dgd", "gd"])),
        1.0 / chunk, draw(st.sampled_from([None, 2.0])), 2.0, draw(st.booleans()), chunk, chunk,
    )  # fmt: skip
    return inputs, gates, form, 10.0 ** draw(st.floats(-2, 1))


@given(adversaries(), st.sampled_from([0, 5]), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_grow_no_faster_than_what_is_written(
    adversary: tuple[Inputs, Gates, Form, float], hidden: int, pulled: bool
) -> None:
    """No erasure and no gradient multiplies a weight: growth is linear, so no input explodes."""
    inputs, gates, form, size = adversary
    d = inputs.key.shape[2]
    g = torch.Generator().manual_seed(0)
    weights = [
        Weights(
            torch.randn(1, count, hidden, d, generator=g) * size,
            torch.randn(1, count, d, hidden or d, generator=g) * size,
        )
        for count in (len(GENERATORS), 1)
    ]
    states = [MemoryState.start(w, 1, gates.theta is not None) for w in weights]
    pull = Initial(*weights) if pulled else Initial(None, None)
    _, *ends = self_modifying(inputs, *states, pull, gates, form)
    tokens = inputs.query.shape[-1]
    for initial, end in zip(weights, ends, strict=True):
        start = initial.w1.norm(dim=(-2, -1)).max()
        # At most |W_0| is pulled, and a column of norm 2 written, per token.
        largest = _largest(end.w1)
        assert largest <= 4 * (start + 2 * tokens)
        # A slope is at most 100 |W1| (2 + |W1|), and eta at most 1.
        if hidden:
            bound = _largest(initial.w2) * 4 + tokens * 113 * (start + 2 * tokens + 2) ** 2
            assert _largest(end.w2) <= bound


@pytest.mark.parametrize(("optimizer", "best"), [("AdamW", 4e-3), ("DeepMomentum", 8e-3)])
def test_training_at_eight_times_the_best_learning_rate_stays_finite(
    optimizer: str, best: float, tmp_path: Path
) -> None:
    """`Trainer.run` raises where a loss, a gradient or a weight is not finite."""
    config = TrainConfig(
        out=tmp_path, optimizer=optimizer, lr=8 * best, steps=60, warmup=4, batch_size=4,
        seq_len=128, eval_every=60, eval_windows=8, quiet=True,
        model=HopeConfig(dim=32, layers=2, heads=2),
    )  # fmt: skip
    assert Trainer(config).run().val_loss < math.log(256)


def _largest(weights: Tensor) -> Tensor:
    return weights.norm(dim=(-2, -1)).max()
