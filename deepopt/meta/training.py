"""One task, trained by many candidates at once with the package's own optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepopt.memory import AnyMemory
from deepopt.meta.gains import Gains, with_gains
from deepopt.meta.tasks import Task
from deepopt.optim import DeepMomentum

SIZE = 0.2
"""The update's root mean square. It is fixed, so that memories are judged by directions alone."""
REST_LR = 0.005
"""The learning rate of heads and embeddings, the same for every candidate."""
WORST = 1e3
"""The loss of a run that is not finite."""


def train(
    task: Task,
    memory: AnyMemory,
    lr: float,
    beta: float = 0.9,
    phis: Tensor | None = None,
    gains: Gains | None = None,
) -> Tensor:
    """The log of the loss that every candidate reaches, shape (P,).

    On a stream it is the mean online loss over the second half of the steps; otherwise over the
    last tenth, where the rate has decayed. Batches are always new, so this is not the loss on data
    that was trained on.

    Args:
        task: what is learned.
        memory: the memory of the matrices' gradients.
        lr: the matrices' peak learning rate.
        beta: the memory's retention (default: 0.9).
        phis: the candidates, (P, ...), for the state entry "phi"; None for the memory as it is, and
            P = 1 (default: None).
        gains: gains applied to the matrices' updates after Newton-Schulz; None for none
            (default: None).
    """
    count = 1 if phis is None else len(phis)
    params = {
        name: weight.expand(count, *weight.shape).clone().requires_grad_()
        for name, weight in task.weights().items()
    }
    rest = [param for name, param in params.items() if name != "matrices"]
    optimizer = (with_gains(gains) if gains else DeepMomentum)(
        [
            {"params": [params["matrices"]], "path": "stack", "lr": lr, "betas": (beta, 0.99)},
            {"params": rest, "path": "elementwise", "lr": REST_LR, "betas": (0.9, 0.99)},
        ],
        memory=memory,
        update_rms=SIZE,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    step_of_all = torch.func.vmap(torch.func.grad_and_value(task.loss), in_dims=(0, None))
    measured = range(task.steps // 2 if task.period else task.steps * 9 // 10, task.steps)
    total = torch.zeros(count)
    for step in range(task.steps):
        output: tuple[Mapping[str, Tensor], Tensor] = step_of_all(
            {name: param.detach() for name, param in params.items()}, task.batch(step)
        )
        grads, losses = output
        if step in measured:
            total += losses.nan_to_num(WORST, WORST).clamp_max(WORST)
        for name, param in params.items():
            param.grad = grads[name]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * task.rate(step)
        optimizer.step()
        # The state exists only now: all candidates take the first step with the memory's own φ.
        if step == 0 and phis is not None:
            state = optimizer.state[params["matrices"]]
            per_candidate = params["matrices"].shape[1]
            for key in {"phi", "phi0"} & state.keys():
                state[key] = phis.to(state[key]).repeat_interleave(per_candidate, 0)
    return (total / len(measured)).log()
