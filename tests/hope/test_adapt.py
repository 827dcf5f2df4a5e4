"""Levels learn while they read: after a prediction, at their own pace, and as long as asked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deepopt
from deepopt.hope import Hope, HopeConfig, Reader, adapt, adaptation, generate

SMALL: dict[str, Any] = {
    "vocab_size": 7, "dim": 8, "heads": 2, "layers": 2, "memory_chunk": 4, "projection_chunk": 4,
    "max_inner_lr": 0.3, "cms_chunks": (4, 8),
}  # fmt: skip
VARIANTS = [
    {"mixer": mixer, "cms_variant": variant}
    for mixer in ("titans", "attention")
    for variant in ("sequential", "nested", "independent")
]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.5),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.03),
    "DeepMomentum": lambda groups: deepopt.DeepMomentum(groups, lr=0.03),
    "DeltaMomentum": lambda groups: deepopt.DeltaMomentum(groups, lr=0.3),
    "M3": lambda groups: deepopt.M3(groups, lr=0.03),
}


def make(**options: Any) -> Hope:
    torch.manual_seed(0)
    model = Hope(HopeConfig(**{**SMALL, **options})).double()
    torch.nn.init.normal_(model.head.weight)
    return model


def text(tokens: int = 29, batch: int = 1) -> Tensor:
    return torch.randint(7, (batch, tokens), generator=torch.Generator().manual_seed(1))


def weights(model: Hope) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def moved(model: Hope, before: dict[str, Tensor]) -> set[str]:
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def losses(options: dict[str, Any], tokens: Tensor, name: str = "AdamW", **more: Any) -> Tensor:
    return make(**options).adapt(tokens, optimizer=OPTIMIZERS[name], **more).losses


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_token_is_predicted_before_it_or_a_later_one_is_learned_from(
    options: dict[str, Any],
) -> None:
    """Whatever comes from t on, earlier losses stay, and the chances of all tokens at t sum to 1:
    the weights that predict a token have not seen it, also where a chunk begins or ends."""
    tokens = text()
    whole = losses(options, tokens)
    for t in (3, 4, 5, 8, 9, 16, 17, 28):
        found = []
        for token in range(7):
            changed = tokens.clone()
            changed[0, t] = token
            changed[0, t + 1 :] = (tokens[0, t + 1 :] + token) % 7
            found.append(losses(options, changed))
            assert torch.equal(found[-1][0, 1:t], whole[0, 1:t])
        chances = torch.stack([(-x[0, t]).exp() for x in found])
        assert chances.sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("pieces", [[1] * 29, [2, 13, 0, 14], [28, 1]], ids=len)
def test_a_text_in_pieces_is_the_whole_text(options: dict[str, Any], pieces: list[int]) -> None:
    whole, cut = make(**options), make(**options)
    expected = whole.adapt(text(), optimizer=OPTIMIZERS["AdamW"])
    found = cut.adapt(iter(text().split(pieces, 1)), optimizer=OPTIMIZERS["AdamW"])
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=1e-5, equal_nan=True)
    assert found.updates == expected.updates == 7
    for (name, a), b in zip(whole.state_dict().items(), cut.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert found.losses[0, 0].isnan()


def test_a_long_chunk_is_learned_from_in_windows_and_the_update_is_the_mean_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deepopt.hope.reader.WINDOW", 3)
    tokens, options = text(23), {"layers": 1, "mixer": "attention"}
    model, twin = make(**options), make(**options)
    reader = model.adapt(tokens.split([5, 1, 17], 1), levels=[1], optimizer=OPTIMIZERS["SGD"])
    assert reader.updates == 2  # chunks of 8 within 22 predictions
    state, grads = None, []
    level = twin.blocks[0].cms.levels[1]
    for first, last in ((0, 3), (3, 6), (6, 8)):
        out = twin(tokens[:, first:last], tokens[:, first + 1 : last + 1], state=state)
        state = out.state.detach()
        grads.append(torch.autograd.grad(out.loss, level.up.weight)[0])
    windowed, once = make(**options), make(**options)
    windowed.adapt(tokens[:, :9], levels=[1], optimizer=OPTIMIZERS["SGD"])
    monkeypatch.undo()
    once.adapt(tokens[:, :9], levels=[1], optimizer=OPTIMIZERS["SGD"])
    expected = level.up.weight - 0.5 * torch.stack(grads).mean(0)
    found = windowed.blocks[0].cms.levels[1].up.weight
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(found, once.blocks[0].cms.levels[1].up.weight)


def test_two_calls_from_the_same_weights_give_the_same_losses_and_modes_do_not_matter() -> None:
    model = make()
    found = []
    for mode in (True, True, False):
        model.train(mode)
        with model.adaptation():
            found.append(model.adapt(text()).losses[:, 1:])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_losses_are_those_of_plain_reading_until_the_first_update() -> None:
    model, tokens = make(), text()
    logits = model(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
    found = model.adapt(tokens, optimizer=OPTIMIZERS["SGD"]).losses[0, 1:]
    torch.testing.assert_close(found[:4], expected[:4], rtol=0, atol=1e-6)
    assert not torch.isclose(found[4:8], expected[4:8]).any()
    rate_of_zero = make().adapt(tokens, optimizer=lambda g: deepopt.DeepMomentum(g, lr=0.0))
    torch.testing.assert_close(rate_of_zero.losses[0, 1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_repeated_text_is_learned_with_any_optimizer(name: str) -> None:
    model = make(mixer="attention", layers=1)
    tokens = torch.tensor([0, 3, 1, 5, 2, 6]).repeat(40)[None]
    still = F.cross_entropy(model(tokens[:, :-1]).logits[0], tokens[0, 1:], reduction="none")
    found = model.adapt(tokens, optimizer=OPTIMIZERS[name]).losses[0]
    assert found[-60:].mean() < 0.8 * still[-60:].mean()


def test_levels_learn_at_their_own_chunks_and_nothing_else_does() -> None:
    model, tokens = make(), text(13)
    reader, start = Reader(model, optimizer=OPTIMIZERS["SGD"]), weights(make())
    for t, expected in ((4, set()), (5, {"0"}), (8, {"0"}), (9, {"0", "1"})):
        reader.read(tokens[:, reader.losses.shape[1] if reader._losses else 0 : t])
        names = moved(model, start)
        assert {name.split(".")[4] for name in names} == expected
        assert all(".cms.levels." in name for name in names)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(("levels", "expected"), [([0], {"0"}), ([1], {"1"}), (None, {"0", "1"})])
def test_the_levels_that_are_chosen_learn(levels: list[int] | None, expected: set[str]) -> None:
    model = make()
    before = weights(model)
    model.adapt(text(), levels=levels, optimizer=OPTIMIZERS["SGD"])
    assert {name.split(".")[4] for name in moved(model, before)} == expected


def test_another_chunk_scales_all_levels() -> None:
    model = make()
    before = weights(model)
    reader = model.adapt(text(4), chunk=3, optimizer=OPTIMIZERS["SGD"])
    assert {name.split(".")[4] for name in moved(model, before)} == {"0"}
    reader.read(text(3))
    assert {name.split(".")[4] for name in moved(model, before)} == {"0", "1"}
    assert reader.updates == 2


@pytest.mark.parametrize(("batch", "updates"), [(2, 14), (3, 21), (8, 28)])
def test_tokens_of_all_texts_of_a_batch_count(batch: int, updates: int) -> None:
    reader = make().adapt(text(29, batch))
    assert reader.losses.shape == (batch, 29)
    assert reader.updates == updates  # 28 batch predictions; no more often than once per position


def test_a_nested_level_starts_again_where_the_slower_one_has_learned() -> None:
    model = make(cms_variant="nested")
    level = model.blocks[0].cms.levels[0]
    reader = model.adapt(text(5))
    assert level.up_change.any()
    reader.read(text(4))
    assert not level.up_change.any()
    reader.read(text(4))
    assert level.up_change.any()


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_weights_are_what_they_were_also_after_an_exception(mixer: str) -> None:
    model = make(mixer=mixer, cms_variant="nested")
    before, logits = weights(model), model(text()).logits
    with model.adaptation():
        model.adapt(text(), optimizer=OPTIMIZERS["SGD"])
        assert moved(model, before)
    assert not moved(model, before)
    with pytest.raises(ValueError, match="tokens has 2 texts"), adaptation(model):
        model.adapt([text(), text(3, 2)], optimizer=OPTIMIZERS["SGD"])
    assert not moved(model, before)
    assert torch.equal(model(text()).logits, logits)


def test_an_exception_is_not_hidden_where_a_module_was_exchanged() -> None:
    model = make()
    before = weights(model)

    def fail() -> None:
        with model.adaptation():
            model.adapt(text(), optimizer=OPTIMIZERS["SGD"])
            model.head = torch.nn.Linear(8, 9, bias=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert moved(model, {**before, "head.weight": torch.zeros(9, 8)}) == {"head.weight"}


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_a_text_is_continued_from_what_was_read(mixer: str) -> None:
    model = make(mixer=mixer)
    reader = model.adapt(text(), optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    found = generate(model, reader.last, 9, state=reader.state, temperature=0)
    expected = generate(model, text(), 9, temperature=0)
    assert torch.equal(found[:, 1:], expected[:, 29:])
    assert not any(p.grad_fn for p in reader.state.state_dict().values() if isinstance(p, Tensor))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_model_learns_also_where_the_caller_has_turned_gradients_off(off: Any) -> None:
    expected = losses({}, text())
    model = make()
    with off():
        found = model.adapt(text(), optimizer=OPTIMIZERS["AdamW"]).losses
    assert torch.equal(found[:, 1:], expected[:, 1:])


def test_nothing_read_has_no_losses() -> None:
    assert make().adapt([]).losses.numel() == 0
    assert make().adapt(text()[:, :0]).losses.shape == (1, 0)


def test_tokens_that_a_model_would_refuse_are_refused() -> None:
    for wrong in (text().double(), text() > 3, text()[0], text()[None]):
        with pytest.raises(ValueError, match=r"tokens has shape .* must be integers of shape"):
            make().adapt(wrong)


@pytest.mark.parametrize("token", [7, -1, -100])  # torch's cross entropy ignores the last
def test_a_piece_with_a_token_outside_of_the_vocabulary_is_not_read(token: int) -> None:
    model, whole = make(), make()
    with pytest.raises(ValueError, match=rf"tokens has {token}: must lie in 0 \.\.\. 6"):
        model.adapt(torch.tensor([[token, 1, 2]]))
    reader, expected = (Reader(m, optimizer=OPTIMIZERS["AdamW"], chunk=4) for m in (model, whole))
    reader.read(text(10))
    before = weights(model)
    with pytest.raises(ValueError, match=rf"tokens has {token}: must lie in 0 \.\.\. 6"):
        reader.read(torch.cat([text(10), torch.tensor([[token]])], 1))
    assert not moved(model, before)
    reader.read(text(7))
    expected.read(text(10))
    expected.read(text(7))
    assert torch.equal(reader.losses[:, 1:], expected.losses[:, 1:])
    assert reader.updates == expected.updates


def test_weights_that_something_else_changed_inside_a_chunk_are_named() -> None:
    model = make()
    reader = Reader(model, optimizer=OPTIMIZERS["SGD"], chunk=8)
    with model.adaptation():
        reader.read(text(11))
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"weights have changed .* go on with a new reader"):
        reader.read(text(11))
    assert not moved(model, before)
    for tokens, waits in ((9, True), (17, False)):  # the slow level's chunk ends at 16
        other = Reader(model, optimizer=OPTIMIZERS["SGD"], chunk=8)
        other.read(text(tokens))
        Reader(model, optimizer=OPTIMIZERS["SGD"], chunk=8).read(text(9))
        if waits:
            with pytest.raises(RuntimeError, match="weights have changed"):
                other.read(text(9))
        else:
            other.read(text(9))


def test_weights_that_something_else_changed_between_two_windows_are_named() -> None:
    model = make(cms_chunks=(512,))
    reader = Reader(model, optimizer=OPTIMIZERS["SGD"])
    with model.adaptation():
        reader.read(text(257))  # the first of two windows
        with torch.no_grad():
            model.head.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="weights have changed"):
        reader.read(text(9))


def test_one_autocast_around_a_text_learns_as_one_around_each_piece() -> None:
    """torch keeps narrow copies of the weights until the outermost autocast ends."""
    found = []
    for around in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
        model = make().float()
        reader = Reader(model, optimizer=OPTIMIZERS["AdamW"])
        with around:
            for piece in text(41).split(4, 1):
                with torch.autocast("cpu", torch.bfloat16):
                    reader.read(piece)
        found.append(reader.losses[:, 1:])
    torch.testing.assert_close(*found, atol=0.1, rtol=0)  # roundings differ; else 7.4


def test_a_frozen_level_keeps_its_number_and_is_refused_by_it() -> None:
    model = make()
    before = weights(model)
    for name, param in model.named_parameters():
        param.requires_grad_(".levels.0." not in name)
    with pytest.raises(ValueError, match=r"levels=\[0\]: must be of levels that can learn"):
        model.adapt(text(), levels=[0])
    model.adapt(text(), levels=[1])
    names = moved(model, before)
    assert names
    assert all(".levels.1." in name for name in names)


def test_a_reader_goes_on_after_an_optimizer_that_raised() -> None:
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure: Any = None) -> Any:
            if Failing.fails:
                raise OSError("disk full")
            return super().step(closure)

    reader = Reader(make(), optimizer=lambda groups: Failing(groups, lr=0.1))
    with pytest.raises(OSError, match="disk full"):
        reader.read(text())
    Failing.fails = False
    assert reader.read(text()).isfinite().all()
    assert reader.updates


def test_a_compiled_model_is_read() -> None:
    model = make()
    compiled = torch.compile(model, backend="eager")
    found = adaptation_losses(compiled)
    torch.testing.assert_close(found, adaptation_losses(model))


def adaptation_losses(model: Any) -> Tensor:
    with adaptation(model):
        return adapt(model, text(12), optimizer=OPTIMIZERS["SGD"]).losses[:, 1:]


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="tokens is of type str: must be a tensor"):
        make().adapt("abc")  # type: ignore[arg-type]
    model = make()
    for levels in ([], [2], [-1], [0.5], [True], 0, 1):
        with pytest.raises(ValueError, match=r"levels=.*2 frequencies, 0 to 1"):
            Reader(model, levels)  # type: ignore[arg-type]
    for chunk in (0, 2.5, "2", True):
        with pytest.raises(ValueError, match=f"chunk={chunk!r}: must be an int"):
            model.adapt(text(), chunk=chunk)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer is of type SGD: must be a function"):
        model.adapt(text(), optimizer=sgd)  # type: ignore[arg-type]
    for other in (model.head.parameters(), list(model.parameters()), model.blocks.parameters()):
        with pytest.raises(ValueError, match="optimizer of other groups than it was given"):
            model.adapt(text(), optimizer=lambda _, params=other: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match="stream is of type NoneType: must be a tensor"):
        model.adapt(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is of type str: must be a torch"):
        adaptation("x").__enter__()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is of type Linear: must be a deepopt"):
        Reader(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="tokens has 2 texts, those before had 1"):
        model.adapt([text(3), text(3, 2)])
    with pytest.raises(ValueError, match="tokens has 1 texts, those before had 2"):
        model.adapt([text(0, 2), text(3)])
    with pytest.raises(ValueError, match="no level that can learn"):
        Reader(model.requires_grad_(False))
    with pytest.raises(FloatingPointError, match="smaller lr"):
        make().adapt(text(), optimizer=lambda groups: torch.optim.SGD(groups, lr=1e200))
