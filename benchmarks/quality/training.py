"""One training run of one workload by one optimizer, for all of them the same."""

import ast
import dataclasses
import hashlib
import itertools
import math
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.quality.contenders import CONTENDERS, Setting, build
from benchmarks.quality.workload import find
from deepopt.hope.trainer import MAX_GRAD_NORM, lr_factor

WARMUP_SHARE = 16
"""A sixteenth of the steps is warm-up; then the rates fall linearly to zero."""
CURVE_POINTS = 20
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What tells one run from another."""

    workload: str
    contender: str
    setting: Setting
    seed: int
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.workload}, {self.contender}, {self.setting}, seed {self.seed}, "
            f"{self.steps} steps"
        )

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Run":
        """The run of a line."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{**{n: line[n] for n in names}, "setting": Setting(**line["setting"])})


Lines = Mapping[Run, Line]


def circumstances(run: Run) -> Line:
    """What the outcome depends on besides the run itself and the package's code.

    Raises:
        Unavailable: the workload has no data here.
    """
    workload, contender = find(run.workload), CONTENDERS[run.contender]
    decisive = (code(workload.source), repr(contender), WARMUP_SHARE, MAX_GRAD_NORM)
    return {
        "config": hashlib.sha256(repr(decisive).encode()).hexdigest()[:16],
        "data": workload.sha256(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def code(source: str) -> str:
    """A program without its comments and docstrings, which change no number."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        has_docstring = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, has_docstring) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def execute(run: Run) -> Line:
    """Train and measure; the run with its circumstances and its outcome."""
    workload = find(run.workload)
    line: Line = {**dataclasses.asdict(run), "setting": run.setting._asdict()}
    line |= circumstances(run)
    torch.manual_seed(run.seed)
    model = workload.model()
    line["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        optimizer = build(model, run.contender, run.setting)
    except ValueError as error:
        return {**line, "refused": str(error).partition(";")[0]}
    try:
        line |= train(run, model, optimizer)
    except FloatingPointError as error:
        return {**line, "diverged": str(error)}
    state = sum(
        value.numel() * value.element_size()
        for entries in optimizer.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor)
    )
    return {**line, "state_bytes": state, "metrics": workload.metrics(model.eval())}


def train(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> Line:
    """The curve of the training loss, and CPU seconds of the whole and of the optimizer's steps.

    Raises:
        FloatingPointError: a loss or the norm of a gradient is not finite.
    """
    workload, losses, stepping = find(run.workload), [], 0.0
    began = time.process_time()
    for step in range(run.steps):
        factor = lr_factor(step, run.steps, run.steps // WARMUP_SHARE)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad()
        loss = workload.loss(model, workload.data(run.seed, step))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm.item()):
            raise FloatingPointError(f"not finite after {step} steps")
        before = time.process_time()
        optimizer.step()
        stepping += time.process_time() - before
    return {
        "curve": [round(x, 5) for x in binned(losses, CURVE_POINTS)],
        "cpu_seconds": round(time.process_time() - began, 3),
        "optimizer_cpu_seconds": round(stepping, 3),
    }


def binned(values: list[float], bins: int) -> list[float]:
    """Means of equal parts of the values, in order."""
    ends = [len(values) * k // bins for k in range(bins + 1)]
    parts = [values[start:end] for start, end in itertools.pairwise(ends)]
    return [statistics.fmean(part) for part in parts if part]


def value(line: Line, metric: str = "val_loss") -> float:
    """A metric of a line, infinite for a run that did not end well."""
    found = line.get("metrics", {}).get(metric, math.inf)
    return math.inf if math.isnan(found) else found
