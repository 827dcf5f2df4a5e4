"""How the operators on the CPU share out their work, without the many cores that it is for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepopt.ops.operator import UNAVAILABLE

HERE = Path(__file__).parent
THREADS = 16


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What pieces.py prints."""
    if "cpu" in UNAVAILABLE:
        pytest.skip(UNAVAILABLE["cpu"])
    compiler = shutil.which("gcc")
    if not compiler or sys.platform != "linux":
        pytest.skip("needs gcc on Linux")
    library = tmp_path_factory.mktemp("pieces") / "pieces.so"
    subprocess.run([compiler, "-shared", "-fPIC", HERE / "pieces.c", "-o", library], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.pieces", library]
    root = HERE.parent.parent
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout)


def share(pieces, grain):
    """The share of the ideal speed-up, if pieces are equal and every thread takes one stretch."""
    used = min(THREADS, -(-pieces // max(1, grain)))
    return pieces / (-(-pieces // used) * THREADS)


def test_one_matrix_keeps_sixteen_threads_busy(found):
    poor = {
        name: loops
        for name, made in found["cut"].items()
        if (loops := [x for x in made if share(*x) < 0.8])
    }
    assert all(found["cut"].values())
    assert not poor


def test_pieces_give_the_same_bits_in_any_order(found):
    assert not found["changed"]
