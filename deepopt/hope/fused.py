"""Self-modifying memories as one operator: `deepopt.hope.scan` in a kernel, where there is one.

The kernel goes over heads and chunks with all numbers of a chunk in the cache. It has its own
backward pass, which keeps the weights at the start of every chunk and recomputes the rest
(docs/hope_chunks.md derives the gradients). It supports the default form of the layer. All other
forms, padding, second derivatives and `torch.func` use `deepopt.hope.scan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deepopt.hope import scan
from deepopt.hope.memory import (
    Form,
    Gates,
    Initial,
    Inputs,
    MemoryState,
    Weights,
)
from deepopt.ops.operator import SymInt, operator, schema_of


class MemoryArguments(NamedTuple):
    """What the operators are given; d is the width of a head, h and m are hidden widths.

    Attributes:
        key, value, query: inputs of the memories, (batch, heads, d, tokens).
        w2, w1: running weights of the generating memories, (batch, heads, 4, h, d) and
            (batch, heads, 4, d, h).
        anchor_w2, anchor_w1: their anchor, likewise.
        memory_w2, memory_w1: running weights of mem, the memory that answers the queries, a stack
            of one; its hidden width is m.
        memory_anchor_w2, memory_anchor_w1: its anchor.
        initial_w2, initial_w1: where retention pulls the generating memories, without the batch;
            None for towards zero.
        memory_initial_w2, memory_initial_w1: the same for mem.
        gates: the first six of `Gates`, (heads, 6).
        max_eta, max_erase, max_delta, projection_chunk, memory_chunk: those of `Form`.
        generator_floor, memory_floor: what is added to the squared norm of features.
        sharpness: what the logits of the two erasures are multiplied by.
        position: tokens that the states have seen.
    """

    key: Tensor
    value: Tensor
    query: Tensor
    w2: Tensor
    w1: Tensor
    anchor_w2: Tensor
    anchor_w1: Tensor
    memory_w2: Tensor
    memory_w1: Tensor
    memory_anchor_w2: Tensor
    memory_anchor_w1: Tensor
    initial_w2: Tensor | None
    initial_w1: Tensor | None
    memory_initial_w2: Tensor | None
    memory_initial_w1: Tensor | None
    gates: Tensor
    max_eta: float
    max_erase: float
    max_delta: float
    generator_floor: float
    memory_floor: float
    sharpness: float
    projection_chunk: int
    memory_chunk: int
    position: SymInt

    def parts(self) -> tuple[Inputs, MemoryState, MemoryState, Initial, Gates, Form]:
        """The same arguments, as `deepopt.hope.scan.self_modifying` takes them."""
        initial = Initial(
            _weights(self.initial_w2, self.initial_w1),
            _weights(self.memory_initial_w2, self.memory_initial_w1),
        )
        scalars: Any = self[SCALARS]
        form = Form.of_scalars(scalars, self.memory_chunk, self.projection_chunk)
        return (
            Inputs(*self[:3]),
            MemoryState(*self[3:7]),
            MemoryState(*self[7:11]),
            initial,
            Gates.unstacked(self.gates),
            form,
        )

    @property
    def chunks(self) -> tuple[int, int]:
        """Tokens between two anchors of the generating memories, and of mem."""
        return self.projection_chunk, self.memory_chunk

    @property
    def segments(self) -> list[int]:
        """Lengths of the pieces between the ends of chunks."""
        return scan.segments(self.query.shape[-1], self.chunks, self.position)


TENSORS: Final = 16
"""Number of the first fields of `MemoryArguments`, which are tensors."""
SCALARS = slice(16, 22)
"""Those of `Form.scalars` in `MemoryArguments`."""
PULLS = slice(11, 15)
"""The initial weights in `MemoryArguments`, which are None where retention leads to zero."""


def self_modifying(
    inputs: Inputs,
    generators: MemoryState,
    memory: MemoryState,
    initial: Initial,
    gates: Gates,
    form: Form,
    *,
    position: int = 0,
    valid: Tensor | None = None,
) -> tuple[Tensor, MemoryState, MemoryState]:
    """`deepopt.hope.scan.self_modifying`, by the kernel if it supports the arguments."""
    if (
        form.has_kernel
        and gates.theta is None
        and valid is None
        and generators.w2.shape[-2] > 0
        and memory.w2.shape[-2] > 0
    ):
        pulls = [weights or (None, None) for weights in initial]
        arguments = MemoryArguments._make(
            [*inputs, *generators[:4], *memory[:4], *pulls[0], *pulls[1],
             gates.stacked(), *form.scalars, form.projection_chunk, form.memory_chunk, position]
        )  # fmt: skip
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if memories.backend_for(keep, arguments) != "reference":
            out, *ends, _ = memories(keep, arguments)
            first, last = (MemoryState(*x) for x in (ends[:4], ends[4:]))
            return out, first, last
    out, generators, memory = scan.self_modifying(
        inputs, generators, memory, initial, gates, form, position=position, valid=valid
    )
    # The anchors of a first chunk are the model's own weights, which training changes in place.
    return out, generators.owned(), memory.owned()


def _weights(w2: Tensor | None, w1: Tensor | None) -> Weights | None:
    return None if w2 is None or w1 is None else Weights(w2, w1)


def _supports(*given: Any) -> bool:
    arguments: MemoryArguments = given[-1]
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    dtype = arguments.key.dtype
    return dtype in (torch.float32, torch.float64) and all(x.dtype == dtype for x in tensors)


def _shapes(keep: bool, given: MemoryArguments) -> list[Tensor]:
    tokens = given.query.shape[-1]
    count = scan.segment_count(tokens, given.chunks, given.position) if keep else 0
    like = (given.key, *given[3:11])
    ends = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    return [*ends, given.key.new_empty(_starts_shape(given, count))]


def _starts_shape(given: MemoryArguments, segments: int) -> tuple[int, int, int]:
    """Shape of the stored weights. Segments and weights share a dimension, so that its size is
    never 1: torch.compile makes a graph of its own for a size of 1.
    """
    batch, heads, _, hidden, d = given.w2.shape
    return batch, heads, segments * 2 * d * (4 * hidden + given.memory_w2.shape[-2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, *flat = inputs
    given = MemoryArguments(*flat)
    starts = output[-1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(starts)
    ctx.save_for_backward(*given[:TENSORS], starts)
    ctx.options = given[TENSORS:]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tensors, starts = ctx.saved_tensors
    given = MemoryArguments(*tensors, *ctx.options)
    nothing = given.key.new_empty(0)
    ends = [nothing if grad is None else grad for grad in grads[:-1]]
    if torch.is_grad_enabled():  # with create_graph: what autograd sees can be differentiated again
        found = _by_autograd(ends, given)
    else:
        found = list(memories_gradient(ends, starts, given))
    if given.initial_w2 is None:  # the kernel returns these four too, but they mean nothing
        found[PULLS] = [None] * 4
    return (None, *found, *(None for _ in ctx.options))


def _by_autograd(grads: Sequence[Tensor], given: MemoryArguments) -> list[Tensor | None]:
    """The gradients for the tensors in `given`, None for those that are None, by autograd."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A tensor may be given twice, as an anchor and as the running weights. Each use has its own
        # gradient, so each gets a view of its own.
        inputs = [None if x is None else x.view_as(x) for x in given[:TENSORS]]
        inputs = [x if x is None or x.requires_grad else x.requires_grad_() for x in inputs]
        results = memories.reference(False, MemoryArguments._make([*inputs, *given[TENSORS:]]))
        pairs = [(x, g) for x, g in zip(results, grads, strict=False) if g.numel()]
        found = torch.autograd.grad(
            [x for x, _ in pairs], [x for x in inputs if x is not None], [g for _, g in pairs],
            create_graph=again, materialize_grads=True,
        )  # fmt: skip
    made = iter(found)
    return [None if x is None else next(made) for x in inputs]


@operator(
    f"(bool keep, {schema_of(MemoryArguments)}) -> Tensor[]", _supports, MemoryArguments,
    fake=_shapes, gradient=(_save, _backward),
)  # fmt: skip
def memories(keep: bool, given: MemoryArguments) -> list[Tensor]:
    """The memories over some tokens.

    Args:
        keep: whether the states at the starts of chunks are returned, for the gradient.
        given: all other arguments.

    Returns:
        the outputs o_t; w2, w1, anchor_w2 and anchor_w1 of the generating memories after the last
        token; the same four of mem; and the weights of all five at the start of every segment,
        flattened, (batch, heads, segments 2 d (4 h + m) or 0). In a segment all W2 come first, then
        all W1.

    Cost, in units of 2 d^3 FLOPs for each head and chunk of C = d = h = m: 70, and 191 for the
    gradient, as `FLOPS` counts them.
    """
    outputs, starts, begin = [], [], 0
    inputs, generators, memory, initial, gates, form = given.parts()
    for length in given.segments:
        if keep:
            weights = (generators.w2, memory.w2, generators.w1, memory.w1)
            starts.append(torch.cat([x.flatten(2) for x in weights], 2))
        piece = Inputs(*(x[..., begin : begin + length] for x in inputs))
        out, generators, memory = scan.self_modifying(
            piece, generators, memory, initial, gates, form, position=given.position + begin
        )
        outputs.append(out)
        begin += length
    empty = given.key.new_empty(_starts_shape(given, 0))
    ends = [x.clone() for x in (*generators[:4], *memory[:4]) if x is not None]
    return [torch.cat(outputs, -1), *ends, torch.cat(starts, 2).detach() if keep else empty]


def _gradient_shapes(
    grads: Sequence[Tensor], starts: Tensor, given: MemoryArguments
) -> list[Tensor]:
    like = [x for x in given[:TENSORS] if isinstance(x, Tensor)]
    if given.initial_w2 is None:
        like[PULLS.start : PULLS.start] = [
            x[0] for x in (given.w2, given.w1, given.memory_w2, given.memory_w1)
        ]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


@operator(
    f"(Tensor[] grads, Tensor starts, {schema_of(MemoryArguments)}) -> Tensor[]", _supports,
    MemoryArguments, fake=_gradient_shapes,
)  # fmt: skip
def memories_gradient(
    grads: Sequence[Tensor], starts: Tensor, given: MemoryArguments
) -> list[Tensor]:
    """The gradients of `memories` for all its tensors, in their order.

    Args:
        grads: gradients of its results except the last; an empty tensor means no gradient.
        starts: the last of its results.
        given: what it was given.

    Returns:
        16 tensors. Without initial weights, their gradients are returned but mean nothing.
    """
    with torch.no_grad():
        detached = [x.detach() if isinstance(x, Tensor) else x for x in given]
        found = _by_autograd(grads, MemoryArguments._make(detached))
    shapes = _gradient_shapes(grads, starts, given)
    return [y if x is None else x for x, y in zip(found, shapes, strict=True)]


def _flops(given: Sequence[Any], backward: bool) -> int:
    """FLOPs of the CPU kernel's products. The gradient computes every chunk once more.

    Args:
        given: fields of `MemoryArguments`, with shapes instead of tensors.
        backward: count the gradient instead of the forward pass.
    """
    sizes = MemoryArguments._make(given)
    batch, heads, d, tokens = sizes.key
    g, m = sizes.w2[3], sizes.memory_w2[3]

    def products(c: int, dgc: int, dmc: int, gdd: int, dcc: int, mcc: int, ddc: int) -> int:
        of_weights = (dgc * g + dmc * m) * d * c + gdd * g * d * d
        return of_weights + (dcc * d + mcc * m) * c * c + ddc * d * d * c

    total = 0
    for c in scan.segments(int(tokens), sizes.chunks, sizes.position):
        total += c**3 // 2  # three triangular inverses
        if backward:
            total += products(c, 28, 13, 0, 5, 4, 2) + products(c, 72, 30, 16, 10, 7, 4)
        else:
            total += products(c, 36, 15, 8, 5, 4, 2)
    return int(batch * heads) * 2 * total


def _memories_flops(keep: bool, *given: Any, out_shape: Any = None, **_: Any) -> int:
    return _flops(given, False)


def _gradient_flops(grads: Any, starts: Any, *given: Any, out_shape: Any = None, **_: Any) -> int:
    return _flops(given, True)


FLOPS = {
    torch.ops.deepopt.memories: _memories_flops,
    torch.ops.deepopt.memories_gradient: _gradient_flops,
}
"""For `FlopCounterMode(custom_mapping=FLOPS)`: torch's own registry takes a formula once only, and
importing it imports Triton."""
