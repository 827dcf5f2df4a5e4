"""Meta-training: a memory's MLP is found by evolution over whole training runs.

``python -m deepopt.meta`` draws tasks, trains on each of them with many candidates at once, and
keeps what trains better than the best linear memory does.
"""

from deepopt.meta.evolution import Evolution
from deepopt.meta.tasks import Task, draw

__all__ = ["Evolution", "Task", "draw"]
