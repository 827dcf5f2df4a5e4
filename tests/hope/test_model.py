"""Hope as a language model: exact, causal, stateless between calls, trainable everywhere."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepopt.hope import Hope, HopeConfig, HopeState, generate
from deepopt.hope.state import INTEGERS

SMALL: dict[str, Any] = {
    "vocab_size": 11, "dim": 8, "heads": 2, "layers": 2, "memory_chunk": 4, "projection_chunk": 6,
    "max_inner_lr": 0.3, "cms_chunks": (8, 16),
}  # fmt: skip


def make(**options: Any) -> Hope:
    """A small model whose head is not zero, so that logits and gradients say something."""
    torch.manual_seed(0)
    model = Hope(HopeConfig(**{**SMALL, **options})).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def text(tokens: int, batch: int = 2) -> Tensor:
    return torch.randint(11, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pieces", [[1] * 19, [2, 13, 4], [18, 1]])
def test_pieces_equal_the_whole(pieces: list[int]) -> None:
    model, tokens = make(), text(19)
    state, logits = None, []
    for piece in tokens.split(pieces, 1):
        out = model(piece, state=state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=0, atol=1e-10)


def test_the_future_does_not_move_earlier_logits() -> None:
    model, tokens = make(), text(17)
    for cut in (1, 6, 11, 16):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1) % 11
        before, after = model(tokens).logits, model(changed).logits
        torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=0, atol=1e-12)
        assert not torch.allclose(before[:, cut], after[:, cut])


def test_sequences_of_a_batch_do_not_meet() -> None:
    model, tokens = make(), text(9, batch=3)
    together = model(tokens).logits
    for i in range(3):
        torch.testing.assert_close(
            model(tokens[i : i + 1]).logits, together[i : i + 1], rtol=0, atol=1e-12
        )


def test_calls_and_modes_do_not_change_the_output() -> None:
    model, tokens = make(), text(15)
    first = model(tokens).logits
    assert torch.equal(first, model(tokens).logits)
    assert torch.equal(first, model.eval()(tokens).logits)


@pytest.mark.parametrize("momentum", [True, False])
def test_every_parameter_learns_from_the_loss(momentum: bool) -> None:
    model, tokens = make(momentum=momentum), text(20)
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_every_memory_learns_from_the_loss() -> None:
    model, tokens = make(), text(20)
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    stacks = {n: p.grad for n, p in model.named_parameters() if n.endswith((".w1", ".w2"))}
    assert len(stacks) == 8
    for grad in stacks.values():
        assert grad is not None
        assert (grad.abs().amax((-2, -1)) > 0).all()


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model, tokens = Hope(HopeConfig(**SMALL)), text(12)
    assert model(tokens[:, :-1], tokens[:, 1:]).loss.item() == pytest.approx(math.log(11), abs=1e-6)
    assert model(tokens).loss is None


def test_loss_is_the_mean_cross_entropy() -> None:
    model, tokens = make(), text(12)
    out = model(tokens[:, :-1], tokens[:, 1:])
    picked = out.logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
    torch.testing.assert_close(out.loss, -picked.mean())


def test_gradients_agree_with_finite_differences() -> None:
    model, tokens = make(), text(10, batch=1)
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params)
    g = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=g) for p in params]
    slope = sum((a * b).sum() for a, b in zip(grads, directions, strict=True))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(params, directions, strict=True):
                p.add_(d, alpha=step)
            value = model(tokens[:, :-1], tokens[:, 1:]).loss
            for p, d in zip(params, directions, strict=True):
                p.sub_(d, alpha=step)
        return value

    torch.testing.assert_close((moved(1e-5) - moved(-1e-5)) / 2e-5, slope, rtol=1e-5, atol=1e-8)


def test_a_short_training_learns_a_pattern() -> None:
    torch.manual_seed(0)
    model = Hope(HopeConfig(vocab_size=4, dim=16, layers=1, heads=2, cms_chunks=(16,)))
    tokens = torch.arange(33).remainder(4).expand(2, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2


def test_memories_stay_bounded_over_a_long_text() -> None:
    torch.manual_seed(0)
    model = Hope(HopeConfig(dim=32, layers=1, heads=2))
    tokens = torch.randint(256, (1, 2048), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        state = model(tokens).state.blocks[0]
    for x in (*state.generators[:4], *state.memory[:4]):
        assert x.isfinite().all()
        assert x.abs().max() < 10


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 0}, {"layers": -1}, {"heads": 3}, {"memory_hidden": -1}, {"memory_chunk": 0},
        {"projection_chunk": 1.5}, {"max_inner_lr": 0.0}, {"conv_width": 0}, {"cms_chunks": (4, 6)},
        {"cms_expansion": 0}, {"heads": 4}, {"update": "sgd"}, {"objective": "l1"},
        {"retention": "none"}, {"max_delta": 2.5}, {"max_erase": 0.0}, {"mixer": "mamba"},
        {"cms_variant": "parallel"}, {"cms_expansion": math.inf}, {"turns": "false"},
        {"momentum": 1}, {"per_channel": None}, {"projections": "no"}, {"recompute": 0},
        {"layers": True}, {"memory_hidden": True}, {"max_delta": True}, {"cms_expansion": True},
        {"cms_chunks": 8}, {"cms_chunks": (True, 8)},
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    name = "dim" if options == {"heads": 3} else next(iter(options))
    with pytest.raises(ValueError, match=f"{name}="):
        HopeConfig(**{**SMALL, **options})


@pytest.mark.parametrize("config", [128, {"dim": 8}, HopeConfig])
def test_what_is_no_configuration_is_named(config: Any) -> None:
    with pytest.raises(TypeError, match=f"config is of type {type(config).__name__}: must be a"):
        Hope(config)


def test_bad_inputs_are_named() -> None:
    model, tokens = make(), text(4)
    with pytest.raises(ValueError, match="tokens has shape"):
        model(tokens[0])
    with pytest.raises(ValueError, match="tokens has shape"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match="tokens has shape"):
        model(tokens[:0])
    with pytest.raises(ValueError, match="targets has shape"):
        model(tokens, tokens[:, 1:])
    other = make(mixer="attention")(tokens).state
    with pytest.raises(ValueError, match="AttentionState, the blocks have TitansState"):
        model(tokens, state=other)
    state = model(tokens).state
    with pytest.raises(ValueError, match="state has 1 blocks"):
        model(tokens, state=HopeState(state.blocks[:1]))
    with pytest.raises(ValueError, match="state belongs to a batch of 2"):
        model(tokens[:1], state=state)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_tokens_and_targets_may_have_any_integer_type(dtype: torch.dtype) -> None:
    model, tokens = make(), text(9)
    expected = model(tokens, tokens)
    found = model(tokens.to(dtype), tokens.to(dtype))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_what_is_no_tensor_or_no_state_is_named() -> None:
    model, tokens = make(), text(4)
    with pytest.raises(TypeError, match="tokens is of type str: must be a tensor of integers"):
        model("text")
    with pytest.raises(TypeError, match="targets is of type list: must be a tensor of integers"):
        model(tokens, [[1]])
    for name in ("mask", "starts"):
        with pytest.raises(TypeError, match=f"{name} is of type list: must be a bool tensor"):
            model(tokens, **{name: [[True] * 4] * 2})
    with pytest.raises(TypeError, match=r"state is of type dict: .* HopeState.from_state_dict"):
        model(tokens, state=model(tokens).state.state_dict())


@pytest.mark.parametrize("token", [11, 255, -1])
def test_tokens_outside_of_the_vocabulary_are_named(token: int) -> None:
    model, tokens = make(), text(4)
    wrong = tokens.clone()
    wrong[1, 2] = token
    with pytest.raises(ValueError, match=rf"tokens has {token}: must lie in 0 \.\.\. 10"):
        model(wrong)
    with pytest.raises(ValueError, match=rf"targets has {token}: must lie in 0 \.\.\. 10"):
        model(tokens, wrong)


PRINTED: dict[str, Any] = {
    field.name: getattr(HopeConfig.paper(), field.name)
    for field in dataclasses.fields(HopeConfig)
    if getattr(HopeConfig.paper(), field.name) != getattr(HopeConfig(), field.name)
}
OPTIONS: list[dict[str, Any]] = [
    {}, {"update": "dgd"}, {"update": "gd"}, {"objective": "dot"}, {"memory_hidden": 0},
    {"memory_hidden": 9}, {"momentum": True}, {"retention": "zero"}, {"per_channel": True},
    {"max_erase": None}, {"projections": False}, {"memory_chunk": 5, "projection_chunk": 2},
    {"projection_hidden": 5},
    {"cms_variant": "nested"}, {"cms_variant": "independent"}, {"cms_expansion": 0.7},
    {"mixer": "attention"}, {"mixer": "attention", "cms_variant": "nested"},
    {"mixer": "attention", "cms_variant": "independent", "recompute": True},
    {"turns": False}, PRINTED,
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_exact_causal_and_trained_through_every_parameter(
    options: dict[str, Any],
) -> None:
    model, tokens = make(**options), text(20)
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 11
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=0, atol=1e-12)
    assert torch.equal(before, model.eval()(tokens).logits)
    state, logits = None, []
    for piece in tokens.split([1, 7, 1, 11], 1):
        out = model(piece, state=state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_step_by_step_logits_equal_the_parallel_ones_in_float32(mixer: str, variant: str) -> None:
    model, tokens = make(mixer=mixer, cms_variant=variant).float(), text(40)
    for param in model.parameters():  # changes of nested levels start from zero
        param.data.add_(0.05 * torch.randn_like(param))
    # Logits of one to four in size. Those of ten, where float32 itself is 1e-6 apart, differ by
    # up to 3e-5, and both ways are as far from float64.
    model.head.weight.data.mul_(model.config.dim**-0.5)
    state, logits = None, []
    for token in tokens.split(1, 1):
        out = model(token, state=state)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_autocast_to_bfloat16_is_close_and_keeps_the_dtype_of_the_state(
    mixer: str, variant: str
) -> None:
    model, tokens = make(mixer=mixer, cms_variant=variant).float(), text(20)
    expected = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, tokens)
        pieces = [model(tokens[:, :9])]
        pieces.append(model(tokens[:, 9:], state=pieces[0].state))
    kept = [x for x in found.state.state_dict().values() if isinstance(x, Tensor)]
    assert {x.dtype for x in kept} == {torch.float32}
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.02, atol=0)
    whole = torch.cat([piece.logits for piece in pieces], 1)
    torch.testing.assert_close(whole, found.logits, rtol=0, atol=0.15)
    found.loss.backward()
    grads = [param.grad for param in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


def test_a_model_whose_matrices_are_packed_by_a_quantizer_decodes() -> None:
    class Packed(torch.nn.Module):
        """As a quantized Linear: no `weight` that is a tensor."""

        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.packed = linear.weight.detach().clone()

        def weight(self) -> Tensor:
            return self.packed

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.packed)

    model, tokens = make(), text(20)
    expected, continued = model(tokens).logits, generate(model, tokens, 5, temperature=0)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Packed(child))
    torch.testing.assert_close(model(tokens).logits, expected)
    assert torch.equal(generate(model, tokens, 5, temperature=0), continued)


def test_hope_attention_is_exported_once_for_texts_of_every_length() -> None:
    class Logits(torch.nn.Module):
        def __init__(self, model: Hope) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.model(tokens).logits

    model = make(mixer="attention", layers=1)
    length = {1: torch.export.Dim("tokens", max=4096)}
    exported = torch.export.export(Logits(model), (text(8),), dynamic_shapes=(length,)).module()
    for tokens in (1, 5, 33):
        torch.testing.assert_close(exported(text(tokens)), model(text(tokens)).logits)


def test_recomputing_activations_changes_no_number() -> None:
    tokens = text(20)
    found = []
    for recompute in (False, True):
        model = make(recompute=recompute)
        state = model(tokens).state
        loss = model(tokens[:, :-1], tokens[:, 1:], state=state).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_activations_are_recomputed_with_the_weights_of_the_forward_pass(mixer: str) -> None:
    """`functional_call` takes its weights back before the backward pass."""
    tokens, found = text(20), []
    for recompute in (False, True):
        model = make(mixer=mixer, recompute=recompute)
        others = {n: (1.1 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
        loss = torch.func.functional_call(model, others, (tokens, tokens)).loss
        found.append([loss, *torch.autograd.grad(loss, list(others.values()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_printed_form_has_the_papers_parts() -> None:
    """Eq 83 to Eq 91: one static projection, vectors for eta, erased by eta, pulled to zero."""
    config = HopeConfig.paper(dim=8, heads=2)
    assert (config.update, config.objective, config.retention) == ("dgd", "l2", "zero")
    assert (config.max_erase, config.per_channel, config.momentum) == (None, True, False)
    names = {n for n, p in Hope(config).blocks[0].titans.named_parameters() if p.ndim == 2}
    assert names == {"query.weight", "gate.weight", "output.weight"}
    assert HopeConfig.paper(momentum=True, max_erase=1.0).momentum


@pytest.fixture
def _twice_differentiable() -> Iterator[None]:
    """torch's fused attention has no second derivative; its plain one has."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("_twice_differentiable")
@pytest.mark.parametrize("options", [{}, {"mixer": "attention"}, {"recompute": True}], ids=str)
def test_gradients_of_single_texts_and_second_derivatives(options: dict[str, Any]) -> None:
    """torch.func on the whole model: functional_call, grad, vmap, and double backward."""
    model, tokens = make(layers=1, **options), text(7, batch=3)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (tokens, tokens)).loss

    each = torch.func.vmap(torch.func.grad(lambda p, t: loss(p, t[None])), (None, 0))(
        params, tokens
    )
    for i in range(3):
        alone = torch.autograd.grad(
            model(tokens[i : i + 1], tokens[i : i + 1]).loss, list(model.parameters())
        )
        for (name, grad), expected in zip(each.items(), alone, strict=True):
            torch.testing.assert_close(grad[i], expected, msg=name)

    def slope(step: float) -> Tensor:
        moved = {n: p + step for n, p in params.items()}
        grads = torch.func.grad(loss)(moved, tokens)
        return torch.stack([g.sum() for g in grads.values()]).sum()

    leaves = list(model.parameters())
    grads = torch.autograd.grad(model(tokens, tokens).loss, leaves, create_graph=True)
    total = torch.stack([g.sum() for g in grads]).sum()
    second = torch.stack([g.sum() for g in torch.autograd.grad(total, leaves)]).sum()
    numeric = (slope(1e-6) - slope(-1e-6)) / 2e-6
    torch.testing.assert_close(second, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own decompositions
@pytest.mark.parametrize("options", [{}, {"update": "dgd"}, {"memory_hidden": 0}], ids=str)
def test_forward_mode_derivatives_are_those_of_backward_mode(options: dict[str, Any]) -> None:
    model, tokens = make(layers=1, **options), text(7, batch=2)
    params = {n: p.detach() for n, p in model.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in params.items()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (tokens, tokens)).loss

    _, found = torch.func.jvp(loss, (params,), (tangents,))
    grads = torch.func.grad(loss)(params)
    expected = torch.stack([(grads[n] * tangents[n]).sum() for n in params]).sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
