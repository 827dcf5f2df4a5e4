"""Every optimizer of the package: what it is and what it costs.

An entry here puts a class into the table that users see and lets ``create_optimizer`` make it. A
second entry of the same name, in ``tests/optim/contract/inputs.py``, holds its arguments for the
contract tests.
"""

from dataclasses import dataclass

from torch.optim import Optimizer

from deepopt._table import in_columns
from deepopt.optim.continuum import Continuum
from deepopt.optim.deep_momentum import DeepMomentum
from deepopt.optim.delta_gradient_descent import DeltaGradientDescent
from deepopt.optim.delta_momentum import DeltaMomentum
from deepopt.optim.dmgd import DMGD
from deepopt.optim.m3 import M3
from deepopt.optim.preconditioned_momentum import PreconditionedMomentum


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Args:
        cls: the class.
        equations: those of the paper that it implements.
        state: floats per parameter of an m x n matrix, r = min(m, n), R = max(m, n).
        cost: FLOPs of a step for an m x n matrix beyond a few per parameter.
        wraps: it takes an optimizer instead of parameters.
    """

    cls: type[Optimizer]
    equations: str
    state: str
    cost: str
    wraps: bool = False


REGISTRY: dict[str, Entry] = {
    "deep_momentum": Entry(
        DeepMomentum,
        equations="33, 42, 48, 49, 52",
        state="1 (linear, delta), 1 + 2r/R (covariance), 2 (mlp)",
        cost="5 (4 r²R + 2 r³), and the memory's: 0, 6 r²R + 2 r³ (delta), 3 r²R (covariance)",
    ),
    "preconditioned_momentum": Entry(
        PreconditionedMomentum,
        equations="33, 34, 46, 47",
        state="1, 1 + 1/n (diagonal), 1 + 2m/n (left_gram, m <= n)",
        cost="0, 3 m²n and 10 m³ every 10 steps (left_gram, m <= n)",
    ),
    "delta_momentum": Entry(
        DeltaMomentum,
        equations="48, 49",
        state="1, and the preconditioner's as preconditioned_momentum",
        cost="8 r²R + r³/3 (implicit), 4 r²R (derived, literal), and the preconditioner's",
    ),
    "delta_gradient_descent": Entry(
        DeltaGradientDescent,
        equations="54, 55, 56, 57",
        state="0, and the captured rows",
        cost="4 k r R; implicit at most 8 k r R + 6 s² S + s³/3, in float64; s, S = min, "
        "max of n and k rows",
    ),
    "dmgd": Entry(
        DMGD,
        equations="50, 51, 52",
        state="2 + 8 hidden/mn (coordinate form), 4 hidden/m (row form); 2 per weight of another "
        "module",
        cost="for each inner step 50 hidden mn (coordinate form), 20 hidden mn (row form)",
    ),
    "m3": Entry(
        M3,
        equations="75, Alg. 1",
        state="3 (post), 2 (pre), 4 (literal)",
        cost="5 (4 r²R + 2 r³) (1 + 1/f) (post, literal), 5 (4 r²R + 2 r³) (pre)",
    ),
    "continuum": Entry(
        Continuum,
        equations="70, 71",
        state="the wrapped optimizer's, and 1 in mid-chunk",
        cost="the wrapped optimizer's, once per chunk",
        wraps=True,
    ),
}


class Table(dict[str, Entry]):
    """Optimizers by name, shown as a table."""

    def __str__(self) -> str:
        rows = [("name", "class", "equations", "state: floats per parameter", "cost: FLOPs")]
        rows += [(n, e.cls.__name__, e.equations, e.state, e.cost) for n, e in self.items()]
        return in_columns(rows)

    __repr__ = __str__


def optimizers() -> Table:
    """Every optimizer of the package by name; printed, a table of equations, state and cost."""
    return Table(REGISTRY)
