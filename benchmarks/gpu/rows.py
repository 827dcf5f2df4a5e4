"""What is measured on a GPU, and what each row of it should take: one table for both.

``docs/roofline.md`` is written from it before a measurement, and ``make gpu`` divides what it
measures by the same numbers.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from benchmarks import work
from benchmarks.gpu.muon import CompiledMuon
from benchmarks.speed.optimizers import LR, Make, deep, deep_adamw, m3, torch_muon
from benchmarks.work import Work


@dataclass(frozen=True)
class RacedOptimizer:
    """An optimizer in a race, and the least work of one of its steps."""

    make: Make
    work: Work
    period: int = 1
    """Steps after which its work repeats."""


@dataclass(frozen=True)
class SpeedGoal:
    """A bound on a contender's time, as a share of another's."""

    contender: str
    baseline: str
    limit: float


@dataclass(frozen=True)
class Race:
    """Contenders on the same parameters."""

    title: str
    shapes: Sequence[tuple[int, ...]]
    contenders: Mapping[str, RacedOptimizer]
    dtype: torch.dtype = torch.float32
    goals: Sequence[SpeedGoal] = ()
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    """Contenders that should reach a share of the copy's bandwidth."""


def elementwise(
    title: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32, **about: Any
) -> Race:
    entries, width = sum(torch.Size(shape).numel() for shape in shapes), dtype.itemsize
    contenders = {
        "AdamW fused": RacedOptimizer(
            lambda p: AdamW(p, lr=LR, fused=True), work.adamw(entries, width, width)
        ),
        "DeepMomentum": RacedOptimizer(deep_adamw(LR), work.adamw(entries, width)),
    }
    return Race(
        title, shapes, contenders, dtype, (SpeedGoal("DeepMomentum", "AdamW fused", 1.0),), **about
    )


def on_matrices(title: str, width: int, layers: int, device: str) -> Race:
    shapes = work.transformer(width, layers)

    def least(rule: Callable[..., Work], **options: Any) -> Work:
        return work.over(shapes, functools.partial(rule, least=True, **options))

    contenders = {
        "torch Muon": RacedOptimizer(torch_muon, work.over(shapes, work.muon)),
        "linear": RacedOptimizer(deep("linear"), least(work.linear)),
        "delta": RacedOptimizer(deep("delta"), least(work.delta)),
        "mlp": RacedOptimizer(deep("mlp"), least(work.mlp)),
        "covariance": RacedOptimizer(
            deep("covariance"), least(work.covariance, split=device != "cpu"), work.PERIOD
        ),
        "M3": RacedOptimizer(m3, least(work.m3), work.PERIOD),
    }
    limits = {"linear": 0.60, "delta": 0.70, "mlp": 0.90, "covariance": 1.20}
    goals = [SpeedGoal(name, "torch Muon", limit) for name, limit in limits.items()]
    return Race(title, shapes, contenders, goals=goals)


def against_compiled(race: Race) -> Race:
    """The same matrices, beside a Muon that inductor compiles, which takes its time to do so."""
    muon = RacedOptimizer(lambda p: CompiledMuon(p, lr=LR), race.contenders["torch Muon"].work)
    ours = {name: race.contenders[name] for name in ("linear", "delta")}
    return Race(race.title, race.shapes, {"compiled Muon": muon, **ours})


def races(quick: bool = False, device: str = "cuda") -> dict[str, Race]:
    """All races by name, with the work of a device; ``quick`` on a few entries, to rehearse."""
    wide = [(64, 64)] * 2 if quick else [(2**13, 2**13)] * 4
    small, xl = ((64, 1), (80, 1)) if quick else ((768, 12), (1600, 12))
    gpt2 = on_matrices("GPT-2-small's matrices, 85 M parameters", *small, device)
    return {
        "adamw-large": elementwise(
            "4 tensors of 2¹³ x 2¹³, float32", wide, bandwidth={"DeepMomentum": 0.85}
        ),
        "adamw-bf16": elementwise(
            "4 tensors of 2¹³ x 2¹³, bfloat16 (torch's state is bfloat16 too, ours float32)",
            wide,
            torch.bfloat16,
            bandwidth={"DeepMomentum": 0.85},
        ),
        "adamw-400": elementwise("400 tensors of 2,080 entries", [(2080,)] * (4 if quick else 400)),
        "gpt2-small": gpt2,
        "gpt2-small-compiled": against_compiled(gpt2),
        "gpt2-xl": on_matrices(
            "matrices of 12 of GPT-2-XL's 48 layers, 369 M parameters", *xl, device
        ),
    }


def write_line(folder: Path, line: Mapping[str, Any]) -> None:
    """Append a result to the folder's lines, at once."""
    with open(folder / "rows.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
