"""Continuum memory system: a chain of MLPs that learn at different frequencies (Eqs 70, 71, 73)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class ChunkedUpdates:
    """Lets every CMS level learn at the end of its chunk only (Eq 71), with any optimizer.

    A level with chunk C, trained on sequences of T tokens, is due every max(1, C // T) steps of the
    optimizer. Between them its gradients wait here; when it is due it learns from their mean, so
    that a slower level takes rarer steps, not larger ones. What waits when training ends in the
    middle of a chunk is not learned. Levels with C < 2 T are never touched::

        updates = ChunkedUpdates(model, seq_len=256)
        for tokens, targets in batches:
            model(tokens, targets).loss.backward()
            with updates.step():
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module with `CMSLevel`s in it.
        seq_len: tokens of one training sequence, T.
    """

    def __init__(self, model: nn.Module, seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len={seq_len}: must be at least 1, the tokens of one sequence")
        self.steps = 0
        self._periods: dict[str, int] = {}
        self._params: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            if not isinstance(module, CMSLevel):
                continue
            period = max(1, module.chunk // seq_len)
            if period == 1:
                continue
            for name, param in module.named_parameters(prefix):
                self._periods[name] = period
                self._params[name] = param
        self._pending: dict[str, Tensor] = {}

    def due(self, step: int) -> list[str]:
        """Names of the slow parameters that learn in the given step, counted from 1."""
        return [name for name, period in self._periods.items() if step % period == 0]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Goes around gradient clipping and `optimizer.step()`, once per step of the optimizer.

        Inside, a level that is not due has no gradients (`.grad` is None, which every optimizer
        skips), and a level that is due has the mean over its chunk. Afterwards every `.grad` is
        what it was before.
        """
        own = {name: param.grad for name, param in self._params.items()}
        due = set(self.due(self.steps + 1))
        summed = {name: self._plus_pending(name, grad) for name, grad in own.items()}
        try:
            for name, param in self._params.items():
                total = summed[name] if name in due else None
                param.grad = None if total is None else total / self._periods[name]
            yield
            # Only a step that went through counts: after an exception it can be tried again.
            self.steps += 1
            self._pending = {
                name: total for name, total in summed.items()
                if name not in due and total is not None
            }  # fmt: skip
        finally:
            for name, param in self._params.items():
                param.grad = own[name]

    def _plus_pending(self, name: str, grad: Tensor | None) -> Tensor | None:
        pending = self._pending.get(name)
        if grad is None or pending is None:
            return pending if grad is None else grad.detach().clone()
        return pending + grad

    def state_dict(self) -> dict[str, Any]:
        """Step count and waiting gradients: with them a run goes on bit for bit in mid-chunk."""
        return {"steps": self.steps, "pending": {k: v.clone() for k, v in self._pending.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned, for the same model and sequence length."""
        unknown = sorted(set(state["pending"]) - set(self._params))
        if unknown:
            raise ValueError(
                f"state_dict has pending gradients for {unknown}, which are no slow CMS parameters "
                "here: build ChunkedUpdates with the model and the seq_len of the saved run"
            )
        self.steps = int(state["steps"])
        self._pending = {
            name: value.to(self._params[name], copy=True)
            for name, value in state["pending"].items()
        }
