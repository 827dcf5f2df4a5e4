"""The memories as one operator: the numbers of `deepopt.hope.scan`, for every way to call it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from deepopt.hope import Hope, HopeConfig, fused, scan
from deepopt.ops import backend
from deepopt.ops.operator import UNAVAILABLE
from tests.hope.test_memory import Case

needs_kernel = pytest.mark.skipif("cpu" in UNAVAILABLE, reason=UNAVAILABLE.get("cpu", ""))


def arguments(case: Case, position: int = 0) -> fused.MemoryArguments:
    form = case.form
    pulls = [x for weights in case.initial for x in weights or (None, None)]
    return fused.MemoryArguments(
        *case.inputs, *case.generators[:4], *case.memory[:4], *pulls,
        torch.stack(case.gates[:6], -1).detach().requires_grad_(),
        form.max_eta, form.max_erase or 0.0, form.max_delta,
        form.generator_floor, form.memory_floor, form.sharpness, form.projection_chunk,
        form.memory_chunk, position,
    )  # fmt: skip


@needs_kernel
@pytest.mark.parametrize(
    ("options", "position"),
    [
        ({}, 0), ({"retention": "zero"}, 5), ({"tokens": 1}, 3), ({"tokens": 1, "hidden": 1}, 4),
        ({"hidden": 18, "projection_hidden": 2}, 3), ({"hidden": 1, "projection_hidden": 17}, 1),
        ({"tokens": 23, "memory_chunk": 3, "projection_chunk": 5, "hidden": 9}, 7),
        ({"tokens": 40, "memory_chunk": 16, "projection_chunk": 32, "hidden": 17}, 21),
        ({"tokens": 70, "memory_chunk": 64, "projection_chunk": 64}, 0),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernel_gives_the_numbers_of_the_scan(options: dict[str, Any], position: int) -> None:
    """In float64, where both only differ by rounding: results, end states and all gradients."""
    case = Case(**options)
    kernel, plain = (case.everything(form, position) for form in (fused, scan))
    for ours, theirs in zip(kernel, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@needs_kernel
def test_the_kernel_is_taken_where_it_is_written_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    plain = scan.self_modifying

    def counted(*args: Any, **options: Any) -> Any:
        calls.append("scan")
        return plain(*args, **options)

    monkeypatch.setattr(scan, "self_modifying", counted)
    Case(5).run(fused)
    assert not calls
    for options in (
        {"update": "dgd"}, {"objective": "dot"}, {"momentum": True}, {"per_channel": True},
        {"padding": True}, {"hidden": 0}, {"projection_hidden": 0}, {"max_erase": None},
    ):  # fmt: skip
        Case(5, **options).run(fused)
        assert calls.pop() == "scan", options
    with backend("reference"):
        Case(5).run(fused)
    assert calls.pop() == "scan"


@needs_kernel
def test_gradients_of_some_results_alone() -> None:
    case = Case(9)
    out, generators, memory = case.run(fused)
    expected, *states = case.run(scan)
    pairs = [
        (out, expected), (generators.w1, states[0].w1), (memory.anchor_w2, states[1].anchor_w2)
    ]  # fmt: skip
    for ours, theirs in pairs:
        found, wanted = (
            torch.autograd.grad(
                x.sum(), case.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for x in (ours, theirs)
        )
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@needs_kernel
def test_a_second_derivative_is_exact() -> None:
    case = Case(6)
    case.generators = case.generators.anchored()  # the same tensors, as at the start of a text

    def second(form: Any) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(
            case.run(form, 2)[0].square().sum(), case.leaves, create_graph=True,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        total = sum((x.square().sum() for x in grads), torch.zeros((), dtype=torch.float64))
        return torch.autograd.grad(total, case.leaves, allow_unused=True, materialize_grads=True)

    for ours, theirs in zip(second(fused), second(scan), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_transforms_see_the_operations_inside() -> None:
    case = Case(3)

    def loss(query: Tensor) -> Tensor:
        case.inputs = case.inputs._replace(query=query)
        return case.run(fused)[0].square().sum()

    query = case.inputs.query.detach()
    found = torch.func.grad(loss)(query)
    query.requires_grad_()
    (expected,) = torch.autograd.grad(loss(query), query)
    torch.testing.assert_close(found, expected)


@needs_kernel
def test_torch_finds_the_operator_and_its_gradient_well_formed() -> None:
    given = arguments(Case(5), position=2)
    torch.library.opcheck(fused.memories.overload, (True, *given))


@needs_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch itself imports
def test_a_compiled_model_has_one_node_for_all_memories_of_a_layer() -> None:
    torch.manual_seed(0)
    model = Hope(
        HopeConfig(vocab_size=7, dim=8, layers=1, heads=2, memory_chunk=4, projection_chunk=4,
                   cms_chunks=(8,))
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    tokens = torch.randint(0, 7, (2, 9))
    nodes: list[str] = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        nodes.extend(str(node.target) for node in module.graph.nodes)
        return module

    compiled = torch.compile(model, backend=count, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = compiled(tokens, tokens).loss
    assert sum("memories" in node for node in nodes) == 1
    expected = model(tokens, tokens).loss
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunks", [(1, 1), (4, 4), (2, 6), (4, 6), (8, 3)])
def test_segments_are_counted_as_they_are_made(chunks: tuple[int, int]) -> None:
    for position in range(13):
        for total in range(1, 30):
            expected = len(scan.segments(total, chunks, position))
            assert scan.segment_count(total, chunks, position) == expected


LENGTHS = (3, 5, 9, 30, 16)  # the first is within one chunk


def two_chunks(mixer: str = "titans") -> Hope:
    torch.manual_seed(0)
    model = Hope(
        HopeConfig(mixer=mixer, vocab_size=7, dim=8, layers=1, heads=2, memory_chunk=4,
                   projection_chunk=6, cms_chunks=(8,))
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    return model


class Logits(torch.nn.Module):
    def __init__(self, model: Hope) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens).logits


@needs_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch itself imports
def test_one_graph_trains_on_texts_of_every_length() -> None:
    model = two_chunks()
    count = CompileCounter()
    compiled = torch.compile(Logits(model), backend=count, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        tokens = torch.randint(0, 7, (2, length))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits, expected = compiled(tokens), model(tokens).logits
        torch.testing.assert_close(logits, expected)
        for a, b in zip(
            torch.autograd.grad(logits.square().sum(), list(model.parameters())),
            torch.autograd.grad(expected.square().sum(), list(model.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert count.frame_count == 1


@needs_kernel
def test_the_model_is_exported_once_for_texts_of_every_length() -> None:
    model = two_chunks()
    length = {1: torch.export.Dim("tokens", max=4096)}
    text = torch.randint(0, 7, (2, 8))
    exported = torch.export.export(Logits(model), (text,), dynamic_shapes=(length,)).module()
    for tokens in (1, *LENGTHS):
        text = torch.randint(0, 7, (2, tokens))
        torch.testing.assert_close(exported(text), model(text).logits)
    # Inductor, which takes a minute, compiles the backward pass of one for one length alone.
    called = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert called
    assert not any("aten.conv" in name for name in called)


@needs_kernel
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch itself imports
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_compiled_decoding_compiles_for_the_first_tokens_alone(mixer: str, batch: int) -> None:
    model = two_chunks(mixer)
    count = CompileCounter()
    step = torch.compile(model, backend=count, dynamic=True)
    tokens, state = torch.randint(0, 7, (batch, 40)), model.initial_state(batch)
    logits, graphs = [], []
    for token in tokens.split(1, 1):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            out = step(token, state=state)
        state = out.state
        logits.append(out.logits)
        graphs.append(count.frame_count)
    assert graphs[-1] == graphs[2] <= 3
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_flops_of_the_kernel_are_counted() -> None:
    """At least those of the scan, for the backward pass computes the chunks once more."""
    torch.manual_seed(0)
    model, text = Hope(HopeConfig(layers=1)), torch.zeros(1, 64, dtype=torch.long)
    counts = []
    for name in ("cpu", "reference"):
        with backend(name), FlopCounterMode(display=False, custom_mapping=fused.FLOPS) as counter:
            model(text, text).loss.backward()
        counts.append(counter.get_total_flops())
    assert 1.0 < counts[0] / counts[1] < 1.5
