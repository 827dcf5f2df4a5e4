import os

# Before anything imports torch or matplotlib: more threads than cores slow torch down manyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

# For the messages of their asserts.
pytest.register_assert_rewrite(
    "tests.hope.runs", "tests.ops.comparison", "tests.optim.contract.helpers"
)

torch.set_num_threads(1)

DEVICE = os.environ.get("DEEPOPT_TEST_DEVICE", "cpu")
"""Where tensors are made that name no device: "cuda" brings the optimizers' suites there."""


class MadeOnTheCpu(TorchFunctionMode):
    """Makes tensors on the CPU and moves them to DEVICE: a seed gives the same numbers anywhere."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in _device_constructors() or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(DEVICE).requires_grad_(wanted)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> Iterator[None]:
    random.seed(0)
    torch.manual_seed(0)
    if DEVICE == "cpu":
        yield
    else:
        with MadeOnTheCpu():
            yield
