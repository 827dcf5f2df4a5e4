"""One block of Hope (Eq 94, Eq 95, Eq 96, Eq 97), or of Hope-Attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepopt.hope import block_token
from deepopt.hope.attention import Attention
from deepopt.hope.cms import CMS
from deepopt.hope.config import HopeConfig
from deepopt.hope.state import BlockState
from deepopt.hope.titans import SelfModifyingTitans


class HopeBlock(nn.Module):
    """A mixer of tokens, x + mixer(norm(x)), followed by the CMS levels.

    The mixer is `titans`, self-modifying memories, or `attention`, for Hope-Attention: the module
    has one of the two under that name.

    Args:
        config: sizes and options of the model.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim)
        if config.mixer == "attention":
            self.attention = Attention(config.dim, config.heads)
        else:
            self.titans = SelfModifyingTitans(config)
        self.cms = CMS(config.dim, config.cms_hidden, config.cms_chunks, config.cms_variant)
        self.mixer_name = config.mixer

    @property
    def mixer(self) -> Any:
        """The module that mixes tokens."""
        return getattr(self, self.mixer_name)

    def forward(
        self,
        x: Tensor,
        state: BlockState | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, BlockState]:
        """Map x (batch, tokens, dim) to the same shape; also return the state after the tokens."""
        if (done := block_token.forward(self, x, state, lengths)) is not None:
            return done
        mixed, state = self.mixer(self.norm(x), state, lengths)
        return self.cms(x + mixed), state
