"""Importing the package changes nothing but ``sys.modules``, and it can be imported again."""

import os
import subprocess
import sys

import pytest

# Every module of the package, but for the commands, the extensions, which torch loads, and what
# needs transformers.
EVERYTHING = """
import importlib, pkgutil
def import_everything():
    import deepopt
    for found in pkgutil.walk_packages(deepopt.__path__, "deepopt."):
        if not found.name.endswith(("__main__", ".huggingface")) and "._C_" not in found.name:
            importlib.import_module(found.name)
"""
# A step of every optimizer that takes parameters, with matrices and vectors.
STEP = """
import deepopt, torch
def stepped(optimizer, params):
    for param in params:
        param.grad = torch.ones_like(param)
    before = [param.clone() for param in params]
    optimizer.step()
    assert not any(map(torch.equal, before, params))
def fresh(name="deep_momentum", **options):
    shapes = (20, 24), (64, 64), (7,)  # matrices of which kernels take both, or the small one
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    if name == "delta_gradient_descent":
        params, options = params[:2], {"decay_scale": 0}  # as there are no inputs
    return deepopt.optimizers()[name].cls(params, lr=0.1, **options), params
def every_optimizer_steps():
    for name, entry in deepopt.optimizers().items():
        if not entry.wraps:
            stepped(*fresh(name))
    for memory in deepopt.memory.BUILT_IN:
        stepped(*fresh(memory=memory))
"""
AGAIN = {
    "purged": "for name in names: del sys.modules[name]\nimport_everything()",
    "reloaded": "for name in names: importlib.reload(sys.modules[name])",
    "reloaded backwards": "for name in names[::-1]: importlib.reload(sys.modules[name])",
}


def run(code: str, folder, flags=(), **environment: str) -> str:
    command = [sys.executable, "-W", "error", *flags, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """An empty folder to run in; the package is found where the tests find it."""
    import deepopt

    monkeypatch.setenv("PYTHONPATH", os.path.dirname(os.path.dirname(deepopt.__file__)))
    (tmp_path / "outside").mkdir()
    return tmp_path / "outside"


def test_importing_asks_nothing_of_cuda(outside):
    """A question starts its driver, and a process that is forked later cannot use it then."""
    code = """
import inspect, torch
asked = []
def recorded(name, function):
    def inner(*args, **kwargs):
        asked.append(name)
        return function(*args, **kwargs)
    return inner
for name, function in list(vars(torch.cuda).items()):
    if inspect.isfunction(function) and not name.startswith("__"):
        setattr(torch.cuda, name, recorded(name, function))
import_everything()
print(asked)
"""
    assert run(EVERYTHING + code, outside) == "[]"


@pytest.mark.parametrize("how", AGAIN)
def test_imported_again_everything_is_there_and_works(outside, how):
    code = f"""
import sys
import_everything()
every_optimizer_steps()
def there():
    from deepopt.ops.operator import BACKENDS, OPERATORS, UNAVAILABLE, backend
    operators = [(name, o.name, sorted(o.implementations)) for name, o in OPERATORS.items()]
    return deepopt.optimizers().keys(), deepopt.memory.BUILT_IN.keys(), operators, UNAVAILABLE
before = there()
optimizer, params = fresh()
stepped(optimizer, params)

names = sorted(name for name in sys.modules if name.partition(".")[0] == "deepopt")
{AGAIN[how]}
import deepopt
assert there() == before, (there(), before)
places = sys.modules["deepopt.ops"].__path__
assert len(set(places)) == len(places)
every_optimizer_steps()
stepped(optimizer, params)  # one that was made before
deepopt.hope.Hope(deepopt.hope.HopeConfig(dim=16, layers=1, heads=1))(torch.zeros(1, 4).long())
print("works")
"""
    assert run(EVERYTHING + STEP + code, outside, DEEPOPT_BACKEND="") == "works"


def test_torch_calls_what_was_imported_last(outside):
    code = """
import sys, torch
from deepopt.ops.operator import operator
def define(number):
    from deepopt.ops.operator import operator
    @operator("(Tensor given) -> Tensor")
    def plus(given):
        return given + number
define(1)
for name in [name for name in sys.modules if name.partition(".")[0] == "deepopt"]:
    del sys.modules[name]
define(2)
print(torch.ops.deepopt.plus(torch.zeros(())).item())
"""
    assert run(code, outside) == "2.0"


def test_an_operator_that_comes_back_with_other_arguments_is_refused_with_the_remedy(outside):
    code = """
from deepopt.ops.operator import operator
def plus(given): return given
operator("(Tensor given) -> Tensor")(plus)
try:
    operator("(Tensor given, float more) -> Tensor")(plus)
except RuntimeError as error:
    print(error)
"""
    said = run(code, outside)
    assert "deepopt::plus already exists with other arguments" in said
    assert "start Python again" in said


def test_importing_changes_nothing_around_it(outside):
    """The environment, warnings, signals, threads, files, random numbers and torch's settings."""
    code = """
import atexit, gc, locale, logging, os, random, signal, sys, threading, warnings
import numpy, torch, matplotlib, tqdm, safetensors.torch, multiprocessing
from matplotlib.figure import Figure
def around():
    gc_settings = gc.isenabled(), gc.get_threshold()
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "files": os.listdir(),
        "path": list(sys.path), "finders": list(map(repr, sys.meta_path)),
        "warnings": list(warnings.filters), "show": warnings.showwarning,
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "threads": threading.enumerate(), "exits": atexit._ncallbacks(),
        "excepthooks": (sys.excepthook, threading.excepthook), "trace": sys.gettrace(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "gc": gc_settings, "recursion": sys.getrecursionlimit(), "locale": locale.getlocale(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "random": (random.getstate(), numpy.random.get_state()[1].tolist(),
                   torch.get_rng_state().tolist()),
        "numpy": numpy.geterr(), "matplotlib": dict(matplotlib.rcParams),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                 torch.is_anomaly_enabled()),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled,
                      torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "deterministic": (torch.are_deterministic_algorithms_enabled(),
                          torch.is_deterministic_algorithms_warn_only_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "denormals": torch.finfo(torch.float32).smallest_normal / 2,
        "optimizer": {k: v for k, v in vars(torch.optim.Optimizer).items()},
        "printing": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "loads": torch.serialization.get_safe_globals(),
    }
before = around()
import_everything()
after = around()
print([name for name in before if repr(before[name]) != repr(after[name])])
"""
    assert run(EVERYTHING + code, outside, MPLBACKEND="agg") == "[]"
    assert not list(outside.iterdir())


def test_importing_the_package_imports_no_optional_one(outside):
    code = """
import sys, torch
before = set(sys.modules)
import deepopt, deepopt.hope
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "matplotlib", "tqdm", "safetensors", "numpy", "transformers"}))
"""
    assert run(code, outside) == "[]"
