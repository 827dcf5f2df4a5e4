"""What the pages of the site, CONTRIBUTING.md and the notebook say about the code is true."""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import deepopt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = ("CONTRIBUTING.md", "docs/your_operator.md", "docs/your_memory.md")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "csrc").rglob("*.md")])
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def defined(path: Path) -> set[str]:
    """The classes, functions and constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def links(page: Path) -> list[tuple[str, Path]]:
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = [(name, target.partition("#")[0]) for name, target in LINK.findall(text)]
    return [(name, page.parent / to) for name, to in found if to and ":" not in to.split("/")[0]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_to_one_and_to_what_it_names(page):
    for text, path in links(page):
        assert path.exists(), f"{text} leads to {path}"
        name = text.strip("`")
        if path.suffix == ".py" and text.startswith("`") and name.isidentifier():
            assert name in defined(path), f"{path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page):
    for file, name in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", page.read_text()):
        found = list((ROOT / "tests").rglob(file))
        assert found or "NAME" in file, f"there is no {file}"
        if name:
            assert any(name in defined(path) for path in found), f"{file} has no {name}"


def test_the_map_of_the_paper_links_to_code_in_every_row_that_is_implemented():
    text = (DOCS / "paper.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| (Eq|Alg)", line)]
    assert len(rows) > 30
    for equation, _, how, code, *_ in rows:
        assert "](../" in code or "not implemented" in how, equation
    numbers = {int(number) for number in re.findall(r"\bEq (\d+)\b", text)}
    assert {*range(6, 14), *range(42, 61), *range(70, 122)} <= numbers
    assert not re.findall(r"\bEqs\b", text)


@pytest.mark.parametrize("guide", GUIDES)
def test_every_file_that_a_guide_names_exists(guide):
    named = re.findall(
        r"`((?:\w+/)+[\w.]+\.\w+|[\w.]+\.(?:md|toml|yml))`", (ROOT / guide).read_text()
    )
    made = re.compile(r"clip_norm|NAME")  # by the reader
    assert named
    for name in named:
        assert made.search(name) or (ROOT / name).exists() or (DOCS / name).exists(), name


@pytest.mark.parametrize(
    ("page", "module"),
    [("deepopt", deepopt), ("memory", deepopt.memory), ("ops", "ops"), ("hope", "hope")],
)
def test_the_reference_has_every_public_name_where_it_is(page, module):
    module = importlib.import_module(f"deepopt.{module}") if isinstance(module, str) else module
    listed = re.findall(
        r"^::: ([\w.]+)$", (DOCS / "reference" / f"{page}.md").read_text(), re.MULTILINE
    )
    for path in listed:
        place, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(place), name), path
    aside = {"__version__", "functional", "hope", "memory", "BUILT_IN"}
    assert {path.rpartition(".")[2] for path in listed} >= set(module.__all__) - aside


def test_the_notebook_runs_and_its_stored_outputs_are_small():
    path = DOCS / "notebooks" / "swap.ipynb"
    spec = importlib.util.spec_from_file_location("run_notebook", DOCS / "notebooks" / "run.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    threads = torch.get_num_threads()
    try:
        cells = runner.executed(json.loads(path.read_text()))["cells"]
    finally:
        torch.set_num_threads(threads)
        plt.close("all")
    printed = "".join(
        line
        for cell in cells
        for output in cell.get("outputs", [])
        for line in output.get("text", [])
    )
    adamw, ours = map(float, re.search(r"AdamW ([\d.]+), DeepMomentum ([\d.]+)", printed).groups())
    assert ours < adamw
    assert "2.weight  64 x 64  matrix" in printed
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) == 1
    assert path.stat().st_size < 100_000
