"""One block of Hope (Eq 94, Eq 95, Eq 96, Eq 97)."""

from __future__ import annotations

from torch import Tensor, nn

from deepopt.hope.cms import CMS
from deepopt.hope.config import HopeConfig
from deepopt.hope.state import TitansState
from deepopt.hope.titans import SelfModifyingTitans


class HopeBlock(nn.Module):
    """Self-modifying Titans, x + titans(norm(x)), followed by the chain of CMS levels.

    Args:
        config: sizes and options of the model.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.dim)
        self.titans = SelfModifyingTitans(config)
        self.cms = CMS(config.dim, config.cms_expansion, config.cms_chunks)

    def forward(
        self,
        x: Tensor,
        state: TitansState | None = None,
        lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, TitansState]:
        mixed, state = self.titans(self.norm(x), state, lengths)
        return self.cms(x + mixed), state
