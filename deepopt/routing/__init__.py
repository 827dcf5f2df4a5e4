"""Which parameter takes which path through an optimizer, and why.

``rules.py`` decides by shape and name, ``modules.py`` by the module that owns a parameter;
``groups.py`` makes parameter groups of these decisions, prints them and warns of doubtful ones.
"""

from deepopt.routing.groups import (
    describe,
    divided,
    labels,
    param_groups,
    routing_table,
    warn_of_groups,
)
from deepopt.routing.rules import (
    PATHS,
    Path,
    Route,
    check_group,
    matrices,
    param_text,
    routed,
    routes,
    sides,
    unwrapped,
)

__all__ = [
    "PATHS",
    "Path",
    "Route",
    "check_group",
    "describe",
    "divided",
    "labels",
    "matrices",
    "param_groups",
    "param_text",
    "routed",
    "routes",
    "routing_table",
    "sides",
    "unwrapped",
    "warn_of_groups",
]
