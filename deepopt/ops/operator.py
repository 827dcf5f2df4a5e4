"""Operators: a function with one reference in plain torch, and backends that agree with it.

``reference`` is the function itself, and ``compiled`` the same function under ``torch.compile``.
``cpu`` and ``cuda`` are kernels of the compiled extensions, ``triton`` is Python code that launches
Triton kernels. Each call takes the fastest backend of the device that supports its arguments, or
the reference if there is none. :func:`backend` and the environment variable
``DEEPOPT_BACKEND`` force a backend, for debugging. ``python -m deepopt.ops`` lists the backends.
"""

import functools
import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

from deepopt._compat import constant_to_compile, has_kernel, inside_transform
from deepopt._warnings import warn

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "compiled", "cpu", "cuda", "triton")
PREFERRED: dict[str, Sequence[str]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""Backends by device type, best first. ``compiled`` runs on request alone, as it compiles first."""

# torch keeps an operator until the process ends, but this module may be reloaded, or dropped and
# imported again, as notebooks and test runners do. So these tables live in torch's own namespace,
# where the new module finds them.
_process = vars(torch.ops.deepopt)
if "_library" not in _process:
    _process.update(_library=torch.library.Library("deepopt", "DEF"), _kernels={}, _operators={})
_LIBRARY: torch.library.Library = _process["_library"]
_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = _process["_kernels"]
"""What torch calls under each name: the kernel in Python, and its fake (meta) kernel."""

OPERATORS: dict[str, "Operator[Any, Any]"] = _process["_operators"]
UNAVAILABLE: dict[str, str] = {}
"""Why a backend is not available, as far as that is known without starting CUDA: ``why_not``."""


class ForcedBackend:
    """One use of :func:`backend`; it is in force until it ends, in whatever thread that is."""

    def __init__(self, name: str, outer: "ForcedBackend | None") -> None:
        self.name, self.outer = name, outer


_forced: ContextVar[ForcedBackend | None] = ContextVar("deepopt_backend", default=None)
"""The innermost use in this thread or task. It may have ended in another one: see _open_uses."""
_open_uses: set[ForcedBackend] = set()
"""The uses that have not ended, in all threads. Operators read the ContextVar only if there are
any, because torch.compile cannot trace it."""
_environment: str | None = None
"""The backend that ``DEEPOPT_BACKEND`` names."""
_gpu_asked = False
_warned_of_missing = False


SymInt = Annotated[int, "SymInt"]
"""The type of an argument whose value torch.compile may leave open, such as a position."""
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", int: "int",
    SymInt: "SymInt", float: "float", float | Tensor: "float",  # kernels take no tensor here
}  # fmt: skip


def schema_of(packed: type[tuple[Any, ...]]) -> str:
    """The part of a schema that lists the fields of a NamedTuple of arguments."""
    types = get_type_hints(packed, include_extras=True)
    return ", ".join(f"{_TYPES[type_]} {name}" for name, type_ in types.items())


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
        if self.name in OPERATORS:  # this module is reloaded, and backends have registered already
            self.implementations.update(OPERATORS[self.name].implementations)
        self.supports = supports
        self._schema, self._packed = schema, packed
        self._fake, self._gradient = fake or reference, gradient
        self.overload = self._defined(self.name, reference)
        self.find_kernels()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        forced = _environment
        if _open_uses:  # the common case of _forced_backend, inlined for speed
            use = _forced.get()
            forced = use.name if use is not None and use in _open_uses else _forced_backend()
        chosen = forced if forced == "reference" else self.backend_for(*args, **kwargs)
        if chosen == "reference":
            return self.reference(*args, **kwargs)
        if chosen == "compiled":
            return self._compiled(*args, **kwargs)
        flat_args: Sequence[Any] = args if self._packed is None else self._flat(args)
        result = self.implementations[chosen].run(*flat_args, **kwargs)
        # Kernels write through raw pointers. Autograd must learn that the parameters, which are the
        # first argument, have changed.
        if self._mutates:
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
        values = (*args, *kwargs.values()) if kwargs else args
        forced = _forced_backend() if _open_uses else _environment
        # Derivatives go through the reference, except for operators that bring their own.
        needs_reference = _inside_func_transform() if self._gradient else _needs_autograd(values)
        if forced == "reference" or needs_reference:
            return "reference"
        if forced == "compiled":
            return forced
        device = _device(values)
        if device == "cuda":
            _find_gpu()
        for name in PREFERRED.get(device, ()):
            implementation = self.implementations.get(name)
            if implementation is None or forced not in (None, name):
                continue
            if implementation.supports(*args, **kwargs):
                return name
        if device == "cpu" and "cpu" in UNAVAILABLE and forced is None:
            _warn_of_missing()
        return "reference"

    def has_backend(self, device: str) -> bool:
        """Whether tensors of this device type take another backend than the reference."""
        if device == "cuda":
            _find_gpu()
        available = [name for name in PREFERRED.get(device, ()) if name in self.implementations]
        forced = _forced_backend() if _open_uses else _environment
        return forced != "reference" and any(forced in (None, name) for name in available)

    def find_kernels(self) -> None:
        """Register the kernels that the loaded extensions have for this operator."""
        for name in ("cpu", "cuda"):
            if has_kernel(self.overload.name(), name.upper()):
                self.implementations[name] = Implementation(self.overload, self.supports)

    def _defined(self, name: str, kernel: Callable[P, R]) -> Any:
        """The torch operator of this name, with this operator's schema."""
        defined = name in _KERNELS
        if not defined:
            _LIBRARY.define(name + self._schema)
        overload = getattr(torch.ops.deepopt, name).default
        if defined and overload._schema != torch._C.parse_schema(f"deepopt::{name}{self._schema}"):
            raise RuntimeError(
                f"the operator deepopt::{name} already exists with other arguments, and torch "
                "keeps an operator until the process ends: start Python again (existing: "
                f"{overload._schema}, new: {name}{self._schema})"
            )
        arguments = overload._schema.arguments
        self._mutates = any(a.alias_info and a.alias_info.is_write for a in arguments)
        self._first = arguments[0].name  # cached: torch rebuilds a schema's objects at each access
        run: Callable[..., Any] = self._taking_flat(kernel, len(arguments))
        fake: Callable[..., Any] = self._taking_flat(self._fake, len(arguments))
        if self._mutates:  # and returns nothing
            fake = lambda *args, **kwargs: None  # noqa: E731
        else:
            run, fake = _contiguous(run), _contiguous(fake)
        _KERNELS[name] = run, fake
        # torch gets functions that look the kernels up, so that a later import can replace them.
        if not defined:

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
        """The arguments as the schema lists them: the packed one is spread out.

        The packed argument is recognized by its fields, because its class may date from before a
        reload.
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
            arguments of the schema, so that long signatures are written once (default: no
            argument is packed).
        fake: the fake kernel, which returns results of the right shapes for tracing (default: the
            reference).
        gradient: ``setup_context`` and ``backward``, as ``torch.library.register_autograd`` takes
            them. With it, backends also run when autograd records (default: the reference runs
            then, and autograd sees its operations).
    """

    def define(reference: Callable[P, R]) -> Operator[P, R]:
        made = OPERATORS[reference.__name__] = Operator(
            reference, schema, supports, packed, fake, gradient
        )
        return made

    return define


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run all operators on this backend, or on the reference if it does not support a call.

    This is for debugging and comparisons. It holds for the thread or the asyncio task that enters
    it, and for tasks that begin inside. Such contexts may end in any order and in other threads:
    those that are still open stay in force.

    Args:
        name: "reference", "compiled", "cpu", "cuda" or "triton".

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is not available; the message says why.
    """
    check_backend(name)
    use = ForcedBackend(name, _innermost_use())
    _open_uses.add(use)
    _forced.set(use)
    try:
        yield
    finally:  # perhaps in another thread or task, or after others that began later
        _open_uses.discard(use)
        _forced.set(_innermost_use())


def _innermost_use() -> ForcedBackend | None:
    """The innermost use of :func:`backend` here that has not ended."""
    use = _forced.get()
    while use is not None and use not in _open_uses:
        use = use.outer
    return use


def _forced_backend() -> str | None:
    """The backend that operators must take here, if any."""
    use = _innermost_use()
    return _environment if use is None else use.name


def check_backend(
    name: str, argument: str = "backend", why: Callable[[str], str | None] | None = None
) -> None:
    """Raise unless ``name`` is an available backend, as far as ``why`` (default: why_not) knows."""
    if name not in BACKENDS:
        raise ValueError(f"Invalid {argument}: {name!r}; choose from {', '.join(BACKENDS)}")
    if reason := (why or why_not)(name):
        raise RuntimeError(
            f"Invalid {argument}: {name!r} is not available: {reason}; "
            "`python -m deepopt.ops`, without DEEPOPT_BACKEND, shows what is"
        )


def why_not(name: str) -> str | None:
    """Why a backend is not available; None if it is. For a GPU's backends this starts CUDA."""
    if name in PREFERRED["cuda"] and name not in UNAVAILABLE:
        _find_gpu()
    return UNAVAILABLE.get(name)


@constant_to_compile
def _find_gpu() -> None:
    """Register the backends that need a GPU, when one is first needed and not on import.

    To ask for a GPU starts CUDA. A process that is forked after that can neither use CUDA nor
    choose its devices.
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
def _warn_of_missing() -> None:
    """Warn once where this machine could have the kernels that this installation lacks."""
    global _warned_of_missing
    if _warned_of_missing or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return
    _warned_of_missing = True
    warn(
        f"deepopt runs without its kernels for the CPU, which makes its steps slower: "
        f"{UNAVAILABLE['cpu']}. Install torch 2.10 or later and a C++ compiler, then reinstall "
        "deepopt: pip install --no-build-isolation --no-deps --force-reinstall SOURCE. To silence "
        "this warning and run without kernels, set DEEPOPT_BACKEND=reference"
    )


def _load_extensions() -> None:
    """Load the compiled extensions that were built, and obey ``DEEPOPT_BACKEND``."""
    global _environment
    package = Path(__file__).resolve().parents[1]
    for name in ("cpu", "cuda"):
        built = sorted(package.glob(f"_C_{name}.*so")) + sorted(package.glob(f"_C_{name}.*pyd"))
        if not built:
            UNAVAILABLE[name] = f"deepopt._C_{name} was not built in {package}"
            continue
        try:
            torch.ops.load_library(built[0])
        except OSError as error:  # built for another torch, or for one with CUDA
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


def _needs_autograd(args: Sequence[Any]) -> bool:
    """Whether autograd, forward-mode AD or a transform such as vmap must see what is inside."""
    if _inside_func_transform():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args))


def _inside_func_transform() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD must see the operations inside."""
    return not torch.compiler.is_compiling() and inside_transform()


def _device(args: Sequence[Any]) -> str:
    """The device type of the first tensor."""
    for arg in args:  # a loop that stops at the first tensor, because it runs at every call
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
