import hashlib
import itertools

import pytest
import torch

from deepopt.data import evaluation_batches, load_corpus, sample_batch, stdlib_corpus
from deepopt.data.corpus import _is_drawn


def as_bytes(data):
    return bytes(data.tolist())


def test_stdlib_corpus_is_large_code_without_tests():
    corpus = stdlib_corpus()
    assert corpus.files > 300
    assert corpus.train.dtype == torch.uint8
    assert 0.02 < len(corpus.val) / corpus.size < 0.1
    assert b"\ndef " in as_bytes(corpus.val)
    assert corpus.sha256 == stdlib_corpus().sha256
    assert corpus.sha256 in str(corpus)


def test_file_is_split_at_its_end_and_has_its_own_digest(tmp_path):
    content = bytes(range(1, 256)) * 4  # any encoding will do
    path = tmp_path / "text"
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    assert as_bytes(corpus.train) + as_bytes(corpus.val) == content
    assert len(corpus.val) == len(content) // 20
    assert corpus.sha256 == hashlib.sha256(content).hexdigest()
    assert corpus.files == 1


def test_directory_holds_out_whole_files_in_a_fixed_order(tmp_path):
    for index in range(200):
        folder = tmp_path / f"part{index % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.txt").write_text(f"<file {index}>" * 3)
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    corpus = load_corpus(tmp_path)
    train, val = as_bytes(corpus.train), as_bytes(corpus.val)
    assert corpus.files == 200
    assert b"secret" not in train + val
    assert 2 <= val.count(b"><") <= 60
    for index in range(200):
        text = f"<file {index}>".encode() * 3
        assert (text in train) != (text in val)

    (tmp_path / "part0" / "new.txt").write_text("more")
    assert as_bytes(load_corpus(tmp_path).val) == val


def test_one_large_file_is_never_the_held_out_part(tmp_path):
    names = [f"{index}.txt" for index in range(200)]
    large = next(name for name in names if _is_drawn(name))
    for name in names:
        (tmp_path / name).write_text("large" * 2000 if name == large else "small" * 20)
    corpus = load_corpus(tmp_path)
    assert b"large" not in as_bytes(corpus.val)
    assert 0 < len(corpus.val) < 0.06 * corpus.size


def test_binary_files_are_refused_alone_and_counted_in_a_directory(tmp_path):
    binary = tmp_path / "image"
    binary.write_bytes(b"\x89PNG\0\0")
    (tmp_path / "text").write_text("words " * 50)
    with pytest.raises(ValueError, match=r"image holds NUL bytes.*name a text file"):
        load_corpus(binary)
    with pytest.warns(UserWarning, match="1 files with NUL bytes left out"):
        assert load_corpus(tmp_path).files == 1


def test_what_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 bytes of text, too few"):
        load_corpus(tmp_path)
    (tmp_path / "tiny").write_text("x")
    with pytest.raises(ValueError, match="1 bytes of text, too few"):
        load_corpus(tmp_path / "tiny")


def test_batches_depend_on_seed_and_step_alone():
    data = torch.arange(200, dtype=torch.uint8)
    tokens, targets = sample_batch(data, 4, 16, seed=1, step=7)
    torch.manual_seed(99)
    again, _ = sample_batch(data, 4, 16, seed=1, step=7)
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens, again)
    assert torch.equal(targets, tokens + 1)
    for seed, step in ((1, 8), (2, 7), (7, 1), (2**32 + 1, 7)):
        assert not torch.equal(tokens, sample_batch(data, 4, 16, seed, step)[0])


def test_batches_reach_both_ends_of_the_data():
    data = torch.arange(18, dtype=torch.uint8)
    tokens, targets = sample_batch(data, 200, 16, seed=0, step=0)
    assert tokens.min() == 0
    assert targets.max() == 17


@pytest.mark.parametrize("size", [17, 100, 1000])
@pytest.mark.parametrize("windows", [1, 5, 1000])
def test_evaluation_windows_are_spread_and_do_not_overlap(size, windows):
    data = torch.arange(size) % 251
    batches = list(evaluation_batches(data, 4, 16, windows))
    starts = [int(row[0]) for tokens, _ in batches for row in tokens] if size <= 251 else []
    count = sum(len(tokens) for tokens, _ in batches)
    assert count == min(windows, (size - 1) // 16)
    assert all(b - a >= 16 for a, b in itertools.pairwise(starts))
    assert all(tokens.shape[1] == targets.shape[1] == 16 for tokens, targets in batches)


def test_too_little_data_and_bad_sizes_are_named():
    data = torch.zeros(16, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"seq_len=16 needs at least 17 bytes.*there are 16"):
        sample_batch(data, 1, 16, 0, 0)
    with pytest.raises(ValueError, match="batch_size=0"):
        next(evaluation_batches(data, 0, 4, 1))
