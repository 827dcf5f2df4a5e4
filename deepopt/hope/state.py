"""What a Hope model remembers between two calls, and what can be done with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from deepopt.hope.memory import Inputs, MemoryState

Tree = TypeVar("Tree")
INTEGERS = (
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""The dtypes that tokens may have."""


def check_tensor(name: str, tokens: Any) -> None:
    """Raise TypeError unless tokens are a tensor."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"{name} is of type {type(tokens).__name__}: must be a tensor of integers "
            "(batch, tokens), such as torch.tensor([list(text.encode())])"
        )


class TitansState(NamedTuple):
    """All that a layer remembers of the tokens so far.

    Attributes:
        generators: the four memories that generate keys, values, etas and alphas.
        memory: mem, the memory that answers the queries.
        tails: the last `conv_width - 1` inputs of the convolutions of keys, values and queries,
            (batch, dim, .) each.
        phase: the angles by which queries are turned, (batch, heads that turn).
        positions: tokens that every sequence of the batch has seen.
    """

    generators: MemoryState
    memory: MemoryState
    tails: Inputs
    phase: Tensor
    positions: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All tensors by name."""
        found: dict[str, Tensor | None] = {"phase": self.phase}
        for part in ("generators", "memory", "tails"):
            for name, x in getattr(self, part)._asdict().items():
                found[f"{part}.{name}"] = x
        return found

    @staticmethod
    def size(x: Tensor) -> tuple[int, ...]:
        """The size of one of the tensors as far as it is the same for all states of a layer."""
        return tuple(x.shape[1:])

    def rows(self, index: Sequence[int], other: TitansState) -> TitansState:
        """Sequences of two states: `index` counts those of this one, then those of the other."""
        if list(index) == list(range(len(self.positions))):
            return self

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b])[list(index)]

        both = self.positions + other.positions
        return TitansState(
            _map(pick, self.generators, other.generators),
            _map(pick, self.memory, other.memory),
            _map(pick, self.tails, other.tails),
            pick(self.phase, other.phase),
            tuple(both[i] for i in index),
        )


class AttentionState(NamedTuple):
    """The keys and values of the tokens so far; what a softmax layer remembers grows with them.

    Attributes:
        keys: (batch, heads, columns, width), rotated by their positions. A key's column is its
            position; what a text has in columns from its `positions` on is undefined.
        values: the values, in the same layout.
        positions: tokens that every sequence of the batch has seen.
    """

    keys: Tensor
    values: Tensor
    positions: tuple[int, ...]

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """All tensors by name."""
        return {"keys": self.keys, "values": self.values}

    @staticmethod
    def size(x: Tensor) -> tuple[int, ...]:
        """The size of one of the tensors as far as it is the same for all states of a layer."""
        return x.shape[1], x.shape[3]

    def rows(self, index: Sequence[int], other: AttentionState) -> AttentionState:
        """Sequences of two states: `index` counts those of this one, then those of the other."""
        if list(index) == list(range(len(self.positions))):
            return self
        both = self.positions + other.positions
        positions = tuple(both[i] for i in index)

        def pick(a: Tensor, b: Tensor) -> Tensor:
            width = max(a.shape[2], b.shape[2])
            a, b = (F.pad(x, (0, 0, 0, width - x.shape[2])) for x in (a, b))
            return torch.cat([a, b])[list(index), :, : max(positions)]

        return AttentionState(
            pick(self.keys, other.keys), pick(self.values, other.values), positions
        )


BlockState = TitansState | AttentionState


class HopeState(NamedTuple):
    """What a model remembers of the texts so far. Pass it to the next call to continue exactly.

    Attributes:
        blocks: one state per block.
    """

    blocks: tuple[BlockState, ...]

    def rows(self, index: Sequence[int], other: HopeState) -> HopeState:
        """Texts of two states: `index` counts those of this one, then those of the other."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return HopeState(tuple(a.rows(index, cast(Any, b)) for a, b in pairs))

    def detach(self) -> HopeState:
        """The same numbers without their history, so that gradients stop here."""
        return _map(Tensor.detach, self)

    def clone(self) -> HopeState:
        """The same numbers in memory of their own; gradients go back through it."""
        return _map(Tensor.clone, self)

    def to(self, *args: Any, **kwargs: Any) -> HopeState:
        """The state on another device or in another dtype; takes what `Tensor.to` takes.

        Phases stay at least float32, because rounding errors of a sum add up.
        """

        copy = kwargs.get("copy", False)

        def moved(block: BlockState) -> BlockState:
            new = _map(lambda x: x.to(*args, **kwargs), block)
            if not (isinstance(block, TitansState) and isinstance(new, TitansState)):
                return new
            wide = torch.promote_types(new.phase.dtype, torch.float32)
            phase = block.phase.to(new.phase.device, wide, copy=copy)
            return new._replace(phase=phase)

        return HopeState(tuple(moved(block) for block in self.blocks))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and lists of numbers by name, for `torch.save`; nothing is copied."""
        entries: dict[str, Any] = {}
        for i, block in enumerate(self.blocks):
            for name, tensor in block.tensors.items():
                if tensor is not None:
                    entries[f"blocks.{i}.{name}"] = tensor.detach()
            entries[f"blocks.{i}.positions"] = list(block.positions)
        return entries

    @classmethod
    def from_state_dict(cls, entries: Mapping[str, Any]) -> HopeState:
        """The state that `state_dict` was made from.

        Raises:
            TypeError: not a dict.
            ValueError: entries are missing or do not fit one another.
        """
        if not isinstance(entries, Mapping):
            raise TypeError(
                f"entries is of type {type(entries).__name__}: pass the dict that state_dict() gave"
            )

        def entry(name: str) -> Any:
            if name not in entries:
                raise ValueError(f"entries lack {name}: pass all that state_dict() gave")
            return entries[name]

        def part(prefix: str, kind: Any) -> Any:
            absent = () if momentum else ("s2", "s1")
            return kind(*(None if k in absent else entry(f"{prefix}.{k}") for k in kind._fields))

        def positions(prefix: str) -> tuple[int, ...]:
            counts = entry(f"{prefix}.positions")
            return tuple(counts) if isinstance(counts, list | tuple) else ()

        def block(i: int) -> BlockState:
            prefix = f"blocks.{i}"
            found = unchecked(prefix)
            for name, tensor in found.tensors.items():
                if tensor is not None and not isinstance(tensor, Tensor):
                    raise TypeError(f"entries[{prefix}.{name!r}] is {tensor!r}: must be a tensor")
            batch = {len(x) for x in found.tensors.values() if x is not None}
            counts = entries[f"{prefix}.positions"]
            if batch != {len(found.positions)} or not all(
                type(n) is int and n >= 0 for n in found.positions
            ):
                raise ValueError(
                    f"entries['{prefix}.positions'] is {counts!r}: must be a list with the number "
                    f"of tokens that each of the {max(batch)} texts has had; pass what "
                    "state_dict() gave"
                )
            return found

        def unchecked(prefix: str) -> BlockState:
            if any(f"{prefix}.{name}" in entries for name in ("keys", "values")):
                keys, values = entry(f"{prefix}.keys"), entry(f"{prefix}.values")
                return AttentionState(keys, values, positions(prefix))
            return TitansState(
                part(f"{prefix}.generators", MemoryState),
                part(f"{prefix}.memory", MemoryState),
                part(f"{prefix}.tails", Inputs),
                entry(f"{prefix}.phase"),
                positions(prefix),
            )

        pattern = re.compile(r"blocks\.(\d+)\.")
        numbers = [int(found[1]) for name in entries if (found := pattern.match(str(name)))]
        if not numbers:
            raise ValueError("entries have no block: pass what state_dict() gave")
        momentum = any(str(name).endswith((".s2", ".s1")) for name in entries)
        return cls(tuple(block(i) for i in range(max(numbers) + 1)))


def _map(change: Callable[..., Tensor], tree: Tree, *others: Tree) -> Tree:
    """Nested tuples with `change` of the tensors in each place; all else is the first's."""
    if isinstance(tree, Tensor):
        return cast(Tree, change(tree, *others))
    if isinstance(tree, tuple):
        parts = [_map(change, *each) for each in zip(tree, *cast(Any, others), strict=True)]
        return cast(Tree, type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts))
    return tree
