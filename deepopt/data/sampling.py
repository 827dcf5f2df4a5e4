"""Batches of tokens and next tokens out of a corpus."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor


def sample_batch(
    data: Tensor, batch_size: int, seq_len: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Return random windows of ``data`` as (tokens, targets), both int64 of [batch_size, seq_len].

    The targets are the tokens shifted by one. The windows are a function of ``seed`` and ``step``
    alone: a step has the same windows whenever it is repeated.

    Args:
        data: one-dimensional tensor of tokens.
        batch_size: windows per batch.
        seq_len: tokens per window.
        seed: with ``step``, it chooses the windows.
        step: number of the training step.

    Raises:
        ValueError: a size below 1, or fewer than ``seq_len + 1`` tokens.
    """
    _check(data, batch_size, seq_len)
    # Python hashes a string seed, so that neighboring seeds and steps are unrelated.
    rng = random.Random(f"{seed}/{step}")
    starts = [rng.randrange(len(data) - seq_len) for _ in range(batch_size)]
    return _windows(data, starts, seq_len)


def evaluation_batches(
    data: Tensor, batch_size: int, seq_len: int, windows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield up to ``windows`` windows of ``data``, evenly spaced, without overlap, always the same.

    They come as (tokens, targets) like those of :func:`sample_batch`, in batches of ``batch_size``;
    the last batch can be smaller.

    Args:
        data: one-dimensional tensor of tokens.
        batch_size: windows per batch.
        seq_len: tokens per window.
        windows: the most windows in all.

    Raises:
        ValueError: a size below 1, or fewer than ``seq_len + 1`` tokens.
    """
    _check(data, batch_size, seq_len)
    room = (len(data) - 1) // seq_len
    count = max(1, min(windows, room))
    starts = [(index * room // count) * seq_len for index in range(count)]
    for first in range(0, count, batch_size):
        yield _windows(data, starts[first : first + batch_size], seq_len)


def _check(data: Tensor, batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(f"batch_size={batch_size} and seq_len={seq_len} must be positive")
    if len(data) <= seq_len:
        raise ValueError(
            f"seq_len={seq_len} needs at least {seq_len + 1} bytes to train on and as many held "
            f"out, but there are {len(data)}; use more text or a smaller seq_len"
        )


def _windows(data: Tensor, starts: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    windows = torch.stack([data[start : start + seq_len + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]
