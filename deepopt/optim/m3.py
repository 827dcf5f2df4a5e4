"""M3: momenta at two time scales, each orthogonalized (Alg. 1, Eq 75)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from deepopt.memory import Memory
from deepopt.memory.multi_scale import FastOfMultiScale, MultiScale, MultiScaleSums
from deepopt.optim.base import Group, MemoryOptimizer, arguments_of
from deepopt.optim.output_map import Betas, Orthogonal, OutputMap, State

MIXES = ("post", "pre")
MEMORY_OPTIONS = ("slow_chunk", "beta3", "alpha", "ramp", "gate")


class M3(MemoryOptimizer):
    r"""Multi-scale Momentum Muon: a fast and a slow momentum, mixed into one update (Alg. 1).

    For every hidden matrix W with gradient G, NS the Newton-Schulz map, f = ``slow_chunk``, and
    k = floor((t - 1) / f) the chunks of f steps that have ended:

    .. math::
        M^{(1)}_t &= \beta_1 M^{(1)}_{t-1} + (1-\beta_1)\, G_t, \qquad
        \hat M^{(1)}_t = \beta_1 M^{(1)}_t + (1-\beta_1)\, G_t \\
        M^{(2)}_{k+1} &= \beta_{3,k} M^{(2)}_k + (1-\beta_{3,k})\,
        \frac1f \sum_{t=kf+1}^{(k+1)f} G_t, \qquad O^{(2)}_k = \text{NS}(M^{(2)}_k) \\
        O_t &= \text{NS}(\hat M^{(1)}_t) + \alpha_t\, O^{(2)}_k \quad(\texttt{mix="post"}), \qquad
        \text{NS}\Big(\hat M^{(1)}_t + \alpha_t \frac{\|\hat M^{(1)}_t\|_F}{\|M^{(2)}\|_F} M^{(2)}
        \Big) \quad(\texttt{mix="pre"}) \\
        W_t &= (1 - \gamma\lambda) W_{t-1} - \gamma\, a_t \sqrt{\max(m,n)}\; c_t\, \hat O_t

    with :math:`\beta_{3,k} = \min(\beta_3, \frac{k}{k+4})`, an average over about the last
    quarter of the run until :math:`\beta_3` limits it, and
    :math:`\alpha_t = \alpha \min(1, kf/\texttt{ramp})`, times the gate of
    :class:`deepopt.memory.MultiScale` where asked for. :math:`\hat O_t` has the norm of
    :math:`\text{NS}(\hat M^{(1)}_t)` and normalized rows. These rows, :math:`c_t` and :math:`a_t`
    are computed as in :class:`DeepMomentum`, with :math:`a_t` from :math:`\hat M^{(1)}_t`. With
    ``alpha=0``, M3 equals ``DeepMomentum(memory="linear")`` bit for bit. So AdamW's ``lr`` and
    ``weight_decay`` carry over, and the slow momentum turns an update but never enlarges it. In the
    first chunk :math:`O^{(2)}` is zero. With ``mix="pre"`` the gradients of the chunk that has not
    ended count in :math:`M^{(2)}` already. Embeddings, output heads, norms, biases and tiny
    matrices take AdamW.

    .. warning::
        ``literal=True`` is Alg. 1 as printed, to show what the paper says and not to train with:

        .. math::
            M^{(1)}_t &= M^{(1)}_{t-1} + \beta_1 G_t, \qquad V_t = V_{t-1} + \beta_2 G_t^2, \qquad
            M^{(2)}_k = M^{(2)}_{k-1} + \beta_3 \sum_{t=(k-1)f+1}^{kf} G_t \\
            W_t &= (1 - \gamma\lambda) W_{t-1} - \gamma\,
            \frac{\text{NS}(M^{(1)}_t) + \alpha\, \text{NS}(M^{(2)}_k)}{\sqrt{V_t} + \epsilon}

        Its sums forget nothing, and Newton-Schulz does not see size, so that :math:`\beta_1` and
        :math:`\beta_3` have no effect. Dividing an orthogonal matrix by the size of the gradient
        makes the step inversely proportional to it, and enormous where an entry's gradient has
        been zero: AdamW's ``lr`` does not carry over. The printed sum over a chunk has f + 1
        terms, of which one belongs to two chunks; here it has the chunk's f. Eq 75 differs from
        Alg. 1 in sign and in its factor; Alg. 1 is followed. Weight decay is not printed: give 0.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()``, parameter groups, or
            ``deepopt.param_groups(model)``, the surest routing. A group can have its own value of
            any argument below.
        lr: learning rate, gamma; a float or a 1-element tensor (default: 1e-3).
        betas: retention of the fast momentum, and of the second moments: of entries on the
            element-wise path, of rows and of the whole gradient on the matrix path
            (default: (0.9, 0.999)).
        eps: AdamW's term in the denominator, and that of ``literal`` (default: 1e-8).
        weight_decay: decoupled weight decay, lambda (default: 1e-2).
        beta3: largest retention of the slow momentum per chunk, in [0, 1) (default: 0.99).
        alpha: weight of the slow momentum beside the fast one's 1 (default: 0.5).
        slow_chunk: steps per chunk, f, at least 1 (default: 10).
        mix: "post" adds the orthogonalized momenta and keeps the slow one's, which a ``capturable``
            step computes every time; "pre" orthogonalizes the sum (default: "post").
        ramp: steps until the slow momentum has its whole weight (default: 500).
        gate: lower the slow momentum's weight where it predicts gradients less well than the fast
            one does: for abrupt changes of the task. Where gradients are mostly noise it costs
            what the slow momentum gains (default: False).
        literal: Alg. 1 as printed; ``ramp``, ``gate``, ``row_norm``, ``update_rms`` and ``rms_cap``
            have no part in it (default: False).
        row_norm: divide rows by their running root mean square after Newton-Schulz
            (default: True).
        update_rms: None for the size a_t; a positive number is a fixed size instead
            (default: None).
        rms_cap: largest factor by which an update that lacks rank is enlarged to the nominal
            root mean square; 1 never enlarges (default: 1.5).
        ns_steps: steps of Newton-Schulz (default: 5).
        ns_coefficients: None for the Polar Express coefficients of ``ns_steps`` steps, or one
            (a, b, c) for all steps (default: None).
        path: "auto" routes by shape, and by name where names are given; "matrix", "stack" and
            "elementwise" force a path, as ``deepopt.param_groups`` does (default: "auto").
        [flags]

    State per parameter: on the matrix path 3 floats for "post", 2 for "pre", each plus 2/n for the
    rows and 1 per matrix (3 with the gate), and 4 for ``literal``; 2 on the element-wise path.
    Float32 for narrower parameters.

    Cost per m x n matrix (m <= n): ``ns_steps`` * (4 m²n + 2 m³) FLOPs, for "post" 1 + 1/f times
    as many on average; kernels take about half.

    Raises:
        ValueError: an argument out of range, named with its value.
        RuntimeError: sparse gradients, or flags that exclude each other.

    Source: Behrouz et al., *Nested Learning*, arXiv 2512.24695 v1, section 7.2, which gives none of
    the hyper-parameters; there is no official code.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        beta3: float = 0.99,
        alpha: float = 0.5,
        slow_chunk: int = 10,
        mix: Literal["post", "pre"] = "post",
        ramp: int = 500,
        gate: bool = False,
        literal: bool = False,
        row_norm: bool = True,
        update_rms: float | None = None,
        rms_cap: float = 1.5,
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
        # MultiScale checks its arguments, also for literal=True, whose memory does not.
        MultiScale(**{name: group[name] for name in MEMORY_OPTIONS})
        if group["mix"] not in MIXES:
            raise ValueError(f"Invalid mix: {group['mix']!r}; choose from {MIXES}")
        if group["literal"] and group["mix"] != "post":
            raise ValueError(
                f"Invalid mix: {group['mix']!r} with literal=True; Alg. 1 mixes after "
                "Newton-Schulz, use mix='post'"
            )
        self._output_map(group)

    def _memory(self, group: Group) -> Memory:
        if group["literal"]:
            return MultiScaleSums(group["betas"][1], group["beta3"])
        # With mix="post" the output map reads the slow momentum, and the memory the fast one alone.
        cls = MultiScale if group["mix"] == "pre" else FastOfMultiScale
        return cls(**{name: group[name] for name in MEMORY_OPTIONS})

    def _output_map(self, group: Group) -> OutputMap:
        orthogonal = Orthogonal.of(group)
        if group["mix"] == "pre":
            return orthogonal  # the memory has mixed, at the fast momentum's norm
        slow = SlowUpdate(orthogonal, group["slow_chunk"], group["capturable"])
        if group["literal"]:
            return LiteralMix(slow, group["alpha"], group["eps"])
        return MixedAfter(slow, MultiScale(**{name: group[name] for name in MEMORY_OPTIONS}))


@dataclass(frozen=True)
class SlowUpdate:
    """O2 of Alg. 1: the slow momentum, orthogonalized at the end of each chunk.

    State: 1 float per parameter.
    """

    orthogonal: Orthogonal
    chunk: int
    capturable: bool

    def init(self, like: Tensor) -> State:
        return {"slow_update": torch.zeros_like(like)}

    def __call__(self, state: State) -> Tensor:
        """The slow update of the last complete chunk.

        If this step ends a chunk, the new slow update is stored, for use from the next step on.
        """
        current, ends = state["slow_update"], state["step"] % self.chunk == 0
        orthogonalize = self.orthogonal.orthogonalize
        if self.capturable:  # a CUDA graph cannot depend on which matrices end a chunk
            new = orthogonalize(state["slow"])
            state["slow_update"] = torch.where(ends[:, None, None], new, current)
        elif ends.all():
            state["slow_update"] = orthogonalize(state["slow"])
        elif ends.any():
            rows = ends.nonzero().squeeze(-1).to(current.device, non_blocking=True)
            new = orthogonalize(state["slow"][rows])
            state["slow_update"] = current.index_copy(0, rows, new)
        return current


@dataclass(frozen=True)
class MixedAfter:
    """Newton-Schulz of the fast momentum plus the slow update at the memory's weight (Eq 75)."""

    slow: SlowUpdate
    memory: MultiScale

    def init(self, like: Tensor) -> State:
        return {**self.slow.init(like), **self.slow.orthogonal.init(like)}

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        second = self.slow(state), self.memory.weight(state, grad)
        return self.slow.orthogonal(momentum, state, grad, betas, second)


@dataclass(frozen=True)
class LiteralMix:
    """The last line of Alg. 1 as printed: the sum is divided by the root of the sum of squares."""

    slow: SlowUpdate
    alpha: float
    eps: float

    def init(self, like: Tensor) -> State:
        return self.slow.init(like)

    def __call__(self, momentum: Tensor, state: State, grad: Tensor, betas: Betas) -> Tensor:
        update = self.slow.orthogonal.orthogonalize(momentum) + self.alpha * self.slow(state)
        return update / (state["squares"].sqrt() + self.eps)
