"""Where the tokens of packed or padded sequences go, so that every document has its own row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """A batch (batch, tokens) taken apart into documents, one per row, without padding in front.

    Attributes:
        real: (batch, tokens), True where there is a token.
        row: row of every real token, in the order of `real`.
        column: its place in that row.
        lengths: tokens of every row.
        source: for every row, the sequence whose state it continues; -1 at the start of a text.
        last: for every sequence, the row whose state it ends with; -1 if it has no such row.
        begun: for every sequence, whether a document starts after its last real token.
    """

    real: Tensor
    row: Tensor
    column: Tensor
    lengths: tuple[int, ...]
    source: tuple[int, ...]
    last: tuple[int, ...]
    begun: tuple[bool, ...]

    @classmethod
    def of(cls, mask: Tensor, starts: Tensor) -> Documents:
        """The documents of a batch.

        Args:
            mask: (batch, tokens) bool, True where there is a token.
            starts: likewise, True where a document starts.
        """
        batch, width = mask.shape
        number = starts.cumsum(1)
        sequence = torch.arange(batch, device=mask.device)[:, None].expand_as(mask)
        # One number per document, which grows along the batch: a sequence has at most `width`.
        document = (sequence * (width + 1) + number)[mask]
        _, row, counts = torch.unique_consecutive(document, return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        column = torch.arange(len(row), device=mask.device) - first[row]
        owners = sequence[mask][first].tolist()
        goes_on = (number[mask][first] == 0).tolist()
        begun = (number[:, -1] > number.masked_fill(~mask, 0).amax(1)).tolist()
        last = [-1] * batch
        for i, owner in enumerate(owners):
            last[owner] = -1 if begun[owner] else i
        source = tuple(o if on else -1 for o, on in zip(owners, goes_on, strict=True))
        lengths = tuple(counts.tolist())
        return cls(mask, row, column, lengths, source, tuple(last), tuple(begun))

    def take_apart(self, x: Tensor) -> Tensor:
        """(batch, tokens) -> (rows, longest row), zero beyond the end of a row."""
        out = x.new_zeros(len(self.lengths), max(self.lengths))
        return out.index_put((self.row, self.column), x[self.real])

    def put_together(self, x: Tensor) -> Tensor:
        """(rows, longest row, ...) -> (batch, tokens, ...), zero where there is no token."""
        out = x.new_zeros(*self.real.shape, *x.shape[2:])
        return out.masked_scatter(
            self.real.view(*self.real.shape, *[1] * (x.ndim - 2)), x[self.row, self.column]
        )


class Grid(NamedTuple):
    """Rows shifted to the right, so that their chunks end in the same columns.

    Rows that have seen different numbers of tokens are in different places of their chunks. The
    scan computes a chunk for all rows at once, which needs these places to agree.

    Attributes:
        position: position of the first column in its chunks.
        valid: (rows, 1, columns), True where a row has a token.
        token_of_column: (rows, columns), the place in its row of the token in a column.
        column_of_token: (rows, tokens), the column of a row's token.
    """

    position: int
    valid: Tensor
    token_of_column: Tensor
    column_of_token: Tensor

    @classmethod
    def of(
        cls, positions: tuple[int, ...], lengths: tuple[int, ...], period: int, width: int,
        device: torch.device,
    ) -> Grid:  # fmt: skip
        """The grid of rows that have seen `positions` tokens and hold `lengths` more.

        Args:
            positions: tokens that every row has seen.
            lengths: tokens that every row holds, at most `width`; the others are padding.
            period: common multiple of the chunks.
            width: tokens of a row, with padding.
            device: the device of the tensors.
        """
        phases = [p % period for p in positions]
        base = min(phases)
        shift = torch.tensor([p - base for p in phases], device=device)[:, None]
        length = torch.tensor(lengths, device=device)[:, None]
        columns = torch.arange(width + max(phases) - base, device=device)
        token = columns - shift
        valid = (token >= 0) & (token < length)
        column = torch.arange(width, device=device) + shift
        return cls(base, valid.unsqueeze(1), token.clamp(0, width - 1), column)

    def spread(self, x: Tensor) -> Tensor:
        """(rows, ..., tokens) -> (rows, ..., columns)."""
        return _gather(x, self.token_of_column)

    def collect(self, x: Tensor) -> Tensor:
        """(rows, ..., columns) -> (rows, ..., tokens)."""
        return _gather(x, self.column_of_token)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    index = index.view(index.shape[0], *[1] * (x.ndim - 2), index.shape[1])
    return x.gather(-1, index.expand(*x.shape[:-1], -1))
