"""torch's own device-generic optimizer tests, over deepopt's optimizers.

They are not in torch's wheel. DEEPOPT_TORCH_TESTS is the path of ``test/test_optim.py`` of a
checkout of torch, of the release that is installed or near it; they need ``expecttest``. torch's
AdamW goes through them too: what it passes or skips, each of ours must, whatever the release.
DEEPOPT_TEST_DEVICE=cuda runs those for a GPU.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from deepopt.optim.registry import REGISTRY

UPSTREAM = os.environ.get("DEEPOPT_TORCH_TESTS", "")
DEVICE = os.environ.get("DEEPOPT_TEST_DEVICE", "cpu")


def outcomes(report: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """By class and test: "passed", "failed", or why it was skipped."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    pattern = re.compile(rf"(.+)_({'|'.join(names)})_{DEVICE}_(\w+)")
    for case in ElementTree.parse(report).iter("testcase"):
        match = pattern.fullmatch(case.attrib["name"])
        assert match, case.attrib["name"]
        test, name, dtype = match.groups()
        skipped = case.find("skipped")
        passed = case.find("failure") is None and case.find("error") is None
        found[name][f"{test} {dtype}"] = (
            skipped.attrib["message"] if skipped is not None else "passed" if passed else "failed"
        )
    return found


def test_the_entries_take_small_matrices_and_give_complex_tests_their_usual_routes_back():
    code = """
import torch
from tests.upstream import entries
from deepopt.routing import rules

assert [info.optim_cls for info in entries.upstream.optim_db[:1]] == [torch.optim.AdamW]
assert rules.route(torch.empty(10, 5)).path == "matrix"
entries.with_usual_routes(lambda: rules.route(torch.empty(10, 5)).path == "elementwise" or 1 / 0)()
assert rules.route(torch.empty(10, 5)).path == "matrix"
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not UPSTREAM, reason="DEEPOPT_TORCH_TESTS does not name torch's test_optim.py")
def test_torchs_own_optimizer_tests_pass_where_they_pass_for_its_adamw(tmp_path):
    root, report = Path(__file__).parents[2], tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.upstream.entries"]
    command += ["-o", "addopts=", "-c", os.devnull, "--rootdir", str(Path(UPSTREAM).parent)]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}", UPSTREAM, "-k", DEVICE.upper()]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    output = done.stdout[-5000:] + done.stderr[-2000:]
    assert done.returncode in (0, 1), output  # anything else: not collected, or interrupted

    classes = {e.cls.__name__: e.cls for e in REGISTRY.values() if not e.wraps}
    found = outcomes(report, ["AdamW", *classes])
    for name, results in found.items():
        counts = Counter(results.values())
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in counts.most_common())}")
    wanted = found.pop("AdamW")
    assert list(wanted.values()).count("passed") >= 20  # it is upstream's file, and it was run
    wrong = {}
    for name, results in found.items():
        real = classes[name]([torch.zeros(1)]).defaults["path"] != "auto"  # no complex matrices
        expected = {
            test: result
            for test, result in wanted.items()
            if result != "failed" and not (real and test.startswith("test_complex"))
        }
        assert results.keys() <= wanted.keys()
        wrong |= {
            (name, test): results.get(test)
            for test, result in expected.items()
            if results.get(test) != result
        }
    assert not wrong, f"{wrong}\n{output}"
