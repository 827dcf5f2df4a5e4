"""Makes the two files of this folder: the text from Debian's package, the merges from the text.

    apt-get download sword-text-web && dpkg-deb -x sword-text-web_*.deb unpacked
    python -m benchmarks.quality.english.make unpacked

Without a folder it makes the merges alone, which needs the package ``tokenizers``.
"""

import argparse
import json
import lzma
import re
import struct
import zlib
from pathlib import Path

from benchmarks.quality import english

MODULE = "usr/share/sword/modules/texts/ztext/engWEB2015eb"
BOOK = re.compile(
    r'<div [^>]*osisID="(\w+)" sID="(\w+)" type="book"/>(.*?)<div [^>]*eID="\2"', re.DOTALL
)
DEUTEROCANON = re.compile("PrMan|Tob|Jdt|AddPs|Wis|Sir|Bar|.*(Gr|Esd|Macc)")
TOKENS = 1024


def markup(folder: Path) -> str:
    """What is in a SWORD module: blocks, by offset, size and size unpacked, compressed by zlib."""
    found = []
    for part in ("ot", "nt"):
        index, packed = ((folder / f"{part}.{end}").read_bytes() for end in ("bzs", "bzz"))
        for start, size, _ in struct.iter_unpack("<III", index):
            found.append(zlib.decompress(packed[start : start + size]).decode())
    return "".join(found)


def plain(book: str) -> str:
    """The chapters of a book without markup, notes and headings; a line is a paragraph or verse."""
    book = book[book.index("<chapter ") : book.rindex("<chapter eID=")]
    # A note is all that stands between some words, where a space belongs.
    book = re.sub(r"</note>(?=(<(?!note)[^>]*>)*[\w“‘(])", "</note> ", book)
    book = re.sub(r"<(note|title|reference)\b.*?</\1>", "", book, flags=re.DOTALL)
    book = re.sub(r"<(div|lg|l|lb|chapter|item|list)\b[^>]*>", "\n", book)
    book = re.sub(r"<[^>]*>", "", book)
    return re.sub(r" +", " ", re.sub(r"\s*\n\s*", "\n", book)).strip()


def text_of(folder: Path) -> str:
    """The 66 books that all churches have, in their order, with a blank line between two."""
    books = BOOK.findall(markup(folder))
    chosen = [book for name, _, book in books if not DEUTEROCANON.fullmatch(name)]
    return "\n\n".join(map(plain, chosen)) + "\n"


def merges_of(text: bytes, tokens: int) -> list[tuple[str, str]]:
    """Merges that make so many tokens, out of the words of a text; a character stands for a byte.

    Raises:
        ImportError: ``tokenizers`` is not installed.
    """
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE())
    alphabet = [chr(byte) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=tokens, initial_alphabet=alphabet, show_progress=False)
    words = (word.decode("latin-1") for word in english.WORDS.findall(text))
    tokenizer.train_from_iterator(words, trainer)
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality.english.make",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="the unpacked package")
    folder = parser.parse_args().folder
    if folder is not None:
        text = text_of(folder / MODULE)
        english.TEXT.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    merges = merges_of(english.text(), TOKENS)
    english.MERGES.write_text(json.dumps(merges) + "\n")
    for path in (english.TEXT, english.MERGES):
        print(f"written: {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
