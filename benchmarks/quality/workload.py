"""What a workload is: four functions, and where the named ones are."""

import dataclasses
import functools
import hashlib
import importlib
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HELD_OUT = -1
"""The seed of the batches that no run trains on, where a workload has no metrics of its own."""
HELD_OUT_BATCHES = 16
WORKLOADS = Path(__file__).parent / "workloads"


class Unavailable(Exception):
    """The data of a workload is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Workload:
    """A task to train on; see :func:`workload`.

    ``source`` is the text of the file it is from, with those of the workloads that it imports.
    """

    data: Callable[[int, int], Any]
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    metrics: Callable[[nn.Module], dict[str, float]]
    steps: int
    seeds: int
    about: str
    sha256: Callable[[], str]
    source: str = ""


def workload(
    *,
    data: Callable[[int, int], Any],
    model: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Any], Tensor],
    metrics: Callable[[nn.Module], dict[str, float]] | None = None,
    steps: int = 200,
    seeds: int = 3,
    about: str = "",
    sha256: Callable[[], str] | None = None,
) -> Workload:
    """A workload for ``python -m benchmarks quality``, from a model of your own.

    Args:
        data: the batch of a seed and a step, a function of the two alone. Seed -1 is for the
            default ``metrics``: it should give data that no other seed gives.
        model: makes the untrained model; its random numbers are torch's, seeded before the call.
        loss: the loss of the model on a batch, which training makes small.
        metrics: measures the trained model; a dict by name, smaller is better; ``val_loss`` is
            what optimizers are compared by. None for the mean loss on 16 batches of seed -1
            (default: None).
        steps: optimizer steps of a run (default: 200).
        seeds: paired runs of a swap at each rate (default: 3).
        about: what the task is, for the report (default: "").
        sha256: the digest of the data: a line of results counts while it stays the same. None for
            that of the first batch of seed 0 (default: None).

    Returns:
        The workload. Called ``WORKLOAD`` in a file of yours, the command takes the file's path.
    """

    @torch.no_grad()
    def held_out(trained: nn.Module) -> dict[str, float]:
        losses = [loss(trained, data(HELD_OUT, step)).item() for step in range(HELD_OUT_BATCHES)]
        return {"val_loss": sum(losses) / len(losses)}

    return Workload(
        data,
        model,
        loss,
        metrics or held_out,
        steps,
        seeds,
        about,
        sha256 or (lambda: digest(data(0, 0))),
    )


def digest(batch: Any) -> str:
    """The sha256 of the tensors in a batch: a tensor, or some in a tuple, a list or a dict."""
    sha = hashlib.sha256()
    parts = [batch]
    while parts:
        part = parts.pop()
        if isinstance(part, Tensor):
            sha.update(repr((part.shape, part.dtype)).encode() + part.cpu().numpy().tobytes())
        else:
            parts.extend(part.values() if isinstance(part, dict) else part)
    return sha.hexdigest()


@functools.cache
def find(name: str) -> Workload:
    """The workload of a name in ``benchmarks/quality/workloads``, or of a file's path.

    Raises:
        ValueError: there is none.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"workload={name!r}: no such file")
        try:
            found = runpy.run_path(name).get("WORKLOAD")
        except (ImportError, NameError, SyntaxError) as error:
            raise ValueError(
                f"workload={name!r}: the file cannot be run ({type(error).__name__}: {error})"
            ) from error
    else:
        if name not in built_in():
            raise ValueError(
                f"workload={name!r} is unknown; choose from {', '.join(built_in())}, or give the "
                "path of a .py file"
            )
        path = WORKLOADS / f"{name}.py"
        found = importlib.import_module(f"benchmarks.quality.workloads.{name}").WORKLOAD
    if not isinstance(found, Workload):
        raise ValueError(
            f"workload={name!r}: the file needs WORKLOAD = benchmarks.workload(...), and has "
            f"{found!r}"
        )
    return dataclasses.replace(found, source=_source(path))


def _source(path: Path) -> str:
    """The text of a workload's file and of the package's workloads that it builds on."""
    text = path.read_text()
    package = r"^from benchmarks\.quality\.workloads"
    names = re.findall(rf"{package}\.(\w+) import", text, re.M)
    for several in re.findall(rf"{package} import (.+)$", text, re.M):
        names += several.split(", ")
    return text + "".join(_source(WORKLOADS / f"{name}.py") for name in names)


def built_in() -> list[str]:
    """The names of the package's own."""
    return sorted(path.stem for path in WORKLOADS.glob("[!_]*.py"))
