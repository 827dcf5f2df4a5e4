"""Races of the optimizers of matrices."""

import functools
from collections.abc import Callable, Sequence

import torch

from benchmarks import work
from benchmarks.speed import optimizers
from benchmarks.speed.case import Found, Setting
from benchmarks.speed.optimizers import contender, gradients
from benchmarks.speed.race import race
from benchmarks.timing import Contender

SPLIT = ("torch Muon", "DeepMomentum linear", "DeepMomentum delta", "DeepMomentum covariance", "M3")
"""Whose time is split into products and the rest."""


def matrices(
    shapes: Sequence[tuple[int, int]], seconds: float, names: Sequence[str] = ()
) -> Callable[[Setting], Found]:
    """A race of all matrix optimizers, or of the named ones."""

    def run(setting: Setting) -> Found:
        known = optimizers.matrix_optimizers(setting.device)
        grads = gradients(shapes, torch.float32, setting.device)

        def factory(name: str) -> Callable[[], Contender]:
            make, rule, period = known[name]
            phases, least = (
                work.over(shapes, functools.partial(rule, least=least)) for least in (False, True)
            )
            return lambda: contender(name, make, grads, phases, least, period)

        chosen = {name: factory(name) for name in names or known}
        return race(chosen, seconds, setting, SPLIT)

    return run
