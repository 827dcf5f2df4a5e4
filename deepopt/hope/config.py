"""The sizes and options of a Hope model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, cast

from deepopt._arguments import is_int
from deepopt.hope.cms import VARIANTS, check_chunks
from deepopt.hope.memory import Form, Objective, Update
from deepopt.hope.options import about, documented


@documented
@dataclass(frozen=True)
class HopeConfig:
    """Everything that decides the shape and the arithmetic of a `Hope` model.

    A ValueError names a field that is of the wrong type or out of range, and fields that do not fit
    together.
    """

    mixer: str = field(
        default="titans",
        metadata=about(
            "what mixes the tokens of a block: titans (self-modifying memories) or attention "
            "(causal softmax attention, which makes Hope-Attention)",
            "The options of the memories have no effect with attention.",
        ),
    )
    vocab_size: int = field(default=256, metadata=about("number of tokens; 256 reads bytes"))
    dim: int = field(
        default=128, metadata=about("width of the residual stream; a multiple of `heads`")
    )
    layers: int = field(default=2, metadata=about("number of blocks"))
    heads: int = field(
        default=4,
        metadata=about(
            "number of heads, of width `dim // heads`; with titans every head owns five memories"
        ),
    )
    memory_hidden: int | None = field(
        default=None,
        metadata=about(
            "hidden width of mem, the memory that answers the queries; None means twice the "
            "width of a head, 0 a linear memory",
            type=int,
        ),
    )
    projection_hidden: int | None = field(
        default=None,
        metadata=about(
            "hidden width of the four memories that generate keys, values, inner learning rates "
            "and retentions; None means the width of a head, 0 linear memories",
            type=int,
        ),
    )
    memory_chunk: int = field(
        default=32,
        metadata=about(
            "tokens between two anchors of mem: all gradients of a chunk are taken at the weights "
            "that it starts with"
        ),
    )
    projection_chunk: int = field(
        default=32,
        metadata=about(
            "tokens between two anchors of the four generating memories, which also generate with "
            "the weights of their anchor"
        ),
    )
    update: str = field(
        default="delta",
        metadata=about(
            "inner update: delta (exact delta rule in mem), dgd (delta gradient "
            "descent everywhere) or gd (plain gradient descent)"
        ),
    )
    objective: str = field(
        default="l2", metadata=about("inner objective: l2 (regression) or dot (dot product)")
    )
    max_inner_lr: float = field(
        default=0.02,
        metadata=about(
            "upper end of the inner learning rate eta of gradients at an anchor",
            "It never exceeds 1 / chunk, whatever is given: the gradients of a chunk are one step.",
        ),
    )
    per_channel: bool = field(
        default=False, metadata=about("whether every channel has its own inner learning rate")
    )
    max_delta: float = field(
        default=2.0,
        metadata=about(
            "upper end of the exact delta rule's inner learning rate, at most 2",
            "Above 1 a memory can flip its answers, and so track states; every head learns its "
            "own share of the range.",
        ),
    )
    max_erase: float | None = field(
        default=2.0,
        metadata=about(
            "upper end of what mem erases from W2, at most 2; None erases by eta",
            "Heads start with a thousandth of it: an erased key is not recalled.",
            type=float,
        ),
    )
    retention: str = field(
        default="initial",
        metadata=about("what memories decay to: initial (the learned initial weights) or zero"),
    )
    momentum: bool = field(
        default=False,
        metadata=about("whether gradients at an anchor have momentum (S_t of Titans)"),
    )
    projections: bool = field(
        default=True,
        metadata=about(
            "whether keys and values start from projections and convolutions of their own, which "
            "the memories refine"
        ),
    )
    turns: bool = field(
        default=True,
        metadata=about(
            "whether half of the heads rotate two channels of their queries, by an angle that adds "
            "up over the tokens",
            "A sum neither fades nor is erased, so that it counts, modulo any number; tokens "
            "decide by how much they turn, and whether at all.",
        ),
    )
    conv_width: int = field(
        default=4, metadata=about("tokens seen by the causal depthwise convolutions")
    )
    cms_chunks: tuple[int, ...] = field(
        default=(256, 8192),
        metadata=about(
            "chunk, in tokens, of every level of the continuum memory system, fastest first; each "
            "a multiple of the one before",
            "Tokens of all sequences of a batch count.",
        ),
    )
    cms_variant: str = field(
        default="sequential",
        metadata=about(
            "how the levels are joined: sequential (a chain), nested (a chain whose levels start "
            "again from what the next slower one learns) or independent (side by side)"
        ),
    )
    cms_expansion: float = field(
        default=2.0, metadata=about("hidden width of a CMS level's MLP, as a multiple of `dim`")
    )

    recompute: bool = field(
        default=False,
        metadata=about(
            "whether the backward pass computes every block once more instead of keeping its "
            "activations"
        ),
    )

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "dim", "layers", "heads", "memory_chunk", "projection_chunk",
            "conv_width",
        ):  # fmt: skip
            value = getattr(self, name)
            if not is_int(value) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an int of at least 1")
        for flag in fields(self):
            value = getattr(self, flag.name)
            if isinstance(flag.default, bool) and not isinstance(value, bool):
                raise ValueError(f"{flag.name}={value!r}: must be True or False")
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim}: must be a multiple of heads={self.heads}, so that heads are equal"
            )
        for name in ("memory_hidden", "projection_hidden"):
            hidden = getattr(self, name)
            if hidden is not None and (not is_int(hidden) or hidden < 0):
                raise ValueError(
                    f"{name}={hidden!r}: must be an int of at least 1, 0 for linear memories, "
                    "or None for the default width"
                )
        if self.mixer == "attention" and self.head_dim % 2:
            raise ValueError(
                f"heads={self.heads}: leaves dim // heads = {self.head_dim} channels; attention "
                "turns pairs of them by the position, so that they must be even"
            )
        if self.mixer == "titans" and self.head_dim < 3:
            raise ValueError(
                f"heads={self.heads}: leaves dim // heads = {self.head_dim} channels; a head needs "
                "at least 3, for its retention and two erasures"
            )
        for name, allowed in (
            ("update", ("delta", "dgd", "gd")), ("objective", ("l2", "dot")),
            ("retention", ("initial", "zero")), ("mixer", ("titans", "attention")),
            ("cms_variant", VARIANTS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}"
                )
        for name, most in (("max_inner_lr", 1.0), ("max_delta", 2.0), ("max_erase", 2.0)):
            value = getattr(self, name)
            if name == "max_erase" and value is None:
                continue
            if not (is_int(value) or isinstance(value, float)) or not 0.0 < value <= most:
                raise ValueError(
                    f"{name}={value!r}: must lie in (0, {most:g}], where updates are stable"
                )
        expansion = self.cms_expansion
        real = is_int(expansion) or isinstance(expansion, float)
        if not real or not 0.0 < expansion < float("inf"):
            raise ValueError(f"cms_expansion={expansion!r}: must be a positive number")
        check_chunks(self.cms_chunks)
        object.__setattr__(self, "cms_chunks", tuple(self.cms_chunks))  # JSON has lists

    @property
    def head_dim(self) -> int:
        """Width of one head, and of its memories' inputs and outputs."""
        return self.dim // self.heads

    @property
    def cms_hidden(self) -> int:
        """Hidden width of a CMS level."""
        return max(1, round(self.cms_expansion * self.dim))

    @property
    def hidden(self) -> int:
        """Hidden width of mem; 0 for a linear one."""
        return 2 * self.head_dim if self.memory_hidden is None else self.memory_hidden

    @property
    def projection_width(self) -> int:
        """Hidden width of the generating memories; 0 for linear ones."""
        return self.head_dim if self.projection_hidden is None else self.projection_hidden

    @property
    def form(self) -> Form:
        """The memories' arithmetic, for `deepopt.hope.scan`."""
        most = 1 / max(self.memory_chunk, self.projection_chunk)
        return Form(
            cast(Objective, self.objective),
            cast(Update, self.update),
            min(self.max_inner_lr, most),
            self.max_erase,
            self.max_delta,
            self.per_channel,
            self.memory_chunk,
            self.projection_chunk,
        )

    @classmethod
    def paper(cls, **options: Any) -> HopeConfig:
        """The layer as printed (Eq 83, Eq 88, Eq 90).

        Only the query has a projection, and no query turns. Eta is a vector, and its mean is also
        what is erased. W1 of mem learns by the gradient, too. Retention leads to zero, and there is
        no momentum.

        Args:
            options: any other field, or one of these to change it.
        """
        printed: dict[str, Any] = {
            "update": "dgd", "max_erase": None, "per_channel": True, "retention": "zero",
            "projections": False, "turns": False,
        }  # fmt: skip
        return cls(**{**printed, **options})
