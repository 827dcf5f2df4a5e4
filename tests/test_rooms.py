"""The rooms of the package, and which room may import which: arrows point one way.

A command, `__main__.py`, stands above its room: it may show what other rooms have.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepopt"

# What a room may import of the package, besides itself and the small files deepopt/_*.py.
ROOMS = {
    "ops": set(),
    "routing": set(),
    "data": set(),
    "memory": {"ops"},
    "optim.output_map": {"ops"},
    "optim.engine": {"ops", "memory", "routing", "optim.output_map"},
    "optim": {"ops", "memory", "routing", "optim.output_map", "optim.engine"},
    "hope": {"ops", "routing", "memory", "data", "optim"},
    "meta": {"memory", "optim", "optim.output_map", "hope"},
}


def room(module: str) -> str | None:
    """The room of a module of the package, the smallest there is; None for the small files."""
    known = [name for name in ROOMS if f"{module}.".startswith(f"deepopt.{name}.")]
    return max(known, key=len, default=None)


def module_of(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides which room it comes from"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("deepopt.")}


def test_every_folder_of_the_package_is_a_room():
    folders = {path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("__init__.py")}
    folders = {".".join(folder.parts) for folder in folders} - {""}
    assert {name for name in folders if "." not in name} <= set(ROOMS)


@pytest.mark.parametrize("name", [*ROOMS, None])
def test_a_room_imports_only_what_its_row_allows(name: str | None):
    allowed = {name, None} | ROOMS.get(name, set())
    if name is None:
        allowed |= {"optim", "memory"}  # `deepopt/__init__.py` gives their names out
    files = (path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")
    paths = [path for path in files if room(module_of(path)) == name]
    assert paths
    foreign = {
        f"{path.relative_to(PACKAGE)} imports {module}"
        for path in paths
        for module in imports(path)
        if room(module) not in allowed
    }
    assert not foreign


def test_no_two_classes_and_no_two_files_of_the_package_share_a_name():
    files = [path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")]
    classes = [
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) > 50
    for names in (classes, [path.name for path in files]):
        assert not [name for name, count in Counter(names).items() if count > 1]
