"""What a case is, how it is run, and the form of what it finds: lines and rows of JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, final

from benchmarks.timing import Clock, Summary


class Counts(TypedDict):
    """A contender's work, counted by hand, and the time that it asks of the machine."""

    bytes: float
    flops: float
    least_flops: float
    traffic_seconds: float
    product_seconds: float
    roofline_seconds: float


class _Raced(Summary, Counts):
    contender: str


@final
class RaceRow(_Raced, total=False):
    """A contender of a race: its times and its work."""

    products_share: float


@final
class NotRun(TypedDict):
    """A contender of another package that raised an error."""

    contender: str
    not_run: str


class Found(TypedDict, total=False):
    """What a case finds: a race, a table of details, or both."""

    rates: dict[str, float]
    clock: Clock
    rows: list[RaceRow | NotRun]
    details: Sequence[Mapping[str, Any]]
    """Rows of a form that the case defines; their keys are the headings of the table."""
    exponent: float


class Conditions(TypedDict):
    """What a time depends on besides the run and the code."""

    device: str
    device_name: str
    quick: bool
    torch: str
    python: str


class Line(Conditions, Found):
    """A line of ``speed.jsonl``."""

    case: str
    threads: int
    code_sha256: str


@dataclass(frozen=True)
class Setting:
    """How a case is run."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False

    def seconds(self, full: float) -> float:
        return full / 20 if self.quick else full


@dataclass(frozen=True)
class Target:
    """A number of a case, computed from its line, and its bound."""

    what: str
    value: Callable[[Found], float]
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Case:
    title: str
    run: Callable[[Setting], Found]
    """In a process of its own, with the threads set."""
    targets: Sequence[Target] = ()
    baseline: str = ""
    """The contender whose time is 1."""
    threads: Sequence[int] = (1, 2)
    note: str = ""


class Run(NamedTuple):
    """A case on so many threads."""

    case: str
    threads: int
