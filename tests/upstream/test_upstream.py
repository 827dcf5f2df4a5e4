"""torch's own device-generic optimizer tests, over deepopt's optimizers.

They are not in torch's wheel. DEEPOPT_TORCH_TESTS is the path of ``test/test_optim.py`` of a
checkout of torch, of the release that is installed or near it; they need ``expecttest``.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepopt.optim.registry import REGISTRY

UPSTREAM = os.environ.get("DEEPOPT_TORCH_TESTS", "")


@pytest.mark.skipif(not UPSTREAM, reason="DEEPOPT_TORCH_TESTS does not name torch's test_optim.py")
def test_torchs_own_optimizer_tests_pass():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.upstream.entries"]
    command += ["-o", "addopts=", "-c", os.devnull, "--rootdir", str(Path(UPSTREAM).parent)]
    command += [UPSTREAM, "-k", "CPU"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 20 * len(REGISTRY)
