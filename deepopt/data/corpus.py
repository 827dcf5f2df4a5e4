"""Corpora read from files, as bytes."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deepopt._warnings import warn

HELD_OUT_SHARE = 0.05
# Installed packages, and sources that are mostly tables of test data.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on and bytes held out.

    Attributes:
        name: what the corpus was read from.
        train: the training part, a one-dimensional uint8 tensor.
        val: the held-out part, likewise.
        files: the number of files read.
        sha256: the digest of the training part followed by the held-out part; for a single file it
            is the digest of that file.
        held_out: the lengths in bytes of the files that make up `val`, by name and in its order;
            empty if `val` is not made of whole files.
    """

    name: str
    train: Tensor
    val: Tensor
    files: int
    sha256: str
    held_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of bytes in both parts."""
        return len(self.train) + len(self.val)

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        return (
            f"{self.name}: {files}, {self.size:,} bytes, of which {len(self.val):,} held out, "
            f"sha256 {self.sha256}"
        )


def stdlib_corpus() -> Corpus:
    """Return the sources of the running Python's standard library, without its tests.

    About 12 MB of code and English prose under Python's own license. Patch versions of Python
    differ in it: compare ``sha256`` before comparing results.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path for path in _files_below(root, skip=NOT_STDLIB) if path.suffix == ".py")
    return _from_files("Python standard library", root, paths)


def load_corpus(path: str | os.PathLike[str]) -> Corpus:
    """Return the corpus in one file, or in all files below a directory but hidden ones.

    The last 5 % of a file are held out. In a directory about every twentieth file is, chosen by its
    name among those that are no large part of the whole, or the last 5 % of the bytes where files
    are too few for that. Any encoding without NUL bytes will do (UTF-8, Latin-1, not UTF-16): a
    file with NUL bytes is refused if it is alone, and left out with a warning below a directory.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: there is no text in it.
        OSError: it cannot be read.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"data: {root} does not exist; name a text file or a directory")
    if root.is_dir():
        return _from_files(str(root), root, _files_below(root, skip=set()))
    if not root.is_file():  # reading a pipe or a device may never end
        raise ValueError(f"data: {root} is neither a file nor a directory; name one of them")
    content = root.read_bytes()
    if b"\0" in content:
        raise ValueError(f"data: {root} holds NUL bytes, so it is no text; name a text file")
    return _split_at_end(str(root), content, files=1)


def _files_below(root: Path, skip: set[str]) -> Iterable[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not (name.startswith(".") or name in skip)]
        for name in names:
            if not name.startswith(".") and (path := Path(folder, name)).is_file():
                yield path


def _from_files(name: str, root: Path, paths: Iterable[Path]) -> Corpus:
    found, left_out = {}, 0
    for path in paths:
        content = path.read_bytes()
        if b"\0" in content:
            left_out += 1
        else:
            found[path.relative_to(root).as_posix()] = content
    texts = {key: found[key] for key in sorted(found)}
    if left_out:
        warn(f"data: {left_out} files with NUL bytes left out of {name}")

    size = sum(map(len, texts.values()))
    held_out = {
        key
        for key, text in texts.items()
        if _is_drawn(key) and len(text) < size * HELD_OUT_SHARE / 2
    }
    val = b"".join(texts[key] for key in texts if key in held_out)
    if len(val) < size * HELD_OUT_SHARE / 5:
        return _split_at_end(name, b"".join(texts.values()), len(texts))
    train = b"".join(texts[key] for key in texts if key not in held_out)
    lengths = {key: len(texts[key]) for key in texts if key in held_out}
    return _corpus(name, train, val, len(texts), lengths)


def _is_drawn(key: str) -> bool:
    """Decide by the name alone, so that adding or removing files moves no other file between the
    two parts.
    """
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()[0] < 256 * HELD_OUT_SHARE


def _split_at_end(name: str, content: bytes, files: int) -> Corpus:
    split = len(content) - int(len(content) * HELD_OUT_SHARE)
    return _corpus(name, content[:split], content[split:], files)


def _corpus(
    name: str, train: bytes, val: bytes, files: int, held_out: Mapping[str, int] | None = None
) -> Corpus:
    if not train or not val:
        raise ValueError(
            f"data: {name} holds {len(train) + len(val)} bytes of text, too few to train on and to "
            "hold some out; name a larger file or directory"
        )
    sha256 = hashlib.sha256(train + val).hexdigest()
    return Corpus(name, _tensor(train), _tensor(val), files, sha256, held_out or {})


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
