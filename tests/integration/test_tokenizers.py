"""The tokens of the benchmarks' English text are what the package ``tokenizers`` makes of it."""

import pytest
import torch

from benchmarks.quality import english
from benchmarks.quality.english import make

tokenizers = pytest.importorskip("tokenizers")


def test_the_merges_that_ship_are_learned_from_the_text_again():
    merges = make.merges_of(english.text(), make.TOKENS)
    pairs = [(a.encode("latin-1"), b.encode("latin-1")) for a, b in merges]
    assert pairs == list(english.read_merges())


def test_the_encoding_is_that_of_tokenizers():
    merges = english.read_merges()
    ids = {piece.decode("latin-1"): i for i, piece in enumerate(english.vocabulary(merges))}
    pairs = [(a.decode("latin-1"), b.decode("latin-1")) for a, b in merges]
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs))
    part = english.text()[-50_000:]
    words = (word.decode("latin-1") for word in english.WORDS.findall(part))
    expected = [token for word in words for token in reference.encode(word).ids]
    torch.testing.assert_close(
        english.encode(part, merges), torch.tensor(expected, dtype=torch.int16)
    )
