"""Runs a notebook and stores its outputs: ``python docs/notebooks/run.py FILE.ipynb``.

It needs matplotlib, and no Jupyter. The code runs in this process, cell by cell.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Cell = dict[str, Any]


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in order, in one namespace, and set their outputs."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _outputs("".join(cell["source"]), names)
    return notebook


def _outputs(source: str, names: dict[str, Any]) -> list[Cell]:
    plt.close("all")
    printed = io.StringIO()
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    outputs: list[Cell] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(text)})
    if value is not None:
        outputs.append(_result("display_data", {"text/plain": _lines(repr(value))}))
    for number in plt.get_fignums():
        outputs.append(_result("display_data", {"image/png": _png(number)}))
    return outputs


def _result(kind: str, data: dict[str, Any]) -> Cell:
    return {"output_type": kind, "metadata": {}, "data": data}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _png(number: int) -> str:
    image = io.BytesIO()
    plt.figure(number).savefig(image, format="png", dpi=72, metadata={"Software": None})
    return base64.b64encode(image.getvalue()).decode()


def main() -> None:
    path = Path(sys.argv[1])
    notebook = executed(json.loads(path.read_text()))
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
