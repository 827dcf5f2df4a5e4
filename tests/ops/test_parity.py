"""Every operator on every backend against its reference in float64, from the table of parity.py."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from deepopt.ops.operator import OPERATORS, UNAVAILABLE, why_not
from tests.ops.comparison import available, check, fitting, run
from tests.ops.parity import ELSEWHERE, TABLE, Shape, drawn

BACKENDS = ("reference", "cpu", "cuda", "triton")
every_backend = pytest.mark.parametrize("backend_name", BACKENDS)
every_operator = pytest.mark.parametrize("name", TABLE)


@every_operator
@every_backend
@settings(derandomize=True, deadline=None, max_examples=40)
@given(shape=drawn)
def test_errors_are_those_of_the_arithmetic(name, backend_name, shape):
    available(name, backend_name)
    if not TABLE[name].empty and 0 in shape.sizes[1:]:
        shape.sizes = (2, 1, 1)
    check(name, backend_name, shape)


@pytest.mark.parametrize("name", ["combine", "apply_update_", "adamw_"])
@pytest.mark.parametrize("terms", [3, 4])
def test_more_terms_and_double_precision(name, terms):
    """What the drawn shapes leave out; float64 of the lists that are written."""
    for backend_name in ("reference", "cpu"):
        if why_not(backend_name):
            continue
        if name == "combine":
            check(name, backend_name, Shape(terms=terms, dtype=torch.bfloat16, layout="columns"))
        else:
            check(
                name, backend_name, Shape(dtype=torch.float64, layout=("rows", "gaps")[terms - 3])
            )


@every_operator
@every_backend
def test_a_stack_of_millions_of_entries(name, backend_name):
    available(name, backend_name)
    check(name, backend_name, Shape(sizes=(2, 700, 751), layout="columns", dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch itself imports
def test_a_compiled_reference_agrees():
    check("row_products", "compiled", Shape())


@every_operator
@every_backend
def test_results_are_the_same_bit_for_bit_in_every_run_and_for_any_number_of_threads(
    name, backend_name
):
    available(name, backend_name)
    if backend_name == "reference":
        pytest.skip("torch's own sums promise it for one number of threads alone")
    arguments = TABLE[name].arguments(fitting(name, Shape(sizes=(3, 130, 801))))
    runs = [run(name, backend_name, arguments) for _ in range(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs.append(run(name, backend_name, arguments))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.written])
def test_the_reference_rounds_as_the_kernels_do(name, rounding):
    """The same bits: before the rounding apply_update_ has the same number, adamw_ a close one."""
    if "cpu" in UNAVAILABLE:
        pytest.skip(UNAVAILABLE["cpu"])
    shape = Shape(dtype=torch.bfloat16, rounding=rounding, layout="gaps")
    arguments = TABLE[name].arguments(shape)
    ours, theirs = (run(name, backend_name, arguments)[0] for backend_name in ("cpu", "reference"))
    same = (ours == theirs).float().mean()
    assert same == 1 if name == "apply_update_" else same > 0.99


@every_operator
def test_torch_finds_the_operator_well_formed(name):
    shape = Shape(sizes=(2, 3, 5), dtype=torch.bfloat16, rounding="exact")
    operator = OPERATORS[name]
    torch.library.opcheck(operator.overload, tuple(operator._flat(TABLE[name].arguments(shape))))


def test_every_operator_that_has_a_kernel_is_in_the_table_or_has_tests_of_its_own():
    with_kernel = {name for name, found in OPERATORS.items() if "cpu" in found.implementations}
    assert with_kernel <= {*TABLE, *ELSEWHERE}
    for name, file in ELSEWHERE.items():
        if name in OPERATORS:
            text = (Path(__file__).parents[1] / file).read_text()
            assert name in text, f"{file} does not test {name}"
            assert "double" in text or "float64" in text, f"{file} compares with nothing wider"
