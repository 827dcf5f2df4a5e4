"""Self-modifying memories token by token: the slow, obvious form of `deepopt.hope.scan`.

Autograd takes the inner gradients (Eq 84, Eq 85, Eq 86, Eq 87, Eq 88; Eq 92 for the dot product,
Eq 93 for a linear memory) at an anchor (Eq 90). Read it beside the equations of
`deepopt.hope.memory`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepopt.hope.memory import (
    Form,
    Gates,
    Generated,
    Initial,
    Inputs,
    MemoryState,
    Weights,
    erasures,
    features,
    generate,
    recall,
    unit,
)


def self_modifying(
    inputs: Inputs,
    generators: MemoryState,
    memory: MemoryState,
    initial: Initial,
    gates: Gates,
    form: Form,
    *,
    position: int = 0,
    valid: Tensor | None = None,
) -> tuple[Tensor, MemoryState, MemoryState]:
    """The outputs and the two states of `deepopt.hope.scan.self_modifying`, one token at a time."""
    outputs = []
    for t in range(inputs.query.shape[-1]):
        seen = Inputs(*(x[..., t : t + 1] for x in inputs))
        now = None if valid is None else valid[..., t : t + 1]
        there = None if now is None else now[:, 0, 0]
        if (position + t) % form.projection_chunk == 0:
            generators = generators.anchored(there)
        if (position + t) % form.memory_chunk == 0:
            memory = memory.anchored(there)
        token = generate(seen, generators.anchor_w2, generators.anchor_w1, gates, form, now)
        query = seen.query.unsqueeze(2)
        outputs.append(recall(memory.w2, memory.w1, query, form.memory_floor).squeeze(2))
        generators = write(generators, initial.generators, token, gates, form, now, generating=True)
        memory = write(memory, initial.memory, token, gates, form, now, generating=False)
    return torch.cat(outputs, -1), generators, memory


def write(
    state: MemoryState,
    initial: Weights | None,
    token: Generated,
    gates: Gates,
    form: Form,
    valid: Tensor | None,
    generating: bool,
) -> MemoryState:
    """All the memories of a stack after one token."""
    linear = state.w2.shape[-2] == 0
    floor = form.floor(generating)
    key, value, eta = (x.unsqueeze(2) for x in (token.key, token.value, token.eta))
    value_hat = unit(recall(state.anchor_w2, state.anchor_w1, value, floor))

    def objective(w2: Tensor, w1: Tensor) -> Tensor:
        found = recall(w2, w1, key, floor)
        if form.objective == "dot":
            return -(eta * found * value_hat).sum()
        return 0.5 * (eta * (found - value_hat).square()).sum()

    # Eq 90 takes gradients at the anchor, not at the running weights.
    grad2, grad1 = torch.func.grad(objective, (0, 1))(state.anchor_w2, state.anchor_w1)
    wrote2, wrote1 = -grad2, -grad1
    momentum1 = True
    feature = features(state.anchor_w2, key, floor)
    if form.update == "delta" and not generating:
        target = value if linear else value - key
        wrote1 = token.delta[:, :, None, None] * target @ feature.mT
        momentum1 = False

    alpha = token.log_alpha.exp()[:, :, None, None]
    theta = None if gates.theta is None else torch.sigmoid(gates.theta)[:, None, None, None]
    if theta is not None and valid is not None:  # padding leaves the momentum as it is
        theta = torch.where(valid.unsqueeze(-1).unsqueeze(-1), theta, 1.0)

    def move(
        x: Tensor, start: Tensor | None, s: Tensor | None, wrote: Tensor, y: Tensor,
        erase: Tensor | None, momentum: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if s is not None and theta is not None and momentum:
            wrote = s = theta * s + wrote
            if valid is not None:
                wrote = wrote * valid.unsqueeze(-1).unsqueeze(-1)
        moved = alpha * x + wrote
        if start is not None:
            moved = moved + (1 - alpha) * start
        if erase is not None:
            moved = moved - erase[:, :, None, None] * (x @ y) @ y.mT
        return moved, s

    erase2, erase1 = erasures(token, form, generating, linear)
    start2, start1 = (None, None) if initial is None else initial
    w2, s2 = move(state.w2, start2, state.s2, wrote2, key, erase2, True)
    w1, s1 = move(state.w1, start1, state.s1, wrote1, feature, erase1, momentum1)
    return state._replace(w2=w2, w1=w1, s2=s2, s1=s1)
