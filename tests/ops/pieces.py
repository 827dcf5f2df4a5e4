"""Run the operators on the CPU in pieces, last first: print their loops, and whose bits change.

A process of its own, with the library of pieces.c loaded before torch; its path is the argument.
"""

import ctypes
import json
import sys
from typing import Any

import torch
from torch import Tensor

from deepopt.ops import polar_express
from deepopt.ops.operator import OPERATORS
from deepopt.ops.products import multiplies_bfloat16
from tests.ops.comparison import run
from tests.ops.parity import TABLE, Shape


def given(*sizes: int) -> dict[str, list[Any]]:
    """Operators and their arguments, without those that are made of others."""
    made_of_others = ("scale_update", "orthogonal_update")
    names = [name for name, case in TABLE.items() if not case.small and name not in made_of_others]
    found = {name: TABLE[name].arguments(Shape(sizes=sizes)) for name in names}
    found["combine, columns too"] = TABLE["combine"].arguments(Shape(sizes=sizes, terms=3))
    if multiplies_bfloat16():
        shape, (b, m, n) = Shape(sizes=sizes), sizes
        x, y, one = shape.matrices(), shape.matrices(), shape.positive(b)
        found["newton_schulz"] = [x, polar_express(5), torch.bfloat16]
        found["delta_write"] = [x, y, one, one, 0.5, 0.9]
        for side, of_rows in ((m, True), (n, False)):
            gram = shape.normal(b, side, side)
            found[f"gram_average, rows: {of_rows}"] = [gram + gram.mT, x, one, one, 0.1, of_rows]
    return found


def called(name: str, arguments: list[Any]) -> list[Tensor]:
    if name in TABLE:
        return run(name, "cpu", arguments)
    assert OPERATORS[name].backend_for(*arguments) == "cpu"
    return [OPERATORS[name](*arguments)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    loops = ctypes.CDLL(sys.argv[1])
    for function in (loops.pieces, loops.grain):
        function.restype = ctypes.c_int64
    cut, changed = {}, []
    for sizes in ((1, 768, 768), (2, 96, 330), (1, 200, 65), (17, 66, 100)):
        for name, arguments in given(*sizes).items():
            operator = name.split(",")[0]
            loops.begin(False)
            expected = called(operator, arguments)
            loops.begin(True)
            found = called(operator, arguments)
            if not all(torch.equal(*pair) for pair in zip(expected, found, strict=True)):
                changed.append(f"{name} of {sizes}")
            made = [(loops.pieces(loop), loops.grain(loop)) for loop in range(loops.loops())]
            # These share out heads, of which a matrix has none.
            if not name.startswith(("memories", "block_token")):
                cut.setdefault(name, made)
    print(json.dumps({"cut": cut, "changed": changed}))
