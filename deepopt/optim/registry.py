"""Every optimizer of the package: what it is, what it costs, and how the contract tests call it.

An entry here is the only step that puts a class under the whole contract (``tests/optim/
test_contract.py`` and ``tests/upstream``) and into the tables that users see.
"""

from dataclasses import dataclass
from typing import Any

from torch import tensor
from torch.nn import Linear
from torch.nn.functional import softsign
from torch.optim import Optimizer

from deepopt.memory import MLP, Covariance
from deepopt.optim.continuum import Continuum
from deepopt.optim.deep_momentum import DeepMomentum
from deepopt.optim.delta_gradient_descent import DeltaGradientDescent
from deepopt.optim.delta_momentum import DeltaMomentum
from deepopt.optim.dmgd import DMGD
from deepopt.optim.m3 import M3
from deepopt.optim.preconditioned_momentum import PreconditionedMomentum

Options = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One optimizer.

    Args:
        cls: the class.
        equations: of the paper, that it implements.
        update: the rule in a few words.
        state: floats per parameter of an m x n matrix, r = min(m, n), R = max(m, n).
        cost: FLOPs of a step for an m x n matrix beyond a few per parameter.
        options: constructor arguments that the contract is tested with.
        literal: the same, of forms that the paper prints but that need not descend.
        errors: constructor arguments that are refused, with the error and its message.
        wraps: it takes an optimizer in the place of parameters.
    """

    cls: type[Optimizer]
    equations: str
    update: str
    state: str
    cost: str
    options: tuple[Options, ...] = ({},)
    literal: tuple[Options, ...] = ()
    errors: tuple[tuple[Options, type[Exception], str], ...] = ()
    wraps: bool = False


# What every class refuses, in torch's words.
COMMON_ERRORS: tuple[tuple[Options, type[Exception], str], ...] = (
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    ({"lr": tensor([1.0, 2.0])}, ValueError, "Tensor lr must be 1-element"),
    (
        {"lr": tensor(1.0), "foreach": True},
        ValueError,
        "lr as a Tensor is not supported for capturable=False and foreach=True",
    ),
    ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
    ({"betas": (0.9,)}, ValueError, "Invalid betas: (0.9,); two values are needed"),
    ({"eps": -1}, ValueError, "Invalid epsilon value: -1"),
    ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    ({"path": "rows"}, ValueError, "Invalid path: 'rows'"),
    (
        {"fused": True, "foreach": True},
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together.",
    ),
    (
        {"fused": True, "differentiable": True},
        RuntimeError,
        "`fused` does not support `differentiable`",
    ),
)

# What every class with a preconditioner refuses.
PRECONDITIONER_ERRORS: tuple[tuple[Options, type[Exception], str], ...] = (
    ({"preconditioner": "gram"}, ValueError, "Invalid preconditioner: 'gram'; choose 'identity'"),
    ({"preconditioner": 3}, TypeError, "Invalid preconditioner: 3 cannot be called"),
    (
        {"preconditioner": "left_gram", "capturable": True},
        RuntimeError,
        "preconditioner='left_gram' does not support capturable=True",
    ),
)

REGISTRY: dict[str, Entry] = {
    "deep_momentum": Entry(
        DeepMomentum,
        equations="33-52",
        update="memory write, read, Newton-Schulz, rows normalised, AdamW's size",
        state="1 (linear, delta), 1 + 2r/R (covariance), 2 (mlp)",
        cost="5 (4 r²R + 2 r³), and the memory's: 0, 6 r²R + 2 r³ (delta), 3 r²R (covariance)",
        options=(
            {},
            {"memory": "linear", "lr": 3e-3, "betas": (0.8, 0.9)},
            {"memory": "covariance", "weight_decay": 0.1},
            {"memory": Covariance(sides="both", refresh=2)},
            {"memory": "mlp"},
            {"memory": MLP(time_scales=(0.5, 0.99), inner_lr=1.0)},
            {"row_norm": False, "ns_steps": 3, "maximize": True},
            {"update_rms": 0.2, "rms_cap": 1.0, "ns_coefficients": (3.4445, -4.7750, 2.0315)},
            {"path": "elementwise", "eps": 1e-6},
        ),
        errors=(
            ({"memory": "quadratic"}, ValueError, "Invalid memory: 'quadratic'"),
            ({"memory": object()}, TypeError, "is no Memory object"),
            ({"update_rms": 0.0}, ValueError, "Invalid update_rms: 0.0"),
            ({"rms_cap": 0.5}, ValueError, "Invalid rms_cap: 0.5"),
            ({"ns_steps": 0}, ValueError, "Invalid ns_steps: 0"),
            ({"ns_coefficients": (1.0,)}, ValueError, "Invalid ns_coefficients: (1.0,)"),
            (
                {"memory": "covariance", "capturable": True},
                RuntimeError,
                "memory Covariance does not support capturable=True",
            ),
        ),
    ),
    "preconditioned_momentum": Entry(
        PreconditionedMomentum,
        equations="33-34, 46-47",
        update="heavy ball of a preconditioned gradient; SGD with momentum for P = I",
        state="1, 1 + 1/n (diagonal), 1 + 2m/n (left_gram, m <= n)",
        cost="0, 4 m²n and 10 m³ every 10 steps (left_gram, m <= n)",
        options=(
            {},
            {"preconditioner": "diagonal", "betas": (0.8, 0.9)},
            {"preconditioner": "left_gram", "weight_decay": 0.1, "maximize": True},
            {"preconditioner": softsign, "lr": 3e-2},
            {"path": "auto", "lr": 3e-3, "weight_decay": 0.1},
        ),
        errors=PRECONDITIONER_ERRORS,
    ),
    "delta_momentum": Entry(
        DeltaMomentum,
        equations="48-49",
        update="momentum that forgets what the present gradient recalls",
        state="1, and the preconditioner's as preconditioned_momentum",
        cost="8 r²R + r³/3 (implicit), 4 r²R (derived, literal), and the preconditioner's",
        options=(
            {},
            {"rule": "derived", "weight_decay": 0.1, "maximize": True},
            {"inner_lr": 0.3, "betas": (0.8, 0.9)},
            {"preconditioner": "diagonal", "inner_lr": 0.1},
            {"preconditioner": "left_gram", "weight_decay": 0.1},
            {"rule": "derived", "inner_lr": 0.0, "preconditioner": softsign},
            {"path": "auto", "lr": 3e-3},
        ),
        literal=({"rule": "literal"}, {"rule": "literal", "preconditioner": "diagonal"}),
        errors=(
            *PRECONDITIONER_ERRORS,
            ({"rule": "explicit"}, ValueError, "Invalid rule: 'explicit'; choose from"),
            ({"inner_lr": -0.1}, ValueError, "Invalid inner_lr: -0.1; it must be at least 0"),
            (
                {"rule": "literal", "inner_lr": 0.1},
                ValueError,
                "Invalid inner_lr: 0.1; rule='literal' has none",
            ),
        ),
    ),
    "delta_gradient_descent": Entry(
        DeltaGradientDescent,
        equations="54-57",
        update="gradient descent that erases what the weight recalls at its inputs (implicit)",
        state="0, and the captured rows",
        cost="8 k r R, and 2 s² (S + m) + s³/3 in float64; s, S = min, max of n and k rows",
        options=(
            {},
            {"rule": "scalar", "decay_scale": 0.1, "maximize": True},
            {"decay_scale": 0.0, "lr": 0.1, "weight_decay": 0.1},
            {"path": "auto", "betas": (0.8, 0.9), "eps": 1e-6},
        ),
        literal=({"rule": "literal"},),
        errors=(
            ({"rule": "exact"}, ValueError, "Invalid rule: 'exact'"),
            ({"decay_scale": -0.5}, ValueError, "Invalid decay_scale: -0.5"),
        ),
    ),
    "dmgd": Entry(
        DMGD,
        equations="50-52",
        update="an MLP trained on the gradient inside the step, and read at it",
        state="2 + 64/mn (coordinate form), 4 hidden/m (row form); 2 per weight of another module",
        cost="for each inner step 50 hidden mn (coordinate form), 20 hidden mn (row form)",
        options=(
            {},
            {"granularity": "row", "hidden": 4},
            {"objective": "dot", "inner_lr": 0.3, "betas": (0.8, 0.95)},
            {"output_map": "newton_schulz", "time_scales": (0.5, 0.99), "maximize": True},
            {"output_map": "identity", "inner_steps": 3, "feature_map": (1.0, 0.1)},
            {"memory": Linear, "inner_lr": 0.3},
            {"preconditioner": softsign, "feature_map": softsign, "output_map": softsign},
            {"path": "auto", "eps": 1e-6},
        ),
        literal=(
            {"objective": "literal"},
            {"objective": "literal", "granularity": "row", "output_map": "newton_schulz"},
        ),
        errors=(
            (
                {"memory": "linear"},
                ValueError,
                "Invalid memory: 'linear'; give 'mlp' or a callable",
            ),
            ({"memory": Linear(2, 2)}, TypeError, "is no factory"),
            ({"granularity": "column"}, ValueError, "Invalid granularity: 'column'"),
            ({"hidden": 0}, ValueError, "Invalid hidden: 0"),
            ({"objective": "l1"}, ValueError, "Invalid objective: 'l1'"),
            ({"inner_lr": -0.1}, ValueError, "Invalid inner_lr: -0.1"),
            ({"inner_steps": 0}, ValueError, "Invalid inner_steps: 0"),
            ({"feature_map": "cubic"}, ValueError, "Invalid feature_map: 'cubic'"),
            ({"preconditioner": 2.0}, ValueError, "Invalid preconditioner: 2.0"),
            ({"time_scales": (1.0,)}, ValueError, "Invalid time_scales: (1.0,)"),
            ({"output_map": "tanh"}, ValueError, "Invalid output_map: 'tanh'"),
        ),
    ),
    "m3": Entry(
        M3,
        equations="75, Alg. 1",
        update="momenta at two time scales, Newton-Schulz of each (post) or of both (pre), "
        "rows normalised, AdamW's size",
        state="3 (post), 2 (pre), 4 (literal)",
        cost="5 (4 r²R + 2 r³) (1 + 1/f) (post, literal), 5 (4 r²R + 2 r³) (pre)",
        options=(
            {"slow_chunk": 2, "ramp": 0},
            {"slow_chunk": 3, "ramp": 4, "mix": "pre", "lr": 3e-3, "betas": (0.8, 0.9)},
            {"slow_chunk": 2, "ramp": 0, "gate": True, "alpha": 1.0, "beta3": 0.5},
            {"slow_chunk": 1, "ramp": 0, "row_norm": False, "update_rms": 0.2, "maximize": True},
            {"path": "elementwise", "eps": 1e-6},
        ),
        literal=({"literal": True, "slow_chunk": 2, "eps": 1.0},),
        errors=(
            ({"beta3": 1.0}, ValueError, "Invalid beta3: 1.0"),
            ({"alpha": -1.0}, ValueError, "Invalid alpha: -1.0"),
            ({"slow_chunk": 0}, ValueError, "Invalid slow_chunk: 0"),
            ({"mix": "mid"}, ValueError, "Invalid mix: 'mid'"),
            ({"mix": "pre", "literal": True}, ValueError, "Invalid mix: 'pre' with literal=True"),
            ({"ramp": -1}, ValueError, "Invalid ramp: -1"),
            ({"update_rms": 0.0}, ValueError, "Invalid update_rms: 0.0"),
            ({"rms_cap": 0.5}, ValueError, "Invalid rms_cap: 0.5"),
            ({"ns_steps": 0}, ValueError, "Invalid ns_steps: 0"),
            ({"ns_coefficients": (1.0,)}, ValueError, "Invalid ns_coefficients: (1.0,)"),
        ),
    ),
    "continuum": Entry(
        Continuum,
        equations="70-71",
        update="any optimizer, its groups stepped at the end of their chunks",
        state="the wrapped optimizer's, and 1 in mid-chunk",
        cost="the wrapped optimizer's, once per chunk",
        options=({}, {"reduce": "sum", "weight_decay": 0.1}),
        errors=(
            ({"chunk": 0}, ValueError, "Invalid chunk: 0"),
            ({"chunk": 2.0}, ValueError, "Invalid chunk: 2.0"),
            ({"reduce": "max"}, ValueError, "Invalid reduce: 'max'"),
        ),
        wraps=True,
    ),
}


class Table(dict[str, Entry]):
    """Optimizers by name, shown as a table."""

    def __str__(self) -> str:
        rows = [("name", "class", "equations", "state: floats per parameter", "cost: FLOPs")]
        rows += [(n, e.cls.__name__, e.equations, e.state, e.cost) for n, e in self.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(lines)

    __repr__ = __str__


def optimizers() -> Table:
    """Every optimizer of the package by name; printed, a table of equations, state and cost."""
    return Table(REGISTRY)
