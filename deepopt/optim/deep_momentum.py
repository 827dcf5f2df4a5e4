"""DeepMomentum: an optimizer with AdamW's arguments, whose momentum is an associative memory."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt import memory as memories
from deepopt.memory import AnyMemory
from deepopt.optim.base import Group, MemoryOptimizer, arguments_of
from deepopt.optim.output_map import Orthogonal, OutputMap


class DeepMomentum(MemoryOptimizer):
    r"""Drop-in replacement of AdamW whose momentum is an associative memory (Eq 33, Eq 52).

    For every hidden matrix W with gradient G, a memory M, and NS the Newton-Schulz map:

    .. math::
        M_t &= \text{write}(M_{t-1}, G_t;\ \beta_1) \\
        O_t &= \text{NS}\big(\text{read}(M_t, G_t;\ \beta_1)\big) \qquad\text{(Eq 52)}\\
        O_t &\leftarrow (1-\rho)\, O_t + \rho \sqrt{\min(m,n)}\; \text{read}(M_t) /
        \|\text{read}(M_t)\|_F \quad\text{then scaled to the norm that } O_t \text{ had}
        \qquad (\rho: \texttt{momentum\_share}) \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,\text{mean}_j\, O_{t,ij}^2, \qquad
        \hat v_t = v_t / (1-\beta_2^{t_i}) \quad (t_i: \text{steps that moved row } i) \\
        \hat O_{t} &= O_t / \sqrt{\hat v_t} \cdot \|O_t\|_F / \|O_t / \sqrt{\hat v_t}\|_F \\
        c_t &= \text{clip}(\sqrt{\min(m,n)} / \|\hat O_t\|_F,\ 1,\ \texttt{rms_cap}) \\
        s_t &= \beta_2 s_{t-1} + (1-\beta_2)\,\|G_t\|_F^2, \qquad
        r_t = \min\Big(1,\ \frac{\|\text{read}(M_t)\|_F\,/\,(1-\beta_1^t)}
        {\sqrt{s_t/(1-\beta_2^t)}}\Big), \qquad
        a_t = \kappa \max\big(r_t,\ \min(0.4,\ 3 r_t)\big) \\
        W_t &= (1 - \gamma\lambda) W_{t-1} - \gamma\, a_t \sqrt{\max(m,n)}\; c_t\, \hat O_t

    Embeddings, output heads, norms, biases and tiny matrices take the steps of torch's fused AdamW.
    An orthogonal matrix times sqrt(max(m,n)) has a root mean square of 1. AdamW's update would have
    a root mean square of r_t, taken over the matrix as a whole: large while gradients agree, about
    0.2 when they are mostly noise, fading when they stop. So AdamW's ``lr`` and ``weight_decay``
    carry over.
    An orthogonal matrix spreads its size over all directions, where AdamW's update has most of it
    in a few. So it may be larger: a small size is enlarged to 0.4, but at most threefold, so that
    it still fades, and kappa is the memory's ``gain``, 1.5 for "covariance" and 1 for the others.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()``, parameter groups, or
            ``deepopt.param_groups(model)``, the surest routing. A group can have its own value of
            any argument below.
        lr: learning rate, gamma; a float or a 1-element tensor (default: 1e-3).
        betas: retention of the momentum, and of the second moment: of entries on the element-wise
            path, of rows and of the whole gradient on the matrix path (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator (default: 1e-8).
        weight_decay: decoupled weight decay, lambda (default: 1e-2).
        memory: "linear", "covariance", "delta", "mlp", or an object with the interface of
            ``deepopt.memory.Memory`` or ``OnePass`` (default: "covariance").
        row_norm: divide rows by their running root mean square after Newton-Schulz
            (default: True).
        update_rms: None for the size a_t; a positive number is a fixed size instead, such as the
            0.2 of ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` (default: None).
        rms_cap: largest factor by which an update that lacks rank is enlarged to the nominal
            root mean square; 1 never enlarges (default: 1.5).
        momentum_share: share of the momentum itself in the update, in [0, 1). Newton-Schulz makes
            all directions of an update equally long. Where gradients have one or two large ones, as
            in small models, steps along these are short at low rates; a share of 0.15 makes up for
            much of that. A momentum that lacks rank weighs more than its share (default: 0).
        ns_steps: steps of Newton-Schulz (default: 5).
        ns_coefficients: None for the Polar Express coefficients of ``ns_steps`` steps, or one
            (a, b, c) for all steps (default: None).
        path: "auto" routes by shape, and by name where names are given; "matrix", "stack" and
            "elementwise" force a path, as ``deepopt.param_groups`` does (default: "auto").
        [flags]

    State per parameter: on the matrix path that of the memory (``deepopt.memory``: 1 float for
    "linear" and "delta", 1 + 2 min(m,n)/max(m,n) for "covariance", 2 for "mlp"; per matrix 2 more
    for "delta", 1 for "covariance", 20 for "mlp") plus 2/n for the rows and 1 per matrix; 2 on the
    element-wise path. Float32 for narrower parameters. "mlp" is
    ``deepopt.memory.Horizons``, trained by ``python -m deepopt.meta``; it does not pay.

    Cost per m x n matrix (m <= n): ``ns_steps`` * (4 m²n + 2 m³) FLOPs, and the memory's; kernels
    take about half of that, see :func:`deepopt.ops.newton_schulz`.

    Raises:
        ValueError: an argument out of range, named with its value.
        TypeError: a ``memory`` without the interface.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, sections 4.2 to 4.4 and App. B.
    Where the gradient is not finite the state is not finite either, as with torch's AdamW.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        memory: str | AnyMemory = "covariance",
        row_norm: bool = True,
        update_rms: float | None = None,
        rms_cap: float = 1.5,
        momentum_share: float = 0.0,
        ns_steps: int = 5,
        ns_coefficients: Sequence[float] | None = None,
        path: str = "auto",
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
        memory = self._memory(group)
        if group["capturable"] and not getattr(memory, "capturable", True):
            raise RuntimeError(
                f"memory {type(memory).__name__} does not support capturable=True: it reads values "
                "of tensors on the host; choose another memory, such as 'delta'"
            )
        self._output_map(group)  # raises for arguments out of range

    def _describe(self, key: str, value: Any) -> str:
        # To a checkpoint memory="delta" and memory=Delta() are the same.
        built_in = key == "memory" and isinstance(value, str) and value in memories.BUILT_IN
        return super()._describe(key, memories.resolve(value) if built_in else value)

    def _memory(self, group: Group) -> AnyMemory:
        return memories.resolve(group["memory"])

    def _output_map(self, group: Group) -> OutputMap:
        gain = getattr(self._memory(group), "gain", 1.0)
        return Orthogonal.of(group, group["momentum_share"], gain)
