"""Labels are right, batches repeat, and metrics count what they say."""

import dataclasses
import pydoc_data.topics
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.hope import bytes as text
from benchmarks.hope import command, continual, digits, mad, models, online, passkey, reading
from benchmarks.hope.formal import LANGUAGES, Formal
from benchmarks.hope.recall import Recall, texts
from benchmarks.hope.task import generator
from benchmarks.hope.training import TASKS
from benchmarks.quality import datasets
from benchmarks.quality.workload import Unavailable
from deepopt.hope import HopeConfig, adaptation
from deepopt.hope.model import IGNORED

TINY = HopeConfig(vocab_size=16, dim=16, layers=1, heads=2)


def reference(language, word):
    """The state after a word, by regular expressions and counting letters in a string."""
    if language == "parity":
        return 0 if re.fullmatch("(0*10*1)*0*", word) else 1
    if language == "aa":
        return 0 if re.fullmatch("(11)*", word) else 1
    if language == "mod5":
        return word.count("1") % 5
    while "10" in word:  # brackets that close each other go, the innermost first
        word = word.replace("10", "")
    assert "0" not in word, "a bracket closes that was not opened"
    return 1 if word else 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_targets_are_the_states_after_every_prefix(language):
    tokens, targets = LANGUAGES[language](8, 30, generator(0, 0))
    for word, states in zip(tokens.tolist(), targets.tolist(), strict=True):
        letters = "".join(map(str, word))
        expected = [reference(language, letters[: t + 1]) for t in range(30)]
        assert states == expected


def test_dyck_words_open_and_close():
    tokens, targets = LANGUAGES["dyck1"](200, 160, generator(0, 0))
    assert 0.05 < (targets == 0).double().mean() < 0.5
    depth = (2 * tokens - 1).cumsum(1)
    assert depth.min() == 0
    assert depth.max() > 15


def test_recall_asks_every_key_once_and_wants_the_value_that_followed_it():
    tokens, targets = texts(16, 96, 12, 64, generator(0, 0))
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:24:2], row[1:24:2], strict=True))
        assert len(pairs) == 12
        assert all(1 <= key < 32 <= value < 64 for key, value in pairs.items())
        asked = {t: target for t, target in enumerate(wanted) if target != IGNORED}
        assert sorted(row[t] for t in asked) == sorted(pairs)
        assert all(t >= 24 and pairs[row[t]] == value for t, value in asked.items())
        assert all(row[t] == 0 for t in range(24, 96) if t not in asked)


@pytest.mark.parametrize("name", TASKS)
def test_batches_are_functions_of_seed_and_step_and_tests_are_their_own(name):
    task = TASKS[name]
    if task.unavailable:
        pytest.skip(task.unavailable)
    once, again = task.data(0, 3), task.data(0, 3)
    assert torch.equal(once.tokens, again.tokens)
    assert torch.equal(once.targets, again.targets)
    assert once.tokens.numel() == task.batch * task.tokens
    if name != "aa":  # which has one word
        assert not torch.equal(once.tokens, task.data(1, 3).tokens)
        assert not torch.equal(once.tokens, task.data(0, 4).tokens)


def test_texts_to_recall_from_grow_to_their_whole_length():
    task = TASKS["recall"]
    shapes = [(*task.data(0, step).tokens.shape, pairs(task.data(0, step))) for step in STEPS]
    assert shapes == [(32, 32, 4), (32, 32, 4), (16, 64, 8), (8, 128, 16), (4, 256, 32)]


STEPS = (0, 399, 400, 799, 800)


def pairs(batch):
    """Keys asked in a text."""
    (count,) = set((batch.targets != IGNORED).sum(1).tolist())
    return count


class Answers(nn.Module):
    """A model that is right wherever `wrong` is False."""

    def __init__(self, right, wrong):
        super().__init__()
        self.right, self.wrong = right, wrong

    def forward(self, tokens):
        targets = self.right(tokens).clamp_min(0)
        answers = torch.where(self.wrong(tokens), (targets + 1) % 16, targets)
        return SimpleNamespace(logits=nn.functional.one_hot(answers, 16).float())


def test_accuracy_is_counted_beyond_the_trained_length_and_by_words():
    task = Formal("parity", words=10, tokens=5)
    parity = lambda tokens: tokens.cumsum(1) % 2  # noqa: E731

    def never(tokens):
        return torch.zeros_like(tokens, dtype=torch.bool)

    def last_quarter(tokens):
        return never(tokens) | (torch.arange(20) >= 15)

    def first_letter(tokens):
        return never(tokens) | (torch.arange(20) < 1)

    perfect = task.metrics(Answers(parity, never))
    assert [perfect[x] for x in ("beyond", "whole_words", "within")] == [1.0, 1.0, 1.0]
    assert 0.5 <= perfect["chance"] < 0.7
    late = task.metrics(Answers(parity, last_quarter))
    assert (late["beyond"], late["whole_words"], late["within"]) == (pytest.approx(2 / 3), 0.0, 1.0)
    early = task.metrics(Answers(parity, first_letter))
    assert (early["beyond"], early["whole_words"], early["within"]) == (1.0, 0.0, 0.8)


def test_recall_counts_answers_at_the_keys_that_are_asked_alone():
    task = Recall(tokens=24, pairs=3, texts=4, sizes=TINY)

    def lookup(tokens):
        answers = torch.zeros_like(tokens)
        for row, text_ in enumerate(tokens.tolist()):
            pairs = dict(zip(text_[0:6:2], text_[1:6:2], strict=True))
            answers[row] = torch.tensor([pairs.get(token, 0) for token in text_])
        return answers

    def never(tokens):
        return torch.zeros_like(tokens, dtype=torch.bool)

    def in_every_second_text(tokens):
        return never(tokens) | (torch.arange(len(tokens)) % 2 == 1)[:, None]

    assert task.metrics(Answers(lookup, never)) == {"accuracy": 1.0}
    assert task.metrics(Answers(lookup, in_every_second_text)) == {"accuracy": 0.5}


class Position(nn.Module):
    """A model whose loss is how far into its call a token is, on average."""

    def forward(self, tokens, targets):
        return SimpleNamespace(loss=torch.tensor((tokens.shape[1] - 1) / 2))


def test_long_texts_are_read_in_one_call_and_in_pieces(monkeypatch):
    fake = SimpleNamespace(val=torch.zeros(4000, dtype=torch.uint8))
    monkeypatch.setattr(text, "corpus", lambda: fake)
    task = text.Bytes(tokens=9, batch=2, windows=4, longer=3, texts=3)
    found = task.metrics(Position())
    nats = {name: value * 0.6931471805599453 for name, value in found.items()}
    assert nats["bits_per_byte"] == pytest.approx(4.0)
    assert nats["carried_on"] == pytest.approx(13.0)
    assert nats["with_resets"] == pytest.approx(4.0)


# -- the six tasks of MAD ----------------------------------------------------------------------


def rows_of(kind, count=8):
    """Texts as lists, with the places and the targets that are asked."""
    batch = mad.KINDS[kind].make(count, mad.KINDS[kind].tokens, generator(0, 0))
    for row, wanted in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        yield row, {t: target for t, target in enumerate(wanted) if target != IGNORED}


@pytest.mark.parametrize("kind", ["in_context_recall", "noisy_recall"])
def test_mad_recall_asks_what_followed_a_key_before(kind):
    noise = set(mad.NOISE.tolist())
    for row, asked in rows_of(kind):
        pairs, expected = {}, {}
        for t in range(0, len(row), 2):
            key, value = row[t : t + 2]
            if key in pairs:
                expected[t] = pairs[key]
                assert value == pairs[key]
            if key not in noise:
                pairs[key] = value
        assert asked == expected
        assert any(token in noise for token in row) == (kind == "noisy_recall")


def test_mad_fuzzy_recall_asks_all_of_a_value_whose_key_was_there():
    keys = set(mad.KEYS.tolist())
    for row, asked in rows_of("fuzzy_recall"):
        words = re.findall("k+v+", "".join("k" if token in keys else "v" for token in row))
        pairs, expected, at = {}, {}, 0
        for word in words:
            split = at + word.count("k")
            key, value = tuple(row[at:split]), row[split : at + len(word)]
            if key in pairs:
                expected |= {split - 1 + i: token for i, token in enumerate(value)}
                assert pairs[key][: len(value)] == value
            pairs.setdefault(key, value)
            at += len(word)
        # The text may end within a value, so that its last target lies beyond it.
        assert {t: x for t, x in asked.items() if t + 1 < at} == {
            t: x for t, x in expected.items() if t + 1 < at
        }
        assert asked


def test_mad_selective_copy_asks_the_tokens_in_their_order():
    for row, asked in rows_of("selective_copy"):
        at = row.index(mad.COPY)
        content = [token for token in row[:at] if token != mad.BLANK]
        assert len(content) == mad.COPIED
        assert list(asked.values()) == content
        assert list(asked) == list(range(at, at + mad.COPIED))
        assert set(row[at + 1 :]) == {mad.BLANK}


def test_mad_memorization_has_one_value_for_a_key_and_shows_none():
    pairs = {}
    for row, asked in [pair for _ in range(2) for pair in rows_of("memorization")]:
        assert set(asked) == set(range(1, len(row), 2))
        assert {row[t] for t in asked} == {mad.BLANK}
        for t, value in asked.items():
            assert pairs.setdefault(row[t - 1], value) == value
    assert len(set(pairs.values())) > 20


def test_mad_compression_reads_the_last_token_alone():
    task = mad.Mad("compression", sizes=dataclasses.replace(TINY, vocab_size=64))
    torch.manual_seed(0)
    model = task.model("Hope")
    batch = task.data(0, 0)
    assert torch.equal(batch.tokens, batch.targets)
    seen = []
    model.model.register_forward_hook(lambda *call: seen.append(call[2].logits))
    logits = model(batch.tokens).logits
    assert logits.shape == (*batch.tokens.shape, 64)
    seen[0][:, :-1] = 0  # what it has at the other tokens
    model.model.forward = lambda tokens: SimpleNamespace(logits=seen[0])
    model.model._forward_hooks.clear()
    assert torch.equal(model(batch.tokens).logits, logits)


# -- passkey -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [128, 256, 1024])
def test_a_passkey_is_said_once_and_its_digits_are_the_targets(length):
    batch = passkey.texts(20, length, generator(0, 0))
    assert batch.tokens.shape == (20, length)
    places = set()
    for row, wanted in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        text_ = bytes(row).decode()
        (found,) = re.finditer(r"The pass key is (\d{5})\. Remember it\.", text_)
        assert text_.endswith(f"What is the pass key? The pass key is {found[1][:4]}")
        assert set(wanted[:-5]) == {IGNORED}
        assert bytes(wanted[-5:]).decode() == found[1]
        places.add(found.start() * 4 // length)
    assert len(places) > 1


def test_a_passkey_counts_where_every_digit_is_right():
    task = passkey.Passkey(tokens=128, texts=8)
    by_text = {}
    for length in (128, 512):
        batch = passkey.texts(8, length, generator("held out", length))
        by_text |= {tuple(r): t for r, t in zip(batch.tokens.tolist(), batch.targets, strict=True)}

    class Knows(nn.Module):
        """All digits, but in every second of the long texts the last one."""

        def forward(self, tokens):
            answers = torch.stack([by_text[tuple(row)] for row in tokens.tolist()]).clamp_min(0)
            if tokens.shape[1] > 128:
                answers[::2, -1] = 0
            return SimpleNamespace(logits=nn.functional.one_hot(answers, 256).float())

    assert task.metrics(Knows()) == {"longer": 0.5, "within": 1.0}


# -- learning while reading --------------------------------------------------------------------


def small(name):
    torch.manual_seed(0)
    sizes = dataclasses.replace(TINY, layers=2, vocab_size=256, cms_chunks=(256, 512))
    model = models.build(name, sizes)
    nn.init.normal_(model.head.weight, std=0.05)
    return model


def prose(tokens, batch=1):
    return torch.randint(97, 105, (batch, tokens), generator=generator(0, 0))


ALL = ["Hope", "Hope-Attention", "Transformer++", "gated DeltaNet"]
READERS = [online.by_levels, online.by_all_weights]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("read", READERS)
def test_what_is_read_is_predicted_before_it_is_learned_from(name, read):
    """No loss depends on a later token: without the end of the text the others stay."""
    text_ = prose(600)
    found = []
    for length in (600, 540):
        model = small(name)
        found.append(read(model, text_[:, :length], online.adamw(1e-3)))
    assert found[0].shape == (1, 599)
    torch.testing.assert_close(found[0][:, :512], found[1][:, :512], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("read", READERS)
def test_without_a_rate_a_reader_is_frozen_and_with_one_it_learns(name, read):
    if name == "Hope" and read is online.by_all_weights:
        pytest.skip("reads without a state, as baselines do")
    text_, model = prose(1100), small(name)
    frozen = online.frozen(model, text_)
    still = read(model, text_, lambda groups: torch.optim.SGD(groups, lr=0.0))
    torch.testing.assert_close(still, frozen, rtol=0, atol=1e-5)
    learned = read(model, text_, online.adamw(3e-3))
    torch.testing.assert_close(learned[:, :256], frozen[:, :256], rtol=0, atol=1e-5)
    assert online.second_half(learned) < online.second_half(frozen) - 0.01


@pytest.mark.parametrize("name", ALL)
def test_levels_learn_and_the_rest_is_frozen(name):
    model = small(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    online.by_levels(model, prose(600), online.adamw(1e-3))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(".cms." in n or ".mlp." in n for n in changed)
    online.by_all_weights(model, prose(600), online.adamw(1e-3))
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if "norm" in n)


def test_held_out_files_are_whole_and_none_is_a_table():
    files = reading.files(8192)
    assert len(files) >= 4
    starts = {bytes(text_[0, :200].tolist()) for text_ in files}
    root = Path(sysconfig.get_path("stdlib"))
    names = [n for n, size in text.corpus().held_out.items() if size >= 8192]
    expected = [n for n in names if not n.startswith("encodings/")]
    assert starts == {(root / n).read_bytes()[:200] for n in expected}


def test_reading_is_worth_what_the_losses_say_at_the_rate_of_the_other_files(monkeypatch):
    monkeypatch.setattr(reading, "files", lambda _: [torch.full((1, 9), i) for i in range(4)])
    nats = 0.6931471805599453

    def by_levels(_, text_, lr):
        even = text_[0, 0].item() % 2 == 0  # a file that decides
        return torch.full((1, 8), nats * ((lr - 3e-3) ** 2 if even else 2 + lr))

    monkeypatch.setattr(reading, "deep_momentum", lambda lr: lr)
    monkeypatch.setattr(online, "by_levels", by_levels)
    monkeypatch.setattr(online, "frozen", lambda *_: torch.full((1, 8), 3 * nats))
    found = reading.Reading().metrics(nn.Linear(1, 1))
    assert found == pytest.approx(
        {"adapted": 2.003, "frozen": 3.0, "worth": 0.997, "rate": 3e-3}, rel=1e-5
    )


def test_the_code_of_continual_learning_leaves_out_the_file_that_its_english_comes_from():
    source = Path(pydoc_data.topics.__file__).read_bytes()
    train, code = (bytes(part.tolist()) for part in (text.corpus().train, continual.code()))
    assert len(train) - len(code) == len(source) * train.count(source)
    assert source not in code
    assert b"pass" in bytes(continual.english().tolist())


def test_forgetting_is_what_held_out_code_loses_and_nothing_stays_changed():
    task = continual.Continual(
        tokens=16, batch=2, windows=4, texts=2, length=400, rates=(1e-3, 3e-3)
    )
    model = small("Hope")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = task.metrics(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert found["rate_levels"] in task.rates
    assert found["english_all_weights"] < found["english_frozen"]
    with adaptation(model):
        losses = online.by_all_weights(
            model, task._english, online.adamw(found["rate_all_weights"])
        )
        after = task._code(model)
    assert found["english_all_weights"] == pytest.approx(online.second_half(losses))
    assert found["forgotten_all_weights"] == pytest.approx(after - found["code"])


# -- digits ------------------------------------------------------------------------------------


def test_digits_are_texts_of_pixels_with_the_digit_asked_at_the_end(monkeypatch):
    images = torch.arange(12 * 64).view(12, 64) % 17 / 16
    part = datasets.Part(images, torch.arange(12) % 10)
    batch = digits.texts(part, range(6, 8))
    assert batch.tokens.shape == (2, 65)
    assert torch.equal(batch.tokens[0, :-1] / 16, images[6])
    assert batch.tokens[:, -1].tolist() == [digits.ASK] * 2
    assert batch.targets[:, -1].tolist() == [digits.ASK + 7, digits.ASK + 8]
    assert (batch.targets[:, :-1] == IGNORED).all()


def test_later_digits_come_two_by_two_and_are_learned(monkeypatch):
    random = generator(0, 0)
    images = torch.rand(10, 1, 64, generator=random).expand(-1, 12, -1)
    images = (images + 0.1 * torch.rand(10, 12, 64, generator=random)).clamp(0, 1).flatten(0, 1)
    part = datasets.Part(images, torch.arange(10).repeat_interleave(12))
    monkeypatch.setattr(datasets, "digits", lambda: datasets.Dataset(part, part, ""))
    sizes = dataclasses.replace(TINY, layers=2, vocab_size=28)
    task = digits.Digits(seen=6, rates=(0.0, 1e-2), sizes=sizes)
    assert not task.unavailable
    shown = [sorted(set((b.targets[:, -1] - digits.ASK - 1).tolist())) for b in task._stream()]
    assert shown == [[6]] * 2 + [[7]] * 2 + [[8]] * 2 + [[9]] * 2
    torch.manual_seed(0)
    model = task.model("Transformer++")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    found = task.metrics(model)
    assert found["rate_all_weights"] == 1e-2
    assert found["later_all_weights"] > 0
    assert found["later_levels"] > 0  # with a frozen head, no digit could be told from another
    assert found["known"] == 0  # its head is zero
    assert found["forgotten_all_weights"] <= 0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_task_without_its_data_is_skipped_and_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    def missing():
        raise Unavailable("not installed: pip install it")

    monkeypatch.setattr(datasets, "digits", missing)
    with pytest.raises(SystemExit):  # there is nothing else to report
        command.main(["--out", str(tmp_path), "--tasks", "digits", "--parts", "models"])
    assert "skipped: digits: not installed: pip install it" in capsys.readouterr().err
