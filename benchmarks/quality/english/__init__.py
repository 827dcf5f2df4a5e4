"""English text that ships with the benchmarks, as bytes and as the tokens of a BPE of 1,024.

README.md in this folder says what text it is and how ``make.py`` made the two files.
"""

import functools
import hashlib
import itertools
import json
import lzma
import re
from pathlib import Path

import torch
from torch import Tensor

from deepopt.data import Corpus

TEXT = Path(__file__).parent / "english.txt.xz"
MERGES = Path(__file__).parent / "merges.json"
WORDS = re.compile(rb" ?[A-Za-z]+| ?[^A-Za-z\s]+|\s+")
"""No merge crosses the border of a word."""
STRETCH, EVERY = 4096, 20

Merges = dict[tuple[bytes, bytes], int]
"""Pairs of neighboring pieces and their rank: the first one in a word is joined first."""


@functools.cache
def text() -> bytes:
    """The whole text, UTF-8."""
    return lzma.decompress(TEXT.read_bytes())


@functools.cache
def of_bytes() -> Corpus:
    """The text as bytes, with a twentieth held out."""
    return held_apart("English, bytes", torch.frombuffer(bytearray(text()), dtype=torch.uint8))


@functools.cache
def of_tokens() -> Corpus:
    """The text as tokens 0 to 1023, with a twentieth held out."""
    merges = read_merges()
    return held_apart("English, BPE", encode(text(), merges))


def held_apart(name: str, units: Tensor) -> Corpus:
    """Every twentieth stretch of 4,096 units is held out; the stretches of a part are joined."""
    stretches = units[: len(units) // STRETCH * STRETCH].view(-1, STRETCH)
    held_out = torch.arange(len(stretches)) % EVERY == EVERY // 2
    sha256 = hashlib.sha256(units.numpy().tobytes()).hexdigest()
    return Corpus(name, stretches[~held_out].flatten(), stretches[held_out].flatten(), 1, sha256)


def read_merges() -> Merges:
    pairs = json.loads(MERGES.read_text())
    return {(a.encode("latin-1"), b.encode("latin-1")): rank for rank, (a, b) in enumerate(pairs)}


def vocabulary(merges: Merges) -> list[bytes]:
    """The bytes of every token: the single ones, then what the merges make, in their order."""
    return list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *map(b"".join, merges)]))


def encode(text: bytes, merges: Merges) -> Tensor:
    """Tokens (n,) int16 of a text by byte pair encoding."""
    ids = {piece: token for token, piece in enumerate(vocabulary(merges))}

    @functools.cache
    def tokens(word: bytes) -> list[int]:
        pieces = [bytes([byte]) for byte in word]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in merges]:
            first = min(pairs, key=merges.__getitem__)
            place = next(i for i in range(len(pieces)) if (*pieces[i : i + 2],) == first)
            pieces[place : place + 2] = [b"".join(first)]
        return [ids[piece] for piece in pieces]

    words = WORDS.findall(text)
    return torch.tensor([token for word in words for token in tokens(word)], dtype=torch.int16)


def decode(tokens: Tensor, merges: Merges) -> bytes:
    """The text of tokens."""
    pieces = vocabulary(merges)
    return b"".join(pieces[token] for token in tokens.tolist())
