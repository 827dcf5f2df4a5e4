"""The chunk-parallel memories do what their token-by-token definition says, for every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.hope import reference, scan
from deepopt.hope.memory import (
    GENERATORS,
    Form,
    Gates,
    Initial,
    Inputs,
    MemoryState,
    Weights,
    features,
    generate,
    rates,
)  # fmt: skip

BATCH, HEADS, DIM = 2, 2, 3
FORM = Form(
    objective="l2", update="delta", max_eta=0.5, max_erase=2.0, max_delta=1.5, per_channel=False,
    memory_chunk=4, projection_chunk=4,
)  # fmt: skip


class Case:
    """Random arguments of `self_modifying`, in mid-chunk: weights, momenta and anchors differ."""

    def __init__(
        self, tokens: int = 11, hidden: int = 5, momentum: bool = False, retention: str = "initial",
        padding: bool = False, projection_hidden: int | None = None, **form: Any,
    ) -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(tokens)
        self.leaves: list[Tensor] = []
        self.hidden = {
            False: hidden,
            True: hidden if projection_hidden is None else projection_hidden,
        }
        self.momentum = momentum
        self.inputs = Inputs(*(self.leaf(BATCH, HEADS, DIM, tokens) for _ in range(3)))
        self.generators = self.state(True)
        self.memory = self.state(False)
        self.initial = Initial(None, None)
        if retention == "initial":
            self.initial = Initial(*(self.weights(generating) for generating in (True, False)))
        theta = self.leaf(HEADS) if momentum else None
        self.gates = Gates(*(self.leaf(HEADS) for _ in range(6)), theta)
        self.form = FORM._replace(**form)
        self.valid = None
        if padding:
            self.valid = torch.rand(BATCH, 1, tokens, generator=self.generator) > 0.3

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator) * scale
        self.leaves.append(values.requires_grad_())
        return values

    def weights(self, generating: bool, *lead: int) -> Weights:
        count, hidden = len(GENERATORS) if generating else 1, self.hidden[generating]
        w2 = self.leaf(*lead, HEADS, count, hidden, DIM, scale=0.5)
        return Weights(w2, self.leaf(*lead, HEADS, count, DIM, hidden or DIM, scale=0.5))

    def state(self, generating: bool) -> MemoryState:
        pairs = [self.weights(generating, BATCH) for _ in range(2 + self.momentum)]
        momentum = pairs[2] if self.momentum else (None, None)
        return MemoryState(*pairs[0], *pairs[1], *momentum)

    def run(self, form: Any, position: int = 0) -> tuple[Tensor, MemoryState, MemoryState]:
        return form.self_modifying(
            self.inputs, self.generators, self.memory, self.initial, self.gates, self.form,
            position=position, valid=self.valid,
        )  # fmt: skip

    def everything(self, form: Any, position: int) -> list[Tensor]:
        """Outputs, end states, and the gradients of a random function of them."""
        out, *states = self.run(form, position)
        if self.valid is not None:
            out = out * self.valid.unsqueeze(2)
        found = [out, *(x for state in states for x in state if x is not None)]
        g = torch.Generator().manual_seed(0)
        weighted = [(x * torch.randn(x.shape, dtype=x.dtype, generator=g)).sum() for x in found]
        loss = torch.stack(weighted).sum()
        grads = torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)
        return [*found, *grads]


@pytest.mark.parametrize(
    "options",
    [
        {}, {"update": "dgd"}, {"update": "gd"}, {"objective": "dot"}, {"hidden": 0},
        {"momentum": True}, {"retention": "zero"}, {"per_channel": True}, {"max_erase": None},
        {"padding": True}, {"padding": True, "momentum": True},
        {"projection_hidden": 2}, {"projection_hidden": 0}, {"hidden": 0, "projection_hidden": 4},
        {"momentum": True, "update": "dgd", "objective": "dot", "per_channel": True},
        {"momentum": True, "update": "gd", "retention": "zero"},
        {"hidden": 0, "update": "dgd", "momentum": True, "padding": True},
        {"hidden": 0, "update": "dgd", "objective": "dot", "max_erase": None, "per_channel": True},
        {"hidden": 0, "update": "gd", "retention": "zero"},
        {"update": "dgd", "max_erase": None, "per_channel": True, "retention": "zero"},
    ],
)  # fmt: skip
def test_chunk_parallel_form_equals_token_by_token_form(options: dict[str, Any]) -> None:
    case = Case(**options, projection_chunk=3)
    for fast, slow in zip(case.everything(scan, 5), case.everything(reference, 5), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(
    ("tokens", "memory_chunk", "projection_chunk", "position"),
    [
        (1, 4, 4, 0), (1, 1, 1, 3), (11, 4, 4, 0), (13, 3, 5, 7), (9, 16, 2, 5), (12, 5, 16, 21),
        (6, 1, 3, 0),
    ],
)  # fmt: skip
def test_chunks_may_end_anywhere(
    tokens: int, memory_chunk: int, projection_chunk: int, position: int, momentum: bool
) -> None:
    case = Case(
        tokens, momentum=momentum, memory_chunk=memory_chunk, projection_chunk=projection_chunk
    )
    for fast, slow in zip(
        case.everything(scan, position), case.everything(reference, position), strict=True
    ):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [scan, reference])
def test_anchors_are_the_running_weights_at_the_end_of_the_last_full_chunk(form: Any) -> None:
    """Eq 90: after 10 tokens in chunks of 4 the anchor is the state after token 8."""
    case = Case(10)

    def run(tokens: int) -> tuple[MemoryState, MemoryState]:
        case.inputs = Inputs(*(x[..., :tokens] for x in case.inputs))
        return case.run(form)[1:]

    for after_10, after_8 in zip(run(10), run(8), strict=True):
        torch.testing.assert_close(after_10.anchor_w2, after_8.w2)
        torch.testing.assert_close(after_10.anchor_w1, after_8.w1)
        assert not torch.allclose(after_10.anchor_w2, after_10.w2)


@pytest.mark.parametrize("form", [scan, reference])
def test_padding_leaves_states_as_they_are(form: Any) -> None:
    case = Case(7, momentum=True)
    case.valid = torch.zeros(BATCH, 1, 7, dtype=torch.bool)
    _, generators, memory = case.run(form, position=1)
    for end, start in ((generators, case.generators), (memory, case.memory)):
        for field in ("w2", "w1", "s2", "s1"):
            torch.testing.assert_close(
                getattr(end, field), getattr(start, field), rtol=0, atol=1e-14
            )


@pytest.mark.parametrize("form", [scan, reference])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_linear_memory_is_gated_delta_rule_attention(form: Any, chunk: int) -> None:
    """S_t = alpha_t S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T, read before the write."""
    case = Case(13, hidden=0, retention="zero", memory_chunk=chunk, projection_chunk=16)
    out, _, end = case.run(form)
    start = case.generators
    made = generate(case.inputs, start.w2, start.w1, case.gates, case.form, None)
    for b in range(BATCH):
        for h in range(HEADS):
            s = case.memory.w1[b, h, 0]
            for t in range(13):
                torch.testing.assert_close(out[b, h, :, t], s @ case.inputs.query[b, h, :, t])
                key, value = made.key[b, h, :, t], made.value[b, h, :, t]
                error = s @ key - value
                s = made.log_alpha[b, h, t].exp() * s
                s = s - made.delta[b, h, t] * torch.outer(error, key)
            torch.testing.assert_close(end.w1[b, h, 0], s)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": True}, {"per_channel": True}, {"max_erase": None}, {"update": "dgd"}],
    ids=str,
)
def test_rates_keep_the_conditions_of_stability_whatever_is_generated(
    options: dict[str, Any],
) -> None:
    case = Case(200, max_delta=2.0, max_eta=1.0, **options)
    scale = torch.logspace(-3, 4, 200, dtype=torch.float64)
    eta, alpha = (100 * scale * x for x in case.inputs[:2])
    eta, erase, delta, log_alpha = rates(eta, alpha, case.gates, case.form, None)
    retention = log_alpha.exp().unsqueeze(-2)
    theta = 0.0 if case.gates.theta is None else case.gates.theta.sigmoid()[:, None, None]
    assert (retention <= 1).all()
    assert (eta <= case.form.max_eta * (1 - theta) + 1e-12).all()
    again = eta if case.form.update == "dgd" or case.form.max_erase is None else 0.0
    for erased in (erase.unsqueeze(-2) + again, delta.unsqueeze(-2)):
        assert (erased >= 0).all()
        assert (retention - erased >= -1 - 1e-12).all()


def test_columns_that_memories_see_and_hold_are_no_longer_than_one() -> None:
    case = Case(5)
    state = case.generators
    made = generate(case.inputs, state.anchor_w2, state.anchor_w1, case.gates, case.form, None)
    for columns in (made.key, made.value):
        norms = columns.norm(dim=-2)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-4, atol=1e-4)
    for size in (1e-6, 1.0, 1e6):
        seen = features(case.memory.w2, size * case.inputs.key.unsqueeze(2), case.form.memory_floor)
        assert (seen.norm(dim=-2) <= 1).all()
