"""The MLP memory: averages of the gradient at several time scales, read out by a small MLP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepopt._arguments import check_fields
from deepopt.memory.horizons import average_keys, check_phi
from deepopt.memory.linear import Linear
from deepopt.ops import coordinate_mlp, coordinate_mlp_gradient, root_mean_square

LINEAR = Linear()


@dataclass(frozen=True)
class EntrywiseMLP:
    r"""A linear memory with a correction that a small MLP reads, entry by entry, from its keys.

    Keys are averages of the gradient at several retentions :math:`\beta_k`, of which the first is
    the momentum's, each divided by its own root mean square:

    .. math::
        M^k_t &= \beta_k M^k_{t-1} + (1-\beta_k)\, G_t, \qquad
        \hat M^k = M^k / \text{rms}(M^k) \\
        \text{read} &= N_t + a\, \text{rms}(N_t) \tanh f_\varphi(\hat M^1_t, \dots, \hat M^F_t),
        \qquad N_t = \beta_1 M^1_t + (1-\beta_1)\, G_t

    with f of 8 tanh units without biases (``ops.coordinate_mlp``). N is the read of
    :class:`Linear`; no entry is moved by more than a times its root mean square, whatever the MLP
    says, and a read-out of zeros gives :class:`Linear` exactly.

    Before the averages take up a gradient, the MLP can learn from it (``inner_lr`` > 0): one step
    of gradient descent on the mean square error of what the keys predicted,

    .. math::
        \varphi_t = \varphi_0 + \rho\, (\varphi_{t-1} - \varphi_0) - \frac{\eta}{s_t^2}
        \nabla_\varphi \tfrac12 \text{mean} \big(M^1_{t-1} +
        a\, \text{rms}(M^1_{t-1}) \tanh f_\varphi(\hat M_{t-1}) - G_t\big)^2

    with :math:`s_t` the larger of the root mean squares of :math:`G_t` and :math:`M^1_{t-1}`. It is
    off by default: single gradients are mostly noise, and a memory that is taught to predict them
    follows the noise.

    All matrices start from the same φ₀. The default has a read-out of zeros: without learning
    online it is :class:`Linear`, at one more float per parameter for every further average. Each
    matrix learns a φ of its own, because a parameter's step must not depend on which others are
    stepped with it. The state holds φ and φ₀.

    It is not worth its cost: trained over whole runs, φ gains 0.004 nats on a byte model and loses
    0.02 on a ViT (``docs/results/mlp-memory.md``). The memory called "mlp" is :class:`Horizons`.

    Args:
        time_scales: retentions of the averages besides the momentum's own, in [0, 1)
            (default: (0.99,)).
        authority: a, the largest correction in units of the momentum's root mean square, in
            [0, 1] (default: 0.3).
        inner_lr: η, not negative; 0 keeps the MLP as it is (default: 0).
        inner_retention: ρ, the share of what was learned that is kept, in [0, 1] (default: 0.99).
        phi: φ₀, a row for every unit: the weights of its F keys in their order, that of the
            momentum first, and its read-out (default: None, 8 units with a read-out of zeros).

    State: 1 + len(time_scales) floats per parameter, 2 by default, and twice the numbers of φ₀ per
    matrix, 48 by default.

    Cost per parameter, with H units and F averages: about H (2 F + 22) FLOPs, 208 by default, 21 of
    them for each tanh; learning adds about H (4 F + 26).

    Raises:
        ValueError: an argument outside its range, or a ``phi`` that does not fit the time scales.
    """

    time_scales: Sequence[float] = (0.99,)
    authority: float = 0.3
    inner_lr: float = 0.0
    inner_retention: float = 0.99
    # Left out of the repr by which a checkpoint recognizes the memory: the state holds φ itself.
    phi: Sequence[Sequence[float]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(0.0 <= retention < 1.0 for retention in self.time_scales):
            raise ValueError(
                f"Invalid time_scales: {self.time_scales}; retentions must be in [0, 1)"
            )
        for name in ("authority", "inner_retention"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"Invalid {name}: {getattr(self, name)}; it must be in [0, 1]")
        if not 0.0 <= self.inner_lr < math.inf:
            raise ValueError(
                f"Invalid inner_lr: {self.inner_lr}; it must be finite and not negative"
            )
        if self.phi is not None:
            if not len(self.phi):
                raise ValueError(
                    "Invalid phi: it has no units; give at least one, or None for the default"
                )
            check_phi(self.phi, len(self.time_scales) + 2, self.time_scales)

    def init(self, like: Tensor) -> dict[str, Tensor]:
        phi = self._initial_weights.to(like)
        phi = phi.expand(len(like), *phi.shape)
        averages = {key: torch.zeros_like(like) for key in average_keys(self.time_scales)}
        return {**averages, "phi": phi.clone(), "phi0": phi.clone()}

    def write(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> None:
        if self.inner_lr > 0:
            state["phi"] = self._learned(state, grad)
        retentions = (retention, *self.time_scales)
        for key, kept in zip(average_keys(self.time_scales), retentions, strict=True):
            state[key] = state[key].lerp(grad, 1 - kept)

    def read(self, state: dict[str, Tensor], grad: Tensor, retention: float | Tensor) -> Tensor:
        momentum = LINEAR.read(state, grad, retention)
        reach = self.authority * root_mean_square(momentum)
        return coordinate_mlp(momentum, reach, *self._keys(state), state["phi"])

    @property
    def _initial_weights(self) -> Tensor:
        if self.phi is None:
            return untrained_weights(1 + len(self.time_scales))
        return torch.tensor(self.phi, dtype=torch.float32, device="cpu")

    def _keys(self, state: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The averages, and the factors (B, F) that make keys of them."""
        averages = [state[key] for key in average_keys(self.time_scales)]
        tiny = torch.finfo(averages[0].dtype).tiny
        sizes = torch.stack([root_mean_square(x) for x in averages], 1)
        return averages, sizes.clamp_min(tiny).reciprocal()

    def _learned(self, state: dict[str, Tensor], grad: Tensor) -> Tensor:
        phi, momentum = state["phi"], state["momentum"]
        averages, scales = self._keys(state)
        size = root_mean_square(momentum)
        unit = torch.maximum(size, root_mean_square(grad)).clamp_min(torch.finfo(grad.dtype).tiny)
        slope = coordinate_mlp_gradient(
            momentum, self.authority * size, averages, scales, phi, grad, unit
        )
        faded = state["phi0"] + self.inner_retention * (phi - state["phi0"])
        return faded - self.inner_lr * slope


def untrained_weights(features: int, units: int = 8) -> Tensor:
    """Units whose input has a root mean square of about 1, with a read-out of zeros."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(units, features, generator=generator, dtype=torch.float32, device="cpu")
    return torch.cat([drawn / features**0.5, torch.zeros_like(drawn[:, :1])], 1)
