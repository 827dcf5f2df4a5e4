"""The sizes and options of a Hope model."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepopt.hope.cms import check_chunks
from deepopt.hope.options import about, documented


@documented
@dataclass(frozen=True)
class HopeConfig:
    """Everything that decides the shape and the arithmetic of a `Hope` model."""

    vocab_size: int = field(default=256, metadata=about("number of tokens; 256 reads bytes"))
    dim: int = field(
        default=128, metadata=about("width of the residual stream; a multiple of `heads`")
    )
    layers: int = field(default=2, metadata=about("number of blocks"))
    heads: int = field(
        default=4,
        metadata=about(
            "number of heads; every head owns its five memories, of width `dim // heads`"
        ),
    )
    memory_hidden: int | None = field(
        default=None,
        metadata=about("hidden width of a memory; None means the width of a head", type=int),
    )
    memory_chunk: int = field(
        default=32,
        metadata=about("tokens over which the gradient of the main memory is taken at one anchor"),
    )
    projection_chunk: int = field(
        default=64,
        metadata=about(
            "the same for the four memories that generate keys, values, inner learning rates and "
            "retentions; these also stay constant, as projections, inside their chunk"
        ),
    )
    max_inner_lr: float = field(
        default=0.02,
        metadata=about(
            "upper end of the inner learning rate, eta = max_inner_lr * sigmoid(.)",
            "With untrained weights 0.1 was stable over 1,024 tokens, and 0.5 was not.",
        ),
    )
    momentum: bool = field(
        default=True,
        metadata=about("whether the memories' updates have momentum (S_t of Titans)"),
    )
    conv_width: int = field(
        default=4, metadata=about("tokens seen by the causal depthwise convolutions")
    )
    cms_chunks: tuple[int, ...] = field(
        default=(256, 1024),
        metadata=about(
            "chunk, in tokens, of every level of the continuum memory system, fastest first; each "
            "a multiple of the one before"
        ),
    )
    cms_expansion: int = field(
        default=2, metadata=about("hidden width of a CMS level's MLP, as a multiple of `dim`")
    )

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "dim", "layers", "heads", "memory_chunk", "projection_chunk",
            "conv_width", "cms_expansion",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an int of at least 1")
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim}: must be a multiple of heads={self.heads}, so that heads are equal"
            )
        hidden = self.memory_hidden
        if hidden is not None and (not isinstance(hidden, int) or hidden < 1):
            raise ValueError(
                f"memory_hidden={hidden!r}: must be an int of at least 1, or None for one head's"
            )
        if not 0.0 < self.max_inner_lr <= 1.0:
            raise ValueError(
                f"max_inner_lr={self.max_inner_lr}: must lie in (0, 1], and had better be at most "
                "0.1: larger ones were unstable"
            )
        # A list, as JSON gives it back, is as good as a tuple.
        if not isinstance(self.cms_chunks, list | tuple):
            raise ValueError(f"cms_chunks={self.cms_chunks!r}: must be a tuple, one int per level")
        object.__setattr__(self, "cms_chunks", tuple(self.cms_chunks))
        check_chunks(self.cms_chunks)

    @property
    def head_dim(self) -> int:
        """Width of one head, and of its memories' inputs and outputs."""
        return self.dim // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of a memory."""
        return self.memory_hidden or self.head_dim
