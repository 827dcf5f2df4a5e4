"""Runs ``checks.py`` on two and on four processes, and reports each check as a test."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

FOLDER = Path(__file__).parent


def _module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


world = _module("world")
checks = _module("checks")
_found = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {size: tmp_path_factory.mktemp(f"world{size}") for size in (2, 4)}


@pytest.mark.parametrize(
    ("size", "check"), [(size, check) for size in (2, 4) for check in world.names(size)]
)
def test_on_processes(size, check, folders):
    if size not in _found:
        _found[size] = world.run(FOLDER / "checks.py", size, folders[size])
    assert _found[size][check] is None, _found[size][check]


def test_a_checkpoint_of_four_processes_loads_without_any_process_group(folders):
    if 4 not in _found:
        _found[4] = world.run(FOLDER / "checks.py", 4, folders[4])
    checks.load_without_processes(folders[4] / "checkpoints_load_into_any_number_of_processes")
