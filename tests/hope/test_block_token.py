"""One token through a block as one operator: the numbers of the modules, or the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepopt.hope import Hope, HopeConfig, block_token
from deepopt.hope.model import HopeOutput
from deepopt.ops import backend
from deepopt.ops.operator import UNAVAILABLE

needs_kernel = pytest.mark.skipif("cpu" in UNAVAILABLE, reason=UNAVAILABLE.get("cpu", ""))


def model(**options: Any) -> Hope:
    torch.manual_seed(0)
    made = Hope(HopeConfig(vocab_size=11, dim=24, layers=2, heads=3, **options)).double()
    for param in made.parameters():  # nothing at a special value, as the head of zeros is
        param.data.add_(0.1 * torch.randn_like(param))
    return made


def decoded(made: Hope, tokens: Tensor) -> tuple[Tensor, HopeOutput]:
    logits, state = [], None
    for token in tokens.split(1, 1):
        out = made(token, state=state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1), out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the operator is called with."""
    seen: list[Any] = []
    plain = block_token.block_token

    class Watched:
        backend_for, overload = plain.backend_for, plain.overload

        def __call__(self, given: Any) -> Any:
            seen.append(given)
            return plain(given)

    monkeypatch.setattr(block_token, "block_token", Watched())
    return seen


@needs_kernel
@pytest.mark.parametrize(
    "options",
    [
        {}, {"retention": "zero"}, {"turns": False}, {"conv_width": 1}, {"cms_chunks": (8,)},
        {"memory_chunk": 3, "projection_chunk": 5}, {"memory_hidden": 7, "projection_hidden": 2},
    ],
    ids=str,
)  # fmt: skip
def test_decoding_gives_the_numbers_of_the_modules(
    options: dict[str, Any], calls: list[Any]
) -> None:
    made, tokens = model(**options), torch.randint(11, (2, 12))
    with torch.no_grad():
        logits, out = decoded(made, tokens)
        assert len(calls) == 2 * 12, "one call per block and token"
        with backend("reference"):
            expected, last = decoded(made, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(
        out.state.state_dict().values(), last.state.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@needs_kernel
@torch.no_grad()
def test_the_operator_keeps_its_schema_and_has_a_fake_kernel(calls: list[Any]) -> None:
    decoded(model(), torch.randint(11, (2, 1)))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(block_token.block_token.overload, tuple(calls[0]), test_utils=checks)


@needs_kernel
@torch.no_grad()
def test_a_state_can_be_used_twice() -> None:
    made, tokens = model(), torch.randint(11, (2, 12))
    _, out = decoded(made, tokens)
    first, second = (made(tokens[:, :1], state=out.state).logits for _ in range(2))
    assert torch.equal(first, second)


class Doubled(nn.Linear):
    """An adapter of the simplest kind."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@needs_kernel
@torch.no_grad()
def test_adapters_and_hooks_are_not_bypassed(calls: list[Any]) -> None:
    tokens = torch.randint(11, (1, 3))
    hooked, adapted, patched = model(), model(), model()
    for block in hooked.blocks:
        block.cms.levels[0].up.register_forward_hook(lambda module, args, out: 2 * out)
    for block in adapted.blocks:
        plain = block.cms.levels[0].up
        block.cms.levels[0].up = Doubled(24, plain.out_features, bias=False).double()
        block.cms.levels[0].up.weight = plain.weight
    for block in patched.blocks:
        up = block.cms.levels[0].up
        up.forward = lambda x, plain=up.forward: 2 * plain(x)
    outputs = [decoded(each, tokens)[0] for each in (hooked, adapted, patched)]
    assert not calls
    assert torch.equal(*outputs[:2])
    assert torch.equal(*outputs[1:])
    assert not torch.allclose(outputs[0], decoded(model(), tokens)[0])


@needs_kernel
@pytest.mark.parametrize(
    "options",
    [
        {"update": "gd"}, {"objective": "dot"}, {"momentum": True}, {"projections": False},
        {"per_channel": True}, {"max_erase": None}, {"memory_hidden": 0},
        {"cms_variant": "nested"}, {"cms_variant": "independent"}, {"mixer": "attention"},
    ],
    ids=str,
)  # fmt: skip
@torch.no_grad()
def test_other_forms_are_left_to_the_modules(options: dict[str, Any], calls: list[Any]) -> None:
    decoded(model(**options), torch.randint(11, (1, 2)))
    assert not calls


def test_gradients_are_left_to_the_modules(calls: list[Any]) -> None:
    logits, _ = decoded(model(), torch.randint(11, (1, 2)))
    assert logits.requires_grad
    assert not calls
