"""Races of the element-wise path against torch's AdamW."""

from collections.abc import Callable, Sequence

import torch
from torch.optim import AdamW

from benchmarks import work
from benchmarks.speed.case import Found, Setting
from benchmarks.speed.optimizers import LR, Make, Shapes, contender, deep_adamw, gradients
from benchmarks.speed.race import race
from benchmarks.timing import Contender
from benchmarks.work import Work


def elementwise(
    shapes: Shapes,
    seconds: float,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = ("AdamW fused", "AdamW foreach", "AdamW default"),
) -> Callable[[Setting], Found]:
    """A race of the element-wise path against torch's AdamW."""

    def run(setting: Setting) -> Found:
        grads = gradients(shapes, dtype, setting.device)
        elements, width = sum(grad.numel() for grad in grads), dtype.itemsize
        torchs = work.adamw(elements, width, width)
        known: dict[str, tuple[Make, Work]] = {
            "AdamW fused": (lambda p: AdamW(p, lr=LR, fused=True), torchs),
            "AdamW foreach": (lambda p: AdamW(p, lr=LR, foreach=True), torchs),
            "AdamW default": (lambda p: AdamW(p, lr=LR), torchs),
        }
        chosen = {name: known[name] for name in names}
        chosen["DeepMomentum"] = (deep_adamw(LR), work.adamw(elements, width))

        def factory(name: str) -> Callable[[], Contender]:
            make, phases = chosen[name]
            return lambda: contender(name, make, grads, phases, phases)

        return race({name: factory(name) for name in chosen}, seconds, setting)

    return run
