"""DMGD: gradient descent whose momentum is a module, trained in the step (Eq 50, Eq 51, Eq 52)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt.memory.module import Factory, Module, tanh_mlp
from deepopt.ops import normalized
from deepopt.optim.base import Group, MemoryOptimizer, arguments_of
from deepopt.optim.output_map import Betas, Orthogonal, OutputMap, Rms, State

_OUTPUT_MAPS = ("rms", "newton_schulz", "identity")
MEMORY_OPTIONS = (
    "granularity", "objective", "inner_lr", "inner_steps", "feature_map", "preconditioner",
    "time_scales",
)  # fmt: skip

ORTHOGONAL = Orthogonal(row_norm=False)


class DMGD(MemoryOptimizer):
    r"""Deep Momentum Gradient Descent: momentum whose memory is an MLP or any other module.

    For a matrix W with gradient G, a module m with weights θ, and its key and target u, which is G
    in units of :math:`s_t`:

    .. math::
        \theta_t &= \theta_0 + \beta_1 (\theta_{t-1} - \theta_0)
            - \eta\, \nabla_\theta L\big(m_{\theta_{t-1}};\, u\big), \qquad
            L = \tfrac12 \text{mean}\,(m_\theta(\varphi(u)) + P u)^2 \qquad\text{(Eq 50, Eq 51)}\\
        W_t &= (1 - \gamma\lambda)\, W_{t-1}
            + \gamma\, \sigma\big(s_t\, m_{\theta_t}(\varphi(u))\big) \qquad\text{(Eq 52)}

    The memory is updated first and then read at the same gradient. As printed,
    (``objective="literal"``) L is the sum of m(G), θ₀ = 0 after the first gradient, s = 1 and
    nothing is normalized: that target ignores the sign of the gradient, and the rule is not a
    descent method. It is here for study, with ``lr=1, weight_decay=0``.

    Vectors are matrices of one column, scalars of one entry. All matrices of one shape are trained
    in one batched call, and each has weights of its own, all initialized alike.

    Args:
        params: as for ``torch.optim.AdamW``, or ``deepopt.param_groups(model)``, with which
            embeddings, heads, norms and biases take AdamW.
        lr: learning rate, γ; a float or a 1-element tensor (default: 1e-3).
        betas: retention of the memory (its weights, and the average in coordinate form) and of
            the mean squared gradient that sets the size of the step (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator, on the element-wise path alone (default: 1e-8).
        weight_decay: decoupled weight decay, λ (default: 1e-2).
        memory: "mlp", a tanh MLP of ``hidden`` units whose read-out starts at zero; or a callable
            ``memory(in_features, out_features)`` that returns an ``nn.Module`` without buffers
            that maps (..., in_features) to (..., out_features), such as ``nn.Linear``
            (default: "mlp").
        granularity: "coordinate", one module shared by all entries of a matrix, which corrects the
            linear momentum -M¹: its features are G and its averages, each of root mean square 1;
            or "row", one that maps rows to rows and is all the momentum there is
            (default: "coordinate").
        hidden: units of "mlp" (default: 8).
        objective: inner objective L: "l2", as above; "dot", the mean of m(u) ⊙ u; a callable
            ``(outputs, grad)`` of m(u) and u of one matrix, both (m, n), to a scalar; or
            "literal" (default: "l2").
        inner_lr: η. With the retention it makes a ridge regression of penalty
            :math:`(1-\beta_1)/\eta` on the distance to θ₀. Up to 1 it is stable for "mlp" of any
            width; another module needs less than :math:`1+\beta_1` over the curvature of L in its
            weights, ``nn.Linear`` in coordinate form less than 0.6 (default: 1).
        inner_steps: gradient steps of inner learning for every gradient (default: 1).
        feature_map: φ, None for the identity, the coefficients (c₁, c₃, ...) of an odd polynomial
            of the entries, or a callable of (B, m, n) (default: None).
        preconditioner: P of "l2", a callable of (B, m, n), or None for the identity
            (default: None).
        time_scales: retentions of further averages among the features in coordinate form
            (default: (0.99,)).
        output_map: σ: "rms", whose step has the root mean square that AdamW's would have as a
            whole, so that AdamW's ``lr`` carries over; "newton_schulz", an orthogonal matrix of
            that size; "identity", for which ``lr`` is one of plain gradient descent; a callable of
            (B, m, n); None is "rms", and "identity" for the literal rule. Under "literal" all are
            taken without the size (default: None).
        path: "matrix", "stack", "elementwise" (AdamW) or "auto", as in ``DeepMomentum``
            (default: "matrix").
        [flags]

    State for a matrix m x n, with p the number of the module's weights: coordinate form 2 mn + 2 p
    floats, 1 mn more for every further time scale, where "mlp" has p = 4 hidden; row form 2 p,
    where "mlp" has p = 2 n hidden, so 4 hidden/m floats per parameter: less than AdamW's 2 for
    hidden < m/2; 1 more for the maps "rms" and "newton_schulz". The literal rule keeps p. Float32
    for narrower parameters.

    Cost: ``inner_steps`` passes of the module forward and backward over the gradient's entries or
    rows, and one forward; for "mlp" about 50 hidden FLOPs per parameter in coordinate form and
    20 hidden in row form. Scratch: about 4 hidden floats per entry in coordinate form, for 4
    million entries or one matrix at once.

    Raises:
        ValueError: an argument out of range, or a module that does not fit, named with its remedy;
            no parameter has moved then.
        TypeError: a ``memory`` that is not a factory.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, section 4.4.
    """

    _min_dims: ClassVar[dict[str, int]] = {"matrix": 0, "stack": 3}
    _objects = ("memory", "objective", "feature_map", "preconditioner", "output_map")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        memory: str | Factory = "mlp",
        granularity: str = "coordinate",
        hidden: int = 8,
        objective: str | Callable[[Tensor, Tensor], Tensor] = "l2",
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        feature_map: Sequence[float] | Callable[[Tensor], Tensor] | None = None,
        preconditioner: Callable[[Tensor], Tensor] | None = None,
        time_scales: Sequence[float] = (0.99,),
        output_map: str | Callable[[Tensor], Tensor] | None = None,
        path: str = "matrix",
        rounding: str = "nearest",
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, arguments_of(locals()))

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if not isinstance(group["hidden"], int) or group["hidden"] < 1:
            raise ValueError(
                f"Invalid hidden: {group['hidden']}; it must be a whole number of at least 1"
            )
        if isinstance(group["memory"], str) and group["memory"] != "mlp":
            raise ValueError(
                f"Invalid memory: {group['memory']!r}; give 'mlp' or a callable "
                "(in_features, out_features) -> nn.Module"
            )
        self._memory(group)
        output_map = group["output_map"]
        if not (output_map is None or output_map in _OUTPUT_MAPS or callable(output_map)):
            raise ValueError(
                f"Invalid output_map: {output_map!r}; choose from {_OUTPUT_MAPS}, None or a "
                "callable"
            )

    def _memory(self, group: Group) -> Module:
        factory = tanh_mlp(group["hidden"]) if group["memory"] == "mlp" else group["memory"]
        return Module(factory, **{key: group[key] for key in MEMORY_OPTIONS})

    def _output_map(self, group: Group) -> OutputMap:
        mapping, literal = group["output_map"], group["objective"] == "literal"
        if mapping is None:
            mapping = "identity" if literal else "rms"
        if literal or mapping not in ("rms", "newton_schulz"):
            return Unscaled(mapping)
        return WithoutBiasCorrection(ORTHOGONAL if mapping == "newton_schulz" else Rms())


@dataclass(frozen=True)
class WithoutBiasCorrection:
    """Calls a map with a momentum retention of 0, which turns its bias correction off.

    What a module recalls is no average that starts at zero, so it has no such bias.
    """

    inner: OutputMap

    def init(self, like: Tensor) -> State:
        return self.inner.init(like)

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        return self.inner(momentum, state, grad, (0.0, betas[1]))


@dataclass(frozen=True)
class Unscaled:
    """A map whose update is not brought to the size of AdamW's. State: none.

    A function is called with the paper's momentum, which has the opposite sign.
    """

    mapping: str | Callable[[Tensor], Tensor]

    def init(self, like: Tensor) -> State:
        return {}

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        if self.mapping == "identity":
            return momentum
        if self.mapping == "rms":
            return normalized(momentum)
        if self.mapping == "newton_schulz":
            return ORTHOGONAL.orthogonalize(momentum)
        assert callable(self.mapping)
        update = -self.mapping(-momentum)
        if update.shape != momentum.shape:
            raise ValueError(
                f"Invalid output_map: it returned {tuple(update.shape)} for "
                f"{tuple(momentum.shape)}; it must keep the shape"
            )
        return update
