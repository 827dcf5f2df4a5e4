"""Labels are right, batches repeat, and metrics count what they say."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.hope import bytes as text
from benchmarks.hope.formal import LANGUAGES, Formal
from benchmarks.hope.recall import Recall, texts
from benchmarks.hope.task import IGNORED, generator
from benchmarks.hope.training import TASKS
from deepopt.hope import HopeConfig

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
