"""The map from the paper to the code names what exists, and what it says of the paper is true."""

import re
from pathlib import Path

import pytest
import torch

import deepopt

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper.md").read_text()
ROWS = re.findall(r"^\| (?:Eq|Alg).*$", PAGE, re.MULTILINE)
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_every_test_that_the_page_names_exists(file, test):
    path = ROOT / "tests" / file
    assert path.exists()
    assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE)


def test_the_page_names_tests_and_every_class_of_the_package():
    assert len(NAMED) > 30
    for entry in deepopt.optimizers().values():
        assert f"`{entry.cls.__name__}(" in PAGE or f"`{entry.cls.__name__}`" in PAGE


def test_no_file_hides_equations_in_a_range_where_a_search_would_miss_them():
    for path in (ROOT / "deepopt").rglob("*.py"):
        assert not re.search(r"Eq \d+\s+to\s+Eq \d+", path.read_text()), path


@pytest.mark.parametrize("row", [row for row in ROWS if "](../" in row])
def test_the_first_file_of_a_row_names_all_of_its_equations(row):
    equations, _, _, code, *_ = row.split(" | ")
    file = re.search(r"\]\(\.\./([\w/.]+)\)", code)[1]
    text = (ROOT / file).read_text()
    for equation in re.findall(r"Eq \d+", equations):
        assert re.search(rf"\b{equation}\b", text), f"{file} does not name {equation}"


def test_the_page_explains_every_erratum_that_it_cites():
    explained = re.findall(r"^\| (E\d+) \|", PAGE, re.MULTILINE)
    assert explained == [f"E{number}" for number in range(1, len(explained) + 1)]
    assert set(re.findall(r"\bE\d+\b", PAGE)) == set(explained)


def test_the_horizon_of_an_average_is_seven_and_forty_four_gradients():
    """Section 4.3 says 6 and 43: with a retention of 0.9 the last n weigh 1 - 0.9^n."""
    assert 1 - 0.9**6 < 0.5 < 1 - 0.9**7
    assert 1 - 0.9**43 < 0.99 < 1 - 0.9**44


def test_eq_44_is_a_step_on_eq_43_with_a_proximity_term_and_gives_the_cubic_iteration():
    grad = torch.randn(3, 5, dtype=torch.float64)
    start = torch.randn(3, 5, dtype=torch.float64)

    def printed(o, rate):
        identity = torch.eye(5, dtype=torch.float64)
        return o - rate * (o - grad + 2 * o @ (o.mT @ o - identity))

    def eq_43(o):
        return (o.mT @ o - torch.eye(5, dtype=torch.float64)).square().sum()

    def with_proximity(o):
        return 0.5 * (o - grad).square().sum() + 0.5 * eq_43(o)

    step = (start - printed(start, 1e-3)) / 1e-3
    torch.testing.assert_close(step, torch.func.grad(with_proximity)(start))
    assert (step - torch.func.grad(eq_43)(start)).norm() > 0.1 * step.norm()
    cubic = 1.5 * grad - 0.5 * grad @ grad.mT @ grad
    torch.testing.assert_close(printed(grad, 0.25), cubic)
