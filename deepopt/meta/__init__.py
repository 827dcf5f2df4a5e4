"""Meta-training: a memory's MLP is found by evolution over whole training runs.

``python -m deepopt.meta`` draws tasks, trains on each of them with many candidates at once, and
moves the search towards those whose loss is lower, relative to that of the best linear memory.
"""

from deepopt.meta.evolution import Evolution
from deepopt.meta.tasks import Task, draw

__all__ = ["Evolution", "Task", "draw"]
