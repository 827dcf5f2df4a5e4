"""Hope: self-modifying Titans with a continuum memory system (arXiv 2512.24695)."""

from deepopt.hope.cms import CMS, chunk_groups, stack_levels
from deepopt.hope.config import HopeConfig
from deepopt.hope.generate import complete, generate, stream
from deepopt.hope.model import PRETRAINED, Hope, HopeOutput
from deepopt.hope.reader import Reader, adapt, adaptation
from deepopt.hope.state import HopeState
from deepopt.hope.titans import SelfModifyingTitans

__all__ = [
    "CMS",
    "PRETRAINED",
    "Hope",
    "HopeConfig",
    "HopeOutput",
    "HopeState",
    "Reader",
    "SelfModifyingTitans",
    "adapt",
    "adaptation",
    "chunk_groups",
    "complete",
    "generate",
    "stack_levels",
    "stream",
]
