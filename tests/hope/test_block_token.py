"""One token through a block as one operator: the numbers of the modules, or the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from deepopt.hope import Hope, HopeConfig, block_token
from deepopt.hope.block import HopeBlock
from deepopt.hope.cms import CMS, CMSLevel
from deepopt.hope.convolution import CausalConv
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


def tensors_of(state: Any) -> list[Tensor]:
    return [x for x in tree_leaves(state) if isinstance(x, Tensor)]


@pytest.mark.parametrize(
    "options", [{}, {"update": "gd"}, {"memory_hidden": 0}, {"momentum": True}], ids=str
)
def test_a_state_stays_what_it_is_when_weights_change(options: dict[str, Any]) -> None:
    made = model(memory_chunk=3, projection_chunk=5, **options)
    weights = {name: x.clone() for name, x in made.state_dict().items()}
    state = None
    with torch.no_grad():
        for token in torch.randint(11, (1, 7)).split(1, 1):
            state = made(token, state=state).state
            kept = [x.clone() for x in tensors_of(state)]
            for param in made.parameters():
                param.add_(1.0)
            assert all(map(torch.equal, tensors_of(state), kept))
            made.load_state_dict(weights)
    tokens = torch.randint(11, (1, 4))
    for _ in range(2):
        made(tokens, tokens, state).loss.backward()
        torch.optim.SGD(made.parameters(), 0.01).step()


@needs_kernel
@torch.no_grad()
def test_a_state_can_be_kept_in_buffers_that_are_filled_in_place() -> None:
    made, tokens = model(memory_chunk=3, projection_chunk=5), torch.randint(11, (1, 12))
    expected, _ = decoded(made, tokens)
    state, logits = made(tokens[:, :1]).state, []
    for token in tokens[:, 1:].split(1, 1):
        out = made(token, state=state)
        logits.append(out.logits)
        state = tree_map(
            lambda buffer, new: buffer.copy_(new) if isinstance(new, Tensor) else new,
            state, out.state,
        )  # fmt: skip
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 1:], rtol=1e-12, atol=1e-12)


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


class TwiceTheLevel(CMSLevel):
    def forward(self, x: Tensor) -> Tensor:
        return x + 2 * self.branch(x)


class NegatedConv(CausalConv):
    def forward(self, *args: Any) -> tuple[Tensor, Tensor]:
        out, tail = super().forward(*args)
        return -out, tail


def with_class(module: nn.Module, other: type) -> None:
    module.__class__ = other


def levels_side_by_side(block: HopeBlock) -> None:
    block.cms = CMS(24, 48, (8, 16), "independent").double()


def without_levels(block: HopeBlock) -> None:
    block.cms = nn.Identity()  # type: ignore[assignment]


def without_a_level(block: HopeBlock) -> None:
    block.cms.levels[1] = nn.Identity()


def without_a_norms_weight(block: HopeBlock) -> None:
    block.norm = nn.RMSNorm(24, elementwise_affine=False)


def another_branch(block: HopeBlock) -> None:
    level: Any = block.cms.levels[0]
    level.branch = lambda x: 0.5 * x


def blunt_turns(block: HopeBlock) -> None:
    block.mixer.turns.sharpness = 1.0


def a_function_for_a_norm(block: HopeBlock) -> None:
    norm = block.norm
    del block.norm
    block.__dict__["norm"] = lambda x: 2 * norm(x)


def a_plain_tensor(block: HopeBlock) -> None:
    up: Any = block.cms.levels[0].up
    weight = up.weight.detach()
    del up.weight
    up.weight = weight


CHANGES: dict[str, Callable[[HopeBlock], None]] = {
    "a level of another class": lambda b: with_class(b.cms.levels[0], TwiceTheLevel),
    "a convolution of another class": lambda b: with_class(b.mixer.key_conv, NegatedConv),
    "levels side by side": levels_side_by_side,
    "no levels": without_levels,
    "one level less": without_a_level,
    "a norm without a weight": without_a_norms_weight,
    "another method of a level": another_branch,
    "blunt turns": blunt_turns,
    "a function for a norm": a_function_for_a_norm,
    "a plain tensor for a weight": a_plain_tensor,
}


@needs_kernel
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_what_has_been_replaced_is_not_bypassed(
    change: Callable[[HopeBlock], None], calls: list[Any]
) -> None:
    made, tokens = model(), torch.randint(11, (1, 3))
    for block in made.blocks:
        change(block)
    logits, _ = decoded(made, tokens)
    assert not calls
    torch.testing.assert_close(logits, made(tokens).logits, rtol=1e-10, atol=1e-11)


@needs_kernel
@torch.no_grad()
def test_methods_replaced_on_a_class_and_global_hooks_are_not_bypassed(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tokens = model(), torch.randint(11, (1, 3))
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    decoded(made, tokens)
    hook.remove()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: -(x @ self.weight.mT))
        decoded(made, tokens)
    assert not calls
    decoded(made, tokens)
    assert calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own decompositions
@torch.no_grad()
def test_tangents_pass_through_a_decoded_token() -> None:
    block = model().blocks[0]
    state = block.mixer.initial_state(2)
    x, tangent = torch.randn(2, 2, 1, 24, dtype=torch.float64)

    def answer(x: Tensor) -> Tensor:
        _, after = block(x, state)
        return block(x, after)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(answer(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6 * tangent
    expected = (answer(x + step) - answer(x - step)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gate", ["eta", "alpha", "erase", "delta"])
@torch.no_grad()
def test_a_gate_that_is_not_a_number_shows(gate: str) -> None:
    made, tokens = model(), torch.randint(11, (1, 6))
    for block in made.blocks:
        getattr(block.mixer, f"{gate}_bias").fill_(torch.nan)
    for logits in (decoded(made, tokens)[0], made(tokens).logits):
        assert not logits[:, 2:].isfinite().any()


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
