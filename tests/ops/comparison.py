"""Runs an entry of the table on a backend, and compares it with its reference in float64."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deepopt.ops import backend
from deepopt.ops.operator import OPERATORS, why_not
from deepopt.ops.products import LONGEST, SHORTEST
from deepopt.ops.rounding import to_fp32
from tests.ops.parity import EPS, TABLE, Arguments, Shape, kept, mapped

DEVICES = {"cuda": "cuda", "triton": "cuda"}


def in_double(name: str, arguments: Arguments) -> Arguments:
    """The same numbers in float64, bfloat16 parameters with the low bits that they have."""
    own = copy.deepcopy(arguments)
    given = mapped(own, lambda x: x.double() if x.is_floating_point() else x)
    given = [torch.float64 if x is torch.float32 else x for x in given]
    if at := TABLE[name].lows:
        given[0] = [x.double() for x in masters(name, own)]
        given[at], given[at + 1] = [], []
    return given


def masters(name: str, arguments: Arguments) -> list[Tensor]:
    """The parameters, and where they have low bits the numbers that they stand for."""
    params, lows = arguments[0], arguments[TABLE[name].lows]
    if not lows or params[0].dtype != torch.bfloat16:
        return params
    pairs = zip(params, lows, strict=True)
    return [to_fp32(param, torch.float32, low) for param, low in pairs]


def results(name: str, arguments: Arguments, result: Any) -> list[Tensor]:
    """What is returned or written."""
    if not (written := TABLE[name].written):
        return list(result) if isinstance(result, list | tuple) else [result]
    return [*masters(name, arguments), *(x for i in written[1:] for x in arguments[i])]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is not written to holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(name: str, backend_name: str, arguments: Arguments) -> list[Tensor]:
    """The results; the arguments stay as they are."""
    own, device = copy.deepcopy(arguments), DEVICES.get(backend_name, "cpu")
    own = [
        value if index == TABLE[name].on_host else mapped(value, lambda x: x.to(device))
        for index, value in enumerate(own)
    ]
    with backend(backend_name), poisoned():
        assert OPERATORS[name].backend_for(*own) == backend_name
        result = OPERATORS[name](*own)
    return [x.cpu() for x in results(name, own, result)]


def check(name: str, backend_name: str, shape: Shape) -> None:
    case = TABLE[name]
    arguments = case.arguments(fitting(name, shape))
    double = in_double(name, arguments)
    bounds = case.bounds(copy.deepcopy(double), backend_name)
    exact = results(name, double, OPERATORS[name].reference(*double))
    found = run(name, backend_name, arguments)
    if shape.dtype == torch.float64:  # both are in double
        bounds = [2 * torch.finfo(torch.float64).eps / EPS * bound for bound in bounds]
    if case.written:
        for index, param in enumerate(arguments[0]):
            largest = exact[index].abs() + bounds[index]
            bounds[index] += kept(param, largest, shape.rounding)
    for index, (ours, theirs, bound) in enumerate(zip(found, exact, bounds, strict=True)):
        assert ours.shape == theirs.shape
        wrong = (ours.double() - theirs).abs() - bound
        assert (wrong <= 0).all(), f"result {index} is off by {wrong.max()} more than {bound.max()}"


def fitting(name: str, shape: Shape) -> Shape:
    """The shape, cut to what counts as small for what takes nothing else, wide or tall by seed."""
    if TABLE[name].small:
        batch, *sides = shape.sizes
        most = (SHORTEST - 1, LONGEST) if shape.seed % 2 else (LONGEST, SHORTEST - 1)
        shape.sizes = (batch, *map(min, sides, most))
    return shape


def available(name: str, backend_name: str) -> None:
    if reason := why_not(backend_name):
        pytest.skip(reason)
    if backend_name not in ("reference", *OPERATORS[name].implementations):
        pytest.skip("not written for this backend")
    if TABLE[name].small and backend_name in DEVICES:
        pytest.skip("leaves small matrices to the reference")
