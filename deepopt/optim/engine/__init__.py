"""How a batched step is carried out; nothing here knows what the step computes."""

from typing import Any, TypeAlias

State: TypeAlias = dict[str, Any]
"""What an optimizer keeps for a parameter, by name."""
