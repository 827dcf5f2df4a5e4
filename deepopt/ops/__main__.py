"""``python -m deepopt.ops``: which backends are available, why not, and which are used."""

import argparse

import deepopt.hope  # noqa: F401 - registers Hope's operators
from deepopt._output import outlive_readers
from deepopt._table import in_columns
from deepopt.ops import operator as choice
from deepopt.ops.operator import BACKENDS, OPERATORS, PREFERRED, why_not
from deepopt.ops.products import multiplies_bfloat16

NOTES = {"reference": "plain torch, on every device", "compiled": "on request: it compiles first"}
IN_BFLOAT16 = ("delta_write", "gram_average", "newton_schulz")
"""Operators whose kernels for the CPU multiply matrices in bfloat16, all but small ones."""


def report() -> str:
    """The backends with their state, and for every operator the backend of each device."""
    backends = [("backend", "available", "")]
    for name in BACKENDS:
        reason = why_not(name)
        backends.append((name, "no" if reason else "yes", reason or NOTES.get(name, "")))
    devices = list(PREFERRED)
    operators = [("operator", *(f"on {device}" for device in devices))]
    for name, operator in sorted(OPERATORS.items()):
        used = []
        for device in devices:
            candidates = [b for b in PREFERRED[device] if b in operator.implementations]
            if choice._environment is not None:
                candidates = [b for b in (*candidates, "compiled") if b == choice._environment]
            used.append(next((b for b in candidates if not why_not(b)), "reference"))
        operators.append((name, *used))
    lines = [in_columns(backends), "", in_columns(operators)]
    if not why_not("cpu") and not multiplies_bfloat16():
        names = ", ".join(IN_BFLOAT16)
        lines += ["", f"on cpu, {names}: all but small matrices need AVX512-BF16, without AMX"]
    if choice._environment is not None:
        lines += ["", f"forced by DEEPOPT_BACKEND: {choice._environment}"]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser("python -m deepopt.ops", description="List the backends.").parse_args()
    outlive_readers()
    print(report())
