"""How a batched step is carried out: buckets, sharding, rounding, and the AdamW path.

Nothing here knows how a memory is written or read.
"""

from typing import Any, TypeAlias

State: TypeAlias = dict[str, Any]
"""What an optimizer keeps for a parameter, by name."""
