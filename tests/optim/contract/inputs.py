"""The arguments with which the contract tests call every optimizer of the registry."""

from dataclasses import dataclass
from typing import Any

from torch import tensor
from torch.nn import Linear
from torch.nn.functional import softsign

from deepopt.memory import Covariance, EntrywiseMLP

Options = dict[str, Any]
Refusal = tuple[Options, type[Exception], str]
"""Constructor arguments that are refused, the error and its message."""


@dataclass(frozen=True)
class Inputs:
    """Constructor arguments of one class.

    Args:
        options: sets of arguments with which the class descends.
        literal: sets of arguments for forms that the paper prints but that need not descend.
        errors: arguments that this class refuses, beyond what every class refuses.
    """

    options: tuple[Options, ...] = ({},)
    literal: tuple[Options, ...] = ()
    errors: tuple[Refusal, ...] = ()

    @property
    def all_errors(self) -> tuple[Refusal, ...]:
        return (*COMMON_ERRORS, *self.errors)


# What every class refuses, in torch's words.
COMMON_ERRORS: tuple[Refusal, ...] = (
    ({"lr": "1e-3"}, TypeError, "Invalid lr: '1e-3' is not a number; give a number such as"),
    ({"weight_decay": None}, TypeError, "Invalid weight_decay: None is not a number"),
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
PRECONDITIONER_ERRORS: tuple[Refusal, ...] = (
    ({"preconditioner": "gram"}, ValueError, "Invalid preconditioner: 'gram'; choose 'identity'"),
    ({"preconditioner": 3}, TypeError, "Invalid preconditioner: 3 cannot be called"),
    (
        {"preconditioner": "left_gram", "capturable": True},
        RuntimeError,
        "preconditioner='left_gram' does not support capturable=True",
    ),
)

INPUTS: dict[str, Inputs] = {
    "deep_momentum": Inputs(
        options=(
            {},
            {"memory": "linear", "lr": 3e-3, "betas": (0.8, 0.9)},
            {"memory": "delta", "weight_decay": 0.1},
            {"memory": Covariance(sides="both", refresh=2, damping=1e-4)},
            {"memory": "mlp"},
            {"memory": EntrywiseMLP(time_scales=(0.5, 0.99), inner_lr=1.0)},
            {"memory": EntrywiseMLP()},
            {"row_norm": False, "ns_steps": 3, "maximize": True},
            {"update_rms": 0.2, "rms_cap": 1.0, "ns_coefficients": (3.4445, -4.7750, 2.0315)},
            {"momentum_share": 0.3},
            {"path": "elementwise", "eps": 1e-6},
        ),
        errors=(
            ({"memory": "quadratic"}, ValueError, "Invalid memory: 'quadratic'"),
            ({"memory": object()}, TypeError, "is not a Memory object"),
            ({"update_rms": 0.0}, ValueError, "Invalid update_rms: 0.0"),
            ({"update_rms": float("inf")}, ValueError, "Invalid update_rms: inf"),
            ({"rms_cap": 0.5}, ValueError, "Invalid rms_cap: 0.5"),
            ({"momentum_share": 1.0}, ValueError, "Invalid momentum_share: 1.0"),
            ({"momentum_share": float("nan")}, ValueError, "Invalid momentum_share: nan"),
            ({"momentum_share": -0.1}, ValueError, "Invalid momentum_share: -0.1"),
            ({"ns_steps": 0}, ValueError, "Invalid ns_steps: 0"),
            ({"ns_coefficients": (1.0,)}, ValueError, "Invalid ns_coefficients: (1.0,)"),
            (
                {"memory": "covariance", "capturable": True},
                RuntimeError,
                "memory Covariance does not support capturable=True",
            ),
        ),
    ),
    "preconditioned_momentum": Inputs(
        options=(
            {},
            {"preconditioner": "diagonal", "betas": (0.8, 0.9)},
            {"preconditioner": "left_gram", "weight_decay": 0.1, "maximize": True},
            {"preconditioner": softsign, "lr": 3e-2},
            {"path": "auto", "lr": 3e-3, "weight_decay": 0.1},
        ),
        errors=PRECONDITIONER_ERRORS,
    ),
    "delta_momentum": Inputs(
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
            ({"inner_lr": -0.1}, ValueError, "Invalid inner_lr: -0.1; it must be finite"),
            ({"inner_lr": float("inf")}, ValueError, "Invalid inner_lr: inf"),
            (
                {"rule": "literal", "inner_lr": 0.1},
                ValueError,
                "Invalid inner_lr: 0.1; rule='literal' has none",
            ),
        ),
    ),
    "delta_gradient_descent": Inputs(
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
    "dmgd": Inputs(
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
    "m3": Inputs(
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
            ({"literal": True, "slow_chunk": 0}, ValueError, "Invalid slow_chunk: 0"),
            ({"mix": "pre", "literal": True}, ValueError, "Invalid mix: 'pre' with literal=True"),
            ({"ramp": -1}, ValueError, "Invalid ramp: -1"),
            ({"update_rms": 0.0}, ValueError, "Invalid update_rms: 0.0"),
            ({"rms_cap": 0.5}, ValueError, "Invalid rms_cap: 0.5"),
            ({"ns_steps": 0}, ValueError, "Invalid ns_steps: 0"),
            ({"ns_coefficients": (1.0,)}, ValueError, "Invalid ns_coefficients: (1.0,)"),
        ),
    ),
    "continuum": Inputs(
        options=({}, {"reduce": "sum", "weight_decay": 0.1}),
        errors=(
            ({"chunk": 0}, ValueError, "Invalid chunk: 0"),
            ({"chunk": 2.0}, ValueError, "Invalid chunk: 2.0"),
            ({"reduce": "max"}, ValueError, "Invalid reduce: 'max'"),
        ),
    ),
}
