"""One task, trained by many candidates at once with the package's own optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepopt.memory import AnyMemory
from deepopt.meta.tasks import Task
from deepopt.optim import DeepMomentum

SIZE = 0.2
"""The update's root mean square, fixed: horizons then decide on directions alone."""
REST_LR = 0.005
"""The learning rate of heads and embeddings, the same for every candidate."""
WORST = 1e3
"""The loss of a run that is not finite."""


def train(
    task: Task, memory: AnyMemory, lr: float, beta: float = 0.9, phis: Tensor | None = None
) -> Tensor:
    """The log of the loss that every candidate reaches, shape (P,).

    On a stream it is the mean online loss over the second half, otherwise that of the last tenth,
    where the rate has decayed; batches are new, so that it is no loss on what was learned already.

    Args:
        task: what is learned.
        memory: of the matrices' gradients.
        lr: the matrices' peak learning rate.
        beta: the memory's retention (default: 0.9).
        phis: the candidates, (P, ...), for the memory's entry "phi"; None for the memory as it is,
            P = 1 (default: None).
    """
    count = 1 if phis is None else len(phis)
    params = {
        name: weight.expand(count, *weight.shape).clone().requires_grad_()
        for name, weight in task.weights().items()
    }
    rest = [param for name, param in params.items() if name != "matrices"]
    optimizer = DeepMomentum(
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
        found: tuple[Mapping[str, Tensor], Tensor] = step_of_all(
            {name: param.detach() for name, param in params.items()}, task.batch(step)
        )
        grads, losses = found
        if step in measured:
            total += losses.nan_to_num(WORST, WORST).clamp_max(WORST)
        for name, param in params.items():
            param.grad = grads[name]
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * task.rate(step)
        optimizer.step()
        if step == 0 and phis is not None:
            state = optimizer.state[params["matrices"]]
            each = params["matrices"].shape[1]
            for key in {"phi", "phi0"} & state.keys():
                state[key] = phis.to(state[key]).repeat_interleave(each, 0)
    return (total / len(measured)).log()
