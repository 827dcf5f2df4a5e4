"""Continuum memory system: MLPs that learn at different frequencies (Eq 70, Eq 72, Eq 73, Eq 74).

A *level* is an MLP with a chunk of C tokens: it learns once per C tokens, from the mean gradient of
the task's loss over them, and rests in between (Eq 71). `CMS` is the module; `stack_levels` turns
the MLPs of any trained Transformer into levels (section 7.3). `chunk_groups` tells
`deepopt.optim.Continuum` the chunks, in training and, through `deepopt.hope.Reader`, while reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt._arguments import is_int
from deepopt.routing import divided

VARIANTS = ("sequential", "nested", "independent")
MLP_NAMES = ("mlp", "feed_forward", "ffn")
"""What the MLP of a block is called in most Transformers."""


def check_chunks(chunks: Sequence[int], name: str = "cms_chunks") -> None:
    """Raises ValueError unless chunks are positive and each is a multiple of the one before."""
    if not isinstance(chunks, Sequence):
        raise ValueError(f"{name}={chunks!r}: must be a tuple, one int per level")
    if not chunks:
        raise ValueError(f"{name}=(): needs at least one level, for example (256,)")
    for i, chunk in enumerate(chunks):
        if not is_int(chunk) or chunk < 1:
            raise ValueError(f"{name}={tuple(chunks)}: {chunk!r} must be an int of at least 1")
        if i and chunk % chunks[i - 1]:
            raise ValueError(
                f"{name}={tuple(chunks)}: fastest first, each a multiple of the one before; "
                f"{chunk} is not a multiple of {chunks[i - 1]}"
            )


class CMSLevel(nn.Module):
    """One level, y = x + MLP(norm(x)), with MLP(z) = down gelu(up z).

    A nested level (Eq 72) computes with `up + up_change` and `down + down_change`: the next slower
    level learns the initial weights `up` and `down` and the norm, this level the changes, which
    start from zero again at the end of every chunk of the slower one. Both have the same gradient,
    so that the initial weights learn from the loss of the adapted ones. This is the derivative
    through the inner loop without its second-order term.

    Args:
        dim: width of the residual stream.
        hidden: hidden width.
        chunk: tokens between two updates of the weights.
        slower: the chunk of the next slower level, if this one is nested and has one; otherwise
            None.
    """

    def __init__(self, dim: int, hidden: int, chunk: int, slower: int | None = None) -> None:
        super().__init__()
        self.cms_chunk, self.slower = chunk, slower
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        nested = slower is not None
        self.up_change = nn.Parameter(torch.zeros(hidden, dim)) if nested else None
        self.down_change = nn.Parameter(torch.zeros(dim, hidden)) if nested else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """MLP(norm(x)), what the level adds to the residual stream."""
        x = self.norm(x)
        if self.up_change is None or self.down_change is None:
            return self.down(F.gelu(self.up(x)))
        hidden = F.gelu(F.linear(x, self.up.weight + self.up_change))
        return F.linear(hidden, self.down.weight + self.down_change)


class CMS(nn.Module):
    """Levels of different frequencies, in one of the paper's three variants.

    "sequential": a chain, y = MLP_k(... MLP_1(x)), fastest first (Eq 70, Eq 73).
    "nested": the same chain. At the end of every chunk of the next slower level, a level starts
    again from weights that the slower one learns (Eq 72).
    "independent": side by side, y = x + sum_l w_l MLP_l(x), with w learned (head-wise, Eq 74).

    Args:
        dim: width of the residual stream.
        hidden: hidden width of a level.
        chunks: chunk of every level in tokens, fastest first, each a multiple of the one before.
        variant: "sequential", "nested" or "independent".

    Raises:
        ValueError: chunks that do not fit, or another variant.
    """

    def __init__(
        self, dim: int, hidden: int, chunks: Sequence[int], variant: str = "sequential"
    ) -> None:
        super().__init__()
        check_chunks(chunks, "chunks")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(VARIANTS)}")
        self.nested = variant == "nested" and len(chunks) > 1
        slower = [*chunks[1:], None] if self.nested else [None] * len(chunks)
        self.levels = nn.ModuleList(
            CMSLevel(dim, hidden, chunk, next_) for chunk, next_ in zip(chunks, slower, strict=True)
        )
        self.weights = nn.Parameter(torch.ones(len(chunks))) if variant == "independent" else None

    def _levels(self) -> list[CMSLevel]:
        return cast(list[CMSLevel], list(self.levels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, tokens, dim) through the levels, to the same shape."""
        if self.weights is not None:
            mixed = x
            for weight, level in zip(self.weights, self._levels(), strict=True):
                mixed = mixed + weight * level.branch(x)
            return mixed
        for each in self._levels():
            x = each(x)
        return x


class Level(NamedTuple):
    """A module whose weights learn once per chunk.

    Attributes:
        name: its name in the model.
        module: a `CMSLevel`, or the MLP that `stack_levels` made a level.
        chunk: tokens between two updates.
    """

    name: str
    module: nn.Module
    chunk: int


def levels_of(model: nn.Module) -> list[Level]:
    """The levels of a model, in the order of its modules."""
    return [
        Level(name, module, module.cms_chunk)
        for name, module in model.named_modules()
        if is_int(getattr(module, "cms_chunk", None))
    ]


def stack_levels(
    model: nn.Module, chunks: Sequence[int], mlps: Sequence[str] | None = None
) -> list[Level]:
    """Ad-hoc level stacking (section 7.3): the MLPs of a trained model become levels.

    Consecutive MLPs take the chunks in turn: with two chunks the first, third, ... MLP is fast, the
    second, fourth, ... slow. Every level starts from the weights that its MLP has (Eq 71 goes on
    from there), and the model computes the same as before. Only the frequencies are new, which
    `chunk_groups` and `deepopt.hope.Reader` read. A model is saved as before, without them: call
    this again after loading::

        model = AutoModelForCausalLM.from_pretrained(folder)
        stack_levels(model, (512, 2048))
        groups = chunk_groups(model, deepopt.param_groups(model), tokens=8 * 1024)
        optimizer = Continuum(deepopt.DeepMomentum(groups))

    Args:
        model: any Transformer. The levels of a Hope get the new chunks.
        chunks: chunks in tokens, fastest first, each a multiple of the one before.
        mlps: names of the modules, in order; None for Hope's levels and for modules named
            `mlp`, `feed_forward` or `ffn`.

    Returns:
        The levels, in the order of the model.

    Raises:
        TypeError: `model` is no module.
        ValueError: chunks that do not fit, fewer MLPs than chunks, a name that the model does not
            have, or nested levels, whose chunks depend on one another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}: must be a torch.nn.Module")
    check_chunks(chunks, "chunks")
    modules = dict(model.named_modules())
    if mlps is None:
        mlps = [
            name
            for name, module in modules.items()
            if isinstance(module, CMSLevel) or name.rpartition(".")[2] in MLP_NAMES
        ]
    if unknown := [name for name in mlps if name not in modules]:
        raise ValueError(f"mlps has {unknown[0]!r}: the model has no module of that name")
    if len(mlps) < len(chunks):
        raise ValueError(
            f"chunks={tuple(chunks)}: the model has {len(mlps)} MLPs for {len(chunks)} levels; "
            "give fewer chunks, or the names of the MLPs as mlps"
        )
    nested = {
        level
        for module in modules.values()
        if isinstance(module, CMS) and module.nested
        for level in module.levels
    }
    if refused := [name for name in mlps if modules[name] in nested]:
        raise ValueError(f"{refused[0]} is a nested level: make the model with these cms_chunks")
    for i, name in enumerate(mlps):
        modules[name].cms_chunk = chunks[i % len(chunks)]
    return [level for level in levels_of(model) if level.name in set(mlps)]


def frequencies(level: Level) -> Iterator[tuple[nn.Parameter, int, int | None]]:
    """The parameters of a level, each with its chunk and, where it is reset, its lifetime."""
    slower = getattr(level.module, "slower", None)
    for name, param in level.module.named_parameters():
        if slower is None:
            yield param, level.chunk, None
        elif name.endswith("_change"):
            yield param, level.chunk, slower
        else:
            yield param, slower, None


def chunk_groups(
    model: nn.Module, groups: Sequence[dict[str, Any]], tokens: int
) -> list[dict[str, Any]]:
    """Splits parameter groups so that every level learns at the end of its chunk (Eq 71).

    `deepopt.optim.Continuum` reads `chunk`, `tokens` and `lifetime` from the groups. A level of C
    tokens learns once per C tokens on average, from the mean gradient of the steps since its last
    update. If a step has C tokens or more, it learns at every step. A slower level takes rarer
    steps, not larger ones::

        groups = chunk_groups(model, deepopt.param_groups(model), tokens=batch * seq_len)
        optimizer = Continuum(torch.optim.AdamW(groups))

    Args:
        model: any module with levels in it.
        groups: parameter groups of `model`, with or without names.
        tokens: tokens of one training step, over the whole batch. Where batches differ, set
            `tokens` of the optimizer's groups before each step.

    Returns:
        the groups, divided where frequencies differ, each with `chunk`, `lifetime` and `tokens`.

    Raises:
        TypeError: an entry of `groups` is no group.
        ValueError: `tokens` is not an int of at least 1.
    """
    if not is_int(tokens) or tokens < 1:
        raise ValueError(
            f"tokens={tokens!r}: must be an int of at least 1, the tokens of a step's whole batch"
        )
    for group in groups:
        if not isinstance(group, Mapping):
            raise TypeError(
                f"groups has an entry of type {type(group).__name__}: must be parameter groups, "
                "such as deepopt.param_groups(model)"
            )
    known = {
        param: (chunk, lifetime)
        for level in levels_of(model)
        for param, chunk, lifetime in frequencies(level)
    }

    def frequency(entry: Any) -> tuple[int, int | None]:
        return known.get(entry[1] if isinstance(entry, tuple) else entry, (1, None))

    parts = divided(groups, frequency)
    for (_, (chunk, lifetime)), part in parts.items():
        part.update(chunk=chunk, lifetime=lifetime, tokens=tokens)
    return list(parts.values())
