"""The English text that ships: it is the one that its README names, and its tokens give it back."""

import hashlib
import re
import struct
import zlib

import pytest

from benchmarks.quality import english
from benchmarks.quality.english import make


def test_the_files_are_those_that_the_readme_names():
    readme = (english.TEXT.parent / "README.md").read_text()
    named = dict(re.findall(r"\| ([\w. ]+) \| ([0-9a-f]{64}) \|", readme))
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (english.TEXT, english.MERGES)
    }
    found["the text in it"] = hashlib.sha256(english.text()).hexdigest()
    assert found == named
    assert english.TEXT.stat().st_size < 1.5e6
    assert f"{len(english.text()):,} bytes" in readme


def test_tokens_are_1024_kinds_and_give_the_text_back():
    merges = english.read_merges()
    assert len(english.vocabulary(merges)) == make.TOKENS
    part = english.text()[:200_000]
    tokens = english.encode(part, merges)
    assert english.decode(tokens, merges) == part
    assert len(part) / len(tokens) > 2.5
    assert 256 < tokens.max() < make.TOKENS


def test_a_merge_joins_the_first_ranked_pair_first_and_never_crosses_a_word():
    merges = {(b"b", b"c"): 0, (b"a", b"b"): 1, (b"bc", b"d"): 2, (b"d", b" "): 3}
    pieces = english.vocabulary(merges)
    tokens = english.encode(b"abcd abab", merges)
    assert [pieces[token] for token in tokens] == [b"a", b"bcd", b" ", b"ab", b"ab"]


@pytest.mark.parametrize("corpus", [english.of_bytes, english.of_tokens])
def test_the_held_out_stretches_are_a_twentieth_and_are_not_in_the_training_part(corpus):
    found = corpus()
    assert 0.045 < len(found.val) / found.size < 0.055
    unit = english.STRETCH
    train = {piece.numpy().tobytes() for piece in found.train.split(unit)}
    assert not any(piece.numpy().tobytes() in train for piece in found.val.split(unit))
    assert set(found.val.tolist()) <= set(range(make.TOKENS))


def test_chapters_are_read_out_of_a_module_without_notes_headings_and_other_books(tmp_path):
    def book(name, chapter):
        begin, end = (f'osisID="{name}" {end}ID="{name}1" type="book"/>' for end in "se")
        return (
            f'<div canonical="true" {begin}<title>A name</title><chapter sID="{name}.1"/>{chapter}'
            f'<chapter eID="{name}.1"/> a glossary <div canonical="true" {end} between books '
        )

    first = book(
        "Gen", '<w l="1">God</w><note>x <w>y</w></note><w l="2">made</w>,<note>z</note> it.'
    )
    half = len(first) // 2  # a book can lie in two blocks
    blocks = {
        "ot": [first[:half], first[half:] + book("Tob", "left out")],
        "nt": [book("Rom", '<div sID="p"/>Line <q>one</q><l level="1"/>  line two')],
    }
    for part, texts in blocks.items():
        index, packed = b"", b""
        for text in texts:
            block = zlib.compress(text.encode())
            index += struct.pack("<III", len(packed), len(block), len(text))
            packed += block
        (tmp_path / f"{part}.bzs").write_bytes(index)
        (tmp_path / f"{part}.bzz").write_bytes(packed)
    assert make.text_of(tmp_path) == "God made, it.\n\nLine one\nline two\n"
