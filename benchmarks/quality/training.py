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
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deepopt
from benchmarks.quality.contenders import CONTENDERS, Setting, build, package
from benchmarks.quality.workload import find
from benchmarks.runs import Line
from deepopt.hope.cms import levels_of
from deepopt.hope.optimizers import MAX_GRAD_NORM, clipped, lr_factor, prepare
from deepopt.optim import Continuum

WARMUP_SHARE = 16
"""A sixteenth of the steps is warm-up; then the rates fall linearly to zero."""
CURVE_POINTS = 20


@dataclass(frozen=True)
class Run:
    """What tells one run from another.

    Attributes:
        workload: its name or path.
        contender: a key of ``CONTENDERS``.
        setting: what is tuned.
        seed: seed of the weights and the batches.
        steps: optimizer steps.
        batch: batches of the workload in a step; the gradient is that of their mean loss.
        device: where the model is.
    """

    workload: str
    contender: str
    setting: Setting
    seed: int
    steps: int
    batch: int = 1
    device: str = "cpu"

    def __str__(self) -> str:
        batch = f" of {self.batch} batches" if self.batch > 1 else ""
        return (
            f"{self.workload}, {self.contender}, {self.setting}, seed {self.seed}, "
            f"{self.steps} steps{batch}"
        )

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "Run":
        """The run of a line, also of one from before there were ``batch`` and ``device``."""
        known = {f.name: line[f.name] for f in dataclasses.fields(cls) if f.name in line}
        return cls(**{**known, "setting": Setting(**line["setting"])})


Lines = Mapping[Run, Line]


def circumstances(workload: str, contender: str) -> Line:
    """What the outcome of a run depends on besides the run itself and the package's code.

    Raises:
        Unavailable: the workload has no data here, or the optimizer's package is not installed.
    """
    work, entry = find(workload), CONTENDERS[contender]
    decisive = (code(work.source), repr(entry), WARMUP_SHARE, MAX_GRAD_NORM)
    found = package(contender)
    return {
        "config": hashlib.sha256(repr(decisive).encode()).hexdigest()[:16],
        "data": work.sha256(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"package": found} if found else {}),
    }


@cache
def package_digest() -> str:
    """Of the package's Python files: it tells which state of the code made a line."""
    folder = Path(deepopt.__file__).parent
    files = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def code(source: str) -> str:
    """A program without its comments and docstrings, which change no number."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        has_docstring = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, has_docstring) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def execute(run: Run) -> Line:
    """Train and measure; the run with its circumstances and its outcome.

    Raises:
        ValueError: the model has levels that count tokens, and the batches have none.
    """
    workload = find(run.workload)
    line: Line = {**dataclasses.asdict(run), "setting": run.setting._asdict()}
    line |= circumstances(run.workload, run.contender)
    line |= {"deepopt": package_digest(), "cpu": torch.backends.cpu.get_cpu_capability()}
    torch.manual_seed(run.seed)
    model = workload.model().to(run.device)
    tokens = tokens_of_step(run, model)
    line["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        optimizer = build(model, run.contender, run.setting, run.steps, tokens)
    except ValueError as error:
        return {**line, "refused": str(error).partition(";")[0]}
    switch(optimizer, "train")
    try:
        line |= train(run, model, optimizer)
    except FloatingPointError as error:
        return {**line, "diverged": str(error)}
    switch(optimizer, "eval")
    line["state_bytes"] = sum(map(tensor_bytes, optimizer.state.values()))
    return {**line, "metrics": workload.metrics(model.to("cpu").eval())}


def tokens_of_step(run: Run, model: nn.Module) -> int:
    """What the chunks of the model's levels count: the tokens of a step; 1 without levels."""
    if not levels_of(model):
        return 1
    tokens = getattr(find(run.workload).data(run.seed, 0), "tokens", None)
    if not isinstance(tokens, torch.Tensor):
        raise ValueError(
            f"workload={run.workload!r}: its model has levels that learn at the end of a chunk of "
            "tokens; data must return a batch with its tokens, as language.Text has them"
        )
    return tokens.numel() * run.batch


def switch(optimizer: Continuum, mode: str) -> None:
    """Training or evaluation of an optimizer that evaluates averaged weights, as Schedule-Free."""
    if callable(own := getattr(optimizer.optimizer, mode, None)):
        own()


def train(run: Run, model: nn.Module, optimizer: Continuum) -> Line:
    """The curve of the training loss, and seconds of the whole and of the optimizer's steps.

    They are CPU seconds; on another device, seconds until it has finished its work.

    Raises:
        FloatingPointError: a loss or the norm of a gradient is not finite.
    """
    workload, losses, stepping = find(run.workload), [], 0.0
    warmup, decays = run.steps // WARMUP_SHARE, CONTENDERS[run.contender].rate_decays
    began = clock(run.device)
    for step in range(run.steps):
        prepare([optimizer], lr_factor(step if decays else min(step, warmup), run.steps, warmup))
        parts = []
        for number in range(run.batch):
            batch = moved(workload.data(run.seed, step * run.batch + number), run.device)
            loss = workload.loss(model, batch) / run.batch
            loss.backward()
            parts.append(loss.item())
        losses.append(sum(parts))
        with clipped([optimizer], model) as norm:
            if not math.isfinite(losses[-1] + norm.item()):
                raise FloatingPointError(f"not finite after {step} steps")
            before = clock(run.device)
            optimizer.optimizer.step()
            stepping += clock(run.device) - before
    seconds = "cpu_seconds" if run.device == "cpu" else "device_seconds"
    return {
        "curve": [round(x, 5) for x in binned(losses, CURVE_POINTS)],
        seconds: round(clock(run.device) - began, 3),
        f"optimizer_{seconds}": round(stepping, 3),
    }


def clock(device: str) -> float:
    """Seconds of this process on the CPU, or wall seconds once another device has finished."""
    if device == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def moved(batch: Any, device: str) -> Any:
    """The tensors of a batch on a device: a tensor, or some in a tuple, a list or a dict."""
    if device == "cpu" or not isinstance(batch, torch.Tensor | tuple | list | dict):
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: moved(part, device) for key, part in batch.items()}
    parts = [moved(part, device) for part in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in an optimizer's state, which may be nested."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(tensor_bytes, parts)) if isinstance(value, dict | list | tuple) else 0


def binned(values: list[float], bins: int) -> list[float]:
    """Means of equal parts of the values, in order."""
    ends = [len(values) * k // bins for k in range(bins + 1)]
    parts = [values[start:end] for start, end in itertools.pairwise(ends)]
    return [statistics.fmean(part) for part in parts if part]


def value(line: Line, metric: str = "val_loss") -> float:
    """A metric of a line, infinite for a run that did not end well."""
    found = line.get("metrics", {}).get(metric, math.inf)
    return math.inf if math.isnan(found) else found
