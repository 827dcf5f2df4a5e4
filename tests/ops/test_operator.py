import asyncio
import os
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import pytest
import torch

from deepopt.ops import ScaleArguments, adamw_, backend, polar_express, scale_update
from deepopt.ops.operator import BACKENDS, OPERATORS, UNAVAILABLE, operator
from deepopt.ops.products import worth_rounding


def arguments(**changes):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(5, 7, generator=generator) for _ in range(4)]
    params, grads, firsts, seconds = ([tensor] for tensor in made)
    seconds[0].square_()
    steps, rates = [torch.zeros(())], [1e-3, 0.9, 0.999, 1e-8, 0.1]
    return [params, grads, firsts, seconds, steps, [], [], *rates, False]


def test_a_forced_backend_holds_inside_the_context_and_no_longer():
    automatic = adamw_.backend_for(*arguments())
    with backend("reference"):
        assert adamw_.backend_for(*arguments()) == "reference"
        with backend("compiled"):
            assert adamw_.backend_for(*arguments()) == "compiled"
        assert adamw_.backend_for(*arguments()) == "reference"
    assert adamw_.backend_for(*arguments()) == automatic


def test_backends_forced_in_two_threads_leave_each_other_alone_and_no_trace():
    automatic = adamw_.backend_for(*arguments())
    inside, leave, found = threading.Event(), threading.Event(), {}

    def other():
        found["before"] = adamw_.backend_for(*arguments())
        with backend("compiled"):
            inside.set()
            leave.wait(10)
            found["inside"] = adamw_.backend_for(*arguments())
        found["after"] = adamw_.backend_for(*arguments())

    thread = threading.Thread(target=other)
    with backend("reference"):
        thread.start()
        assert inside.wait(10)
        assert adamw_.backend_for(*arguments()) == "reference"
    leave.set()  # it leaves last what it entered last: a single variable would keep "reference"
    thread.join()
    assert found == {"before": automatic, "inside": "compiled", "after": automatic}
    assert adamw_.backend_for(*arguments()) == automatic


def chosen():
    return adamw_.backend_for(*arguments())


def test_backends_forced_in_interleaved_tasks_leave_each_other_alone_and_no_trace():
    automatic, found = chosen(), []

    async def task(name, ends):
        with backend(name):
            for _ in range(ends):  # the first to begin is not the last to end
                await asyncio.sleep(0)
                found.append((name, chosen()))
        found.append((automatic, chosen()))

    async def every():
        asked = ("reference", 2), ("compiled", 5), ("reference", 3)
        await asyncio.gather(*(task(name, ends) for name, ends in asked))

    asyncio.run(every())
    assert len(found) == 13
    assert all(wanted == got for wanted, got in found)
    assert chosen() == automatic


@pytest.mark.parametrize("where", ["here", "another thread"])
def test_a_generator_that_is_closed_anywhere_leaves_no_forced_backend(where):
    automatic = chosen()

    def forcing():
        with backend("reference"):
            yield

    generator = forcing()
    next(generator)
    assert chosen() == "reference"
    if where == "here":
        generator.close()
    else:
        after = []
        thread = threading.Thread(target=lambda: (generator.close(), after.append(chosen())))
        thread.start()
        thread.join()
        assert after == [automatic]
    assert chosen() == automatic


def test_forced_backends_that_end_out_of_order_leave_no_trace():
    automatic = chosen()
    first, second, third = backend("reference"), backend("compiled"), backend("reference")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == "compiled"
    third.__enter__()
    second.__exit__(None, None, None)
    assert chosen() == "reference"
    third.__exit__(None, None, None)
    assert chosen() == automatic


def test_unknown_and_missing_backends_are_refused_with_the_reason():
    with (
        pytest.raises(ValueError, match=r"Invalid backend: 'gpu'; choose from reference"),
        backend("gpu"),
    ):
        pass
    for name in UNAVAILABLE:
        with (
            pytest.raises(RuntimeError, match=f"{name!r} is not available: "),
            backend(name),
        ):
            pass


def test_the_reference_runs_where_autograd_records_or_a_transform_looks_on():
    given = arguments()
    given[0][0].requires_grad_()
    assert adamw_.backend_for(*given) == "reference"
    with torch.no_grad():
        assert adamw_.backend_for(*given) == ("reference" if "cpu" in UNAVAILABLE else "cpu")
    seen = []
    torch.vmap(lambda x: seen.append(adamw_.backend_for([x])) or x)(torch.ones(2, 3))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        seen.append(adamw_.backend_for(*given))
    assert seen == ["reference", "reference"]


def test_autograd_notices_what_a_kernel_has_changed():
    given = arguments()
    before = given[0][0]._version
    adamw_(*given)
    assert given[0][0]._version > before


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_has_every_operator_under_its_name(name):
    assert getattr(torch.ops.deepopt, name).default is OPERATORS[name].overload


def test_the_report_names_every_backend_and_operator():
    told = subprocess.run(
        [sys.executable, "-m", "deepopt.ops"], capture_output=True, text=True, check=True
    ).stdout
    for name in (*BACKENDS, *OPERATORS):
        assert any(line.startswith(name) for line in told.splitlines()), name


def test_an_environment_variable_forces_a_backend_and_is_checked():
    code = "from deepopt.ops import operator; print(operator._environment)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DEEPOPT_BACKEND": "reference"}
    )
    assert run.stdout.strip() == "reference"
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "DEEPOPT_BACKEND": "fast"}
    )
    assert "Invalid DEEPOPT_BACKEND: 'fast'" in run.stderr


@pytest.mark.parametrize("shape", [(2, 70, 90), (2, 90, 70)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["newton_schulz", "delta_write", "gram_average", "coordinate_mlp"])
def test_what_is_compiled_is_told_the_strides_that_the_kernel_returns(name, turned, shape):
    def stack(b, m, n):
        return torch.rand(b, n, m).mT if turned else torch.rand(b, m, n)

    x, numbers, rows = stack(*shape), torch.rand(2), shape[1]
    rounded = torch.bfloat16 if worth_rounding(x) else torch.float32  # as the processor can
    arguments = {
        "newton_schulz": (x, polar_express(5), rounded),
        "delta_write": (x, x, numbers, numbers, 0.3, 0.9),
        "gram_average": (stack(2, rows, rows), x, numbers + 1, numbers, 0.1, True),
        "coordinate_mlp": (x, numbers, [x], torch.rand(2, 1), torch.rand(2, 3, 2)),
    }[name]
    torch.library.opcheck(OPERATORS[name].overload, arguments, test_utils="test_faketensor")


def test_a_backend_in_python_is_opaque_to_compile():
    """Its code may look at the numbers, which cannot be traced."""

    @operator("(Tensor numbers) -> Tensor")
    def doubled(numbers):
        return numbers * 2

    seen = []

    @doubled.backend("cpu", supports=lambda numbers: numbers.dim() == 1)
    def by_hand(numbers):
        seen.append(numbers.tolist())
        return torch.tensor([2 * number for number in seen[-1]])

    try:
        compiled = torch.compile(lambda x: doubled(x) + 1, fullgraph=True, backend="eager")
        assert compiled(torch.ones(3)).tolist() == [3, 3, 3]
        assert seen == [[1, 1, 1]]
    finally:
        del OPERATORS["doubled"]


@pytest.mark.skipif("cpu" in UNAVAILABLE, reason="not built")
@pytest.mark.parametrize(
    "change",
    [
        {"steps": torch.zeros(0)},
        {"steps": torch.zeros((), dtype=torch.int64)},
        {"exp_avgs": torch.zeros(1).expand(3)},
        {"exp_avgs": torch.zeros(6)},
        {"steps": torch.zeros(2)},
        {"params": torch.zeros(1).expand(3)},
    ],
    ids=lambda change: " ".join(change),
)
def test_what_a_kernel_would_write_beyond_is_refused(change):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    lists = {name: [torch.zeros(3)] for name in names} | {"steps": [torch.zeros(())]}
    lists.update({key: [value] for key, value in change.items()})
    with pytest.raises(RuntimeError, match=r"must|several entries in one place"):
        torch.ops.deepopt.adamw_(*lists.values(), [], [], 1e-3, 0.9, 0.999, 1e-8, 0.1, False)


def test_operators_that_write_take_keywords():
    given, named = arguments(), arguments()
    adamw_(*given)
    names = [argument.name for argument in adamw_.overload._schema.arguments]
    adamw_(**dict(zip(names, named, strict=True)))
    assert torch.equal(given[0][0], named[0][0])
    assert named[0][0]._version > 0


def test_a_packed_argument_from_before_a_reload_is_taken():
    fields = [(name, Any) for name in ScaleArguments._fields]
    before = NamedTuple("ScaleArguments", fields)
    momentum = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0))
    given = momentum, momentum, torch.ones(2), 0.9, 0.999, 1.5, 0.2, None, None, None, None
    expected = scale_update([momentum], ScaleArguments(*given))
    found = scale_update([momentum], before(*given))
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_report_shows_what_is_forced():
    environment = {**os.environ, "DEEPOPT_BACKEND": "reference"}
    command = [sys.executable, "-m", "deepopt.ops"]
    report = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = dict(line.split(None, 1) for line in report.stdout.splitlines() if " " in line)
    assert {lines[name].split()[0] for name in OPERATORS} == {"reference"}
    assert "forced by DEEPOPT_BACKEND: reference" in report.stdout


@pytest.mark.skipif("cpu" in UNAVAILABLE, reason="not built")
def test_one_tensor_of_state_for_several_parameters_is_refused():
    both = [torch.zeros(3), torch.zeros(3)]
    for one in ([torch.zeros(6)], []):
        with pytest.raises(RuntimeError, match="one tensor for each parameter"):
            adamw_(both, both, one, one, [torch.zeros(2)], [], [], 1e-3, 0.9, 0.9, 1e-8, 0.0, False)


def test_a_lazy_copy_of_a_parameter_is_not_stepped_with_it():
    original = torch.ones(8)
    copy = torch._lazy_clone(original)
    state = [torch.zeros(8)], [torch.zeros(8)], [torch.zeros(())]
    adamw_([copy], [torch.ones(8)], *state, [], [], 0.1, 0.9, 0.99, 1e-8, 0.0, False)
    assert torch.equal(original, torch.ones(8))
    assert not torch.equal(copy, original)
