"""Operators: a function with one reference in plain torch, and backends that agree with it.

``reference`` is the function itself, and ``compiled`` the same function under ``torch.compile``.
``cpu`` and ``cuda`` are kernels of the compiled extensions, ``triton`` is Python code that launches
Triton kernels. Each call chooses anew: it takes the fastest backend of the device that supports the
arguments, and the reference where there is none. :func:`backend` and the environment variable
``DEEPOPT_BACKEND`` force a backend, for debugging. ``python -m deepopt.ops`` lists the backends.
"""

import functools
import importlib
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from deepopt._compat import constant_to_compile, has_kernel, inside_transform

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "compiled", "cpu", "cuda", "triton")
PREFERRED: dict[str, Sequence[str]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Backends by device type, best first. ``compiled`` runs on request alone, as it compiles first."""

# torch keeps an operator until the process ends. What it needs for that is kept beside it, because
# this module may be reloaded, or forgotten and imported again, as notebooks and test runners do.
_process = vars(torch.ops.deepopt)
if "_library" not in _process:
    _process.update(_library=torch.library.Library("deepopt", "DEF"), _kernels={}, _operators={})
_LIBRARY: torch.library.Library = _process["_library"]
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = _process["_kernels"]
"""What torch calls under each name: the kernel in Python, and the one that tells shapes."""

OPERATORS: dict[str, "Operator[Any, Any]"] = _process["_operators"]
UNAVAILABLE: dict[str, str] = {}
"""Why a backend is not there, as far as it can be told without asking for a GPU: ``why_not``."""


class Forced:
    """One use of :func:`backend`, which counts until it ends, wherever that happens."""

    def __init__(self, name: str, outer: "Forced | None") -> None:
        self.name, self.outer = name, outer


_forced: ContextVar[Forced | None] = ContextVar("deepopt_backend", default=None)
"""The innermost use in this thread or task; it may have ended elsewhere."""
_open: set[Forced] = set()
"""The uses that have not ended, anywhere. Operators look into the variable only where there are
any, because torch.compile does not see through it."""
_environment: str | None = None
"""The backend that ``DEEPOPT_BACKEND`` names."""
_gpu_asked = False
_told = False


class Implementation(NamedTuple):
    """A backend's own code for an operator."""

    run: Callable[..., Any]
    supports: Callable[..., bool]


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


class Operator(Generic[P, R]):
    """A function that chooses its backend; ``torch.ops.deepopt`` has it under the same name."""

    def __init__(
        self,
        reference: Callable[P, R],
        schema: str,
        supports: Callable[..., bool],
        packed: type[tuple[Any, ...]] | None = None,
        fake: Callable[..., Any] | None = None,
        gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference
        self.name = reference.__name__
        self.implementations: dict[str, Implementation] = {}
        if self.name in OPERATORS:  # as it was before a reload
            self.implementations.update(OPERATORS[self.name].implementations)
        self.supports = supports
        self._schema, self._packed = schema, packed
        self._fake, self._gradient = fake or reference, gradient
        self.overload = self._defined(self.name, reference)
        self.find_kernels()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        forced = _environment
        if _open:  # without a call, for speed, where the use that was entered last still holds
            use = _forced.get()
            forced = use.name if use is not None and use in _open else _wanted()
        chosen = forced if forced == "reference" else self.backend_for(*args, **kwargs)
        if chosen == "reference":
            return self.reference(*args, **kwargs)
        if chosen == "compiled":
            return self._compiled(*args, **kwargs)
        given: Sequence[Any] = args if self._packed is None else self._flat(args)
        result = self.implementations[chosen].run(*given, **kwargs)
        if self._mutates:  # autograd must see that the parameters, which come first, have changed
            changed: Any = args[0] if args else kwargs[self._first]
            torch.autograd.graph.increment_version(changed)
        return result

    def backend(
        self, name: str, supports: Callable[..., bool] = _always
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Decorator: the function is backend ``name``, for the arguments that it supports.

        It becomes a torch operator of its own, so that ``torch.compile`` does not trace into it.
        """

        def add(function: Callable[P, R]) -> Callable[P, R]:
            opaque = self._defined(f"{self.name}_{name}", function)
            self.implementations[name] = Implementation(opaque, supports)
            return function

        return add

    def backend_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The backend that a call with these arguments takes."""
        given = (*args, *kwargs.values()) if kwargs else args
        forced = _wanted() if _open else _environment
        hidden = _transformed() if self._gradient else _recorded(given)
        if forced == "reference" or hidden:
            return "reference"
        if forced == "compiled":
            return forced
        device = _device(given)
        if device == "cuda":
            _find_gpu()
        for name in PREFERRED.get(device, ()):
            found = self.implementations.get(name)
            if found is None or forced not in (None, name):
                continue
            if found.supports(*args, **kwargs):
                return name
        if device == "cpu" and "cpu" in UNAVAILABLE and forced is None:
            _tell_what_is_missing()
        return "reference"

    def has_backend(self, device: str) -> bool:
        """Whether tensors of this device type take another backend than the reference."""
        if device == "cuda":
            _find_gpu()
        there = [name for name in PREFERRED.get(device, ()) if name in self.implementations]
        forced = _wanted() if _open else _environment
        return forced != "reference" and any(forced in (None, name) for name in there)

    def find_kernels(self) -> None:
        """Register the kernels that the loaded extensions have for this operator."""
        for name in ("cpu", "cuda"):
            if has_kernel(self.overload.name(), name.upper()):
                self.implementations[name] = Implementation(self.overload, self.supports)

    def _defined(self, name: str, kernel: Callable[P, R]) -> Any:
        """The torch operator of this name, with this operator's schema."""
        known = name in _KERNELS
        if not known:
            _LIBRARY.define(name + self._schema)
        overload = getattr(torch.ops.deepopt, name).default
        if known and overload._schema != torch._C.parse_schema(f"deepopt::{name}{self._schema}"):
            raise RuntimeError(
                f"the operator deepopt::{name} is there with other arguments, and torch keeps them "
                f"until the process ends: start Python again (there {overload._schema}, "
                f"here {name}{self._schema})"
            )
        arguments = overload._schema.arguments
        self._mutates = any(a.alias_info and a.alias_info.is_write for a in arguments)
        self._first = arguments[0].name  # kept: torch makes all of a schema anew when asked
        run: Callable[..., Any] = self._taking_flat(kernel, len(arguments))
        fake: Callable[..., Any] = self._taking_flat(self._fake, len(arguments))
        if self._mutates:  # and returns nothing
            fake = lambda *args, **kwargs: None  # noqa: E731
        else:
            run, fake = _contiguous(run), _contiguous(fake)
        _KERNELS[name] = run, fake
        if not known:  # by way of the table, where a later import puts its own

            def run_kernel(*args: Any, **kwargs: Any) -> Any:
                return _KERNELS[name][0](*args, **kwargs)

            def run_fake(*args: Any, **kwargs: Any) -> Any:
                return _KERNELS[name][1](*args, **kwargs)

            _LIBRARY.impl(name, run_kernel, "CompositeExplicitAutograd")
            torch.library.register_fake(f"deepopt::{name}", run_fake, lib=_LIBRARY)
            if self._gradient is not None:
                save, backward = self._gradient
                torch.library.register_autograd(
                    f"deepopt::{name}", backward, setup_context=save, lib=_LIBRARY
                )
        return overload

    def _flat(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments as the schema lists them: a packed one spread out.

        It is known by its fields: its class may be the one from before a reload.
        """
        *first, last = args
        packed: Any = self._packed
        if packed is None or getattr(last, "_fields", None) != packed._fields:
            return args
        return (*first, *tuple(last))

    def _taking_flat(self, function: Callable[..., Any], count: int) -> Callable[..., Any]:
        """``function``, called with the ``count`` arguments of the schema."""
        packed: Any = self._packed
        if packed is None:
            return function
        first = count - len(packed._fields)
        return lambda *flat: function(*flat[:first], packed(*flat[first:]))

    @functools.cached_property
    def _compiled(self) -> Callable[P, R]:
        return torch.compile(self.reference, dynamic=True)


def operator(
    schema: str,
    supports: Callable[..., bool] = _always,
    packed: type[tuple[Any, ...]] | None = None,
    fake: Callable[..., Any] | None = None,
    gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Decorator: the function is the reference of an operator of its name.

    Args:
        schema: the arguments and results, as ``torch.library`` writes them after the name:
            "(Tensor a) -> Tensor".
        supports: whether the kernels of the extensions take the arguments (default: always).
        packed: type of the function's last argument, a ``NamedTuple`` whose fields are the last
            arguments of the schema: what is long is then spelled once, and passed on as one
            (default: no argument is packed).
        fake: gives results of the right shapes and no meaning, for tracing (default: the
            reference, which is traced).
        gradient: what to save and the way back, as ``torch.library.register_autograd`` takes them.
            With it, a backend runs where autograd records, too (default: there the reference
            runs, and autograd sees its operations).
    """

    def define(reference: Callable[P, R]) -> Operator[P, R]:
        made = OPERATORS[reference.__name__] = Operator(
            reference, schema, supports, packed, fake, gradient
        )
        return made

    return define


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operator on this backend, as far as it has it and it supports the arguments.

    Elsewhere the reference runs. This is for debugging and comparisons. It holds for the thread or
    the asyncio task that enters it, and for tasks that begin inside. Wherever and in whichever
    order such contexts end, each leaves what the others ask for.

    Args:
        name: "reference", "compiled", "cpu", "cuda" or "triton".

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not there, with the reason.
    """
    check_backend(name)
    use = Forced(name, _innermost())
    _open.add(use)
    _forced.set(use)
    try:
        yield
    finally:  # perhaps in another thread or task, or after others that began later
        _open.discard(use)
        _forced.set(_innermost())


def _innermost() -> Forced | None:
    """The innermost use of :func:`backend` here that has not ended."""
    use = _forced.get()
    while use is not None and use not in _open:
        use = use.outer
    return use


def _wanted() -> str | None:
    """The backend that operators must take here, if any."""
    use = _innermost()
    return _environment if use is None else use.name


def check_backend(
    name: str, argument: str = "backend", why: Callable[[str], str | None] | None = None
) -> None:
    """Raise unless ``name`` is a backend that is there, as far as ``why`` (why_not) can tell."""
    if name not in BACKENDS:
        raise ValueError(f"Invalid {argument}: {name!r}; choose from {', '.join(BACKENDS)}")
    if reason := (why or why_not)(name):
        raise RuntimeError(
            f"Invalid {argument}: {name!r} is not available: {reason}; "
            "`python -m deepopt.ops`, without DEEPOPT_BACKEND, shows what is"
        )


def why_not(name: str) -> str | None:
    """Why a backend is not there; None where it is. It asks for a GPU where that matters."""
    if name in PREFERRED["cuda"] and name not in UNAVAILABLE:
        _find_gpu()
    return UNAVAILABLE.get(name)


@constant_to_compile
def _find_gpu() -> None:
    """Take up what needs a GPU: once, at first need, because the question starts CUDA.

    A process that is forked later could not use it then, nor choose its devices.
    """
    global _gpu_asked
    if _gpu_asked:
        return
    _gpu_asked = True
    if not torch.cuda.is_available():
        for name in PREFERRED["cuda"]:
            UNAVAILABLE.setdefault(name, "torch finds no CUDA device")
    elif "triton" not in UNAVAILABLE:
        try:
            importlib.import_module("deepopt.ops.triton")
        except ImportError as error:
            UNAVAILABLE["triton"] = f"triton does not import: {error}"


@constant_to_compile
def _tell_what_is_missing() -> None:
    """Warn once where this machine could have the kernels that this installation lacks."""
    global _told
    if _told or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return
    _told = True
    warnings.warn(
        f"deepopt runs without its kernels for the CPU, which makes its steps slower: "
        f"{UNAVAILABLE['cpu']}. Install torch 2.10 or later and a C++ compiler, and then deepopt "
        "again from where it came from: pip install --no-build-isolation --no-deps "
        "--force-reinstall SOURCE. To go on without them and hear no more of it, set "
        "DEEPOPT_BACKEND=reference",
        stacklevel=2,
    )


def _load_extensions() -> None:
    """Load the compiled extensions that are there, and obey ``DEEPOPT_BACKEND``."""
    global _environment
    package = Path(__file__).resolve().parents[1]
    for name in ("cpu", "cuda"):
        built = sorted(package.glob(f"_C_{name}.*so")) + sorted(package.glob(f"_C_{name}.*pyd"))
        if not built:
            UNAVAILABLE[name] = f"deepopt._C_{name} was not built in {package}"
            continue
        try:
            torch.ops.load_library(built[0])
        except OSError as error:  # it was built for another torch, or for one with CUDA
            UNAVAILABLE[name] = f"{built[0].name} does not load: {error}"
    if not (torch.version.cuda or torch.version.hip):
        for name in PREFERRED["cuda"]:
            UNAVAILABLE.setdefault(name, "this build of torch has no CUDA")
    elif importlib.util.find_spec("triton") is None:
        UNAVAILABLE["triton"] = "triton is not installed"
    if forced := os.environ.get("DEEPOPT_BACKEND"):
        check_backend(forced, "DEEPOPT_BACKEND", UNAVAILABLE.get)
        _environment = forced


def _contiguous(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its results contiguous, as kernels return them.

    Compiled code relies on the strides that the fake kernel reports, whatever kernel runs.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if isinstance(result, tuple | list):
            return type(result)(tensor.contiguous() for tensor in result)
        return result.contiguous()

    return run


def _recorded(args: Sequence[Any]) -> bool:
    """Whether autograd, or a transform such as vmap, must see the operations inside."""
    if _transformed():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args))


def _transformed() -> bool:
    """Whether a ``torch.func`` transform must see the operations inside."""
    return not torch.compiler.is_compiling() and inside_transform()


def _device(args: Sequence[Any]) -> str:
    for arg in args:  # this runs at every call: it stops at the first tensor
        if isinstance(arg, list | tuple) and arg:
            arg = arg[0]
        if isinstance(arg, Tensor):
            return arg.device.type
    return "cpu"


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, Tensor))


_load_extensions()
