"""The sizes and options of a Hope model."""

from __future__ import annotations

from dataclasses import dataclass

from deepopt.hope.cms import check_chunks


@dataclass(frozen=True)
class HopeConfig:
    """Everything that decides the shape and the arithmetic of a `Hope` model.

    Args:
        vocab_size: number of tokens; 256 reads bytes.
        dim: width of the residual stream; a multiple of `heads`.
        layers: number of blocks.
        heads: number of heads; every head owns its five memories, of width `dim // heads`.
        memory_hidden: hidden width of a memory; None means the width of a head.
        memory_chunk: tokens over which the gradient of the main memory is taken at one anchor.
        projection_chunk: the same for the four memories that generate keys, values, inner learning
            rates and retentions; these also stay constant, as projections, inside their chunk.
        max_inner_lr: upper end of the inner learning rate, eta = max_inner_lr * sigmoid(.). With
            untrained weights 0.1 was stable over 1,024 tokens, and 0.5 was not.
        momentum: whether the memories' updates have momentum (S_t of Titans).
        conv_width: tokens seen by the causal depthwise convolutions.
        cms_chunks: chunk, in tokens, of every level of the continuum memory system, fastest first;
            each a multiple of the one before.
        cms_expansion: hidden width of a CMS level's MLP, as a multiple of `dim`.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 2
    heads: int = 4
    memory_hidden: int | None = None
    memory_chunk: int = 32
    projection_chunk: int = 64
    max_inner_lr: float = 0.02
    momentum: bool = True
    conv_width: int = 4
    cms_chunks: tuple[int, ...] = (256, 1024)
    cms_expansion: int = 2

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
