"""Continuum memory system: MLPs in a chain, at different frequencies (Eq 70, Eq 71, Eq 73)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def check_chunks(chunks: Sequence[int]) -> None:
    """Raises ValueError unless chunks are positive and each is a multiple of the one before."""
    if not chunks:
        raise ValueError("cms_chunks=(): needs at least one level, for example (256,)")
    for i, chunk in enumerate(chunks):
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"cms_chunks={tuple(chunks)}: {chunk!r} must be an int of at least 1")
        if i and chunk % chunks[i - 1]:
            raise ValueError(
                f"cms_chunks={tuple(chunks)}: fastest first, each a multiple of the one before; "
                f"{chunk} is no multiple of {chunks[i - 1]}"
            )


class CMSLevel(nn.Module):
    """One level, y = x + MLP(norm(x)), whose weights learn once per chunk.

    Args:
        dim: width of the residual stream.
        expansion: hidden width as a multiple of `dim`.
        chunk: tokens between two updates of the weights.
    """

    def __init__(self, dim: int, expansion: int, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, expansion * dim, bias=False)
        self.down = nn.Linear(expansion * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class CMS(nn.Module):
    """Chain of levels, fastest first: y = MLP_k(... MLP_1(x)) (Eq 70; sequential variant, Eq 73).

    Args:
        dim: width of the residual stream.
        expansion: hidden width of a level as a multiple of `dim`.
        chunks: chunk of every level in tokens, fastest first, each a multiple of the one before.
    """

    def __init__(self, dim: int, expansion: int, chunks: Sequence[int]) -> None:
        super().__init__()
        check_chunks(chunks)
        self.levels = nn.ModuleList(CMSLevel(dim, expansion, chunk) for chunk in chunks)

    def forward(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = level(x)
        return x


def chunk_groups(
    model: nn.Module, groups: Sequence[dict[str, Any]], seq_len: int
) -> list[dict[str, Any]]:
    """Splits parameter groups so that every CMS level learns at the end of its chunk (Eq 71).

    `deepopt.optim.Continuum` reads from a group's `chunk` every how many steps it learns. A level
    of C tokens, trained on sequences of T tokens, is due every max(1, C // T) steps, from the mean
    gradient over them: a slower level takes rarer steps, not larger ones::

        groups = chunk_groups(model, deepopt.param_groups(model), seq_len=256)
        optimizer = Continuum(torch.optim.AdamW(groups))

    Args:
        model: any module with `CMSLevel`s in it.
        groups: parameter groups of `model`, with or without names.
        seq_len: tokens of one training sequence, T.

    Raises:
        ValueError: `seq_len` below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: must be at least 1, the tokens of one sequence")
    chunks = {
        param: max(1, level.chunk // seq_len)
        for level in model.modules()
        if isinstance(level, CMSLevel)
        for param in level.parameters()
    }
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for entry in group["params"]:
            chunk = chunks.get(entry[1] if isinstance(entry, tuple) else entry, 1)
            part = split.setdefault((index, chunk), {**group, "params": [], "chunk": chunk})
            part["params"].append(entry)
    return list(split.values())
