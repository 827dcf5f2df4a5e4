"""One token through one block as a single operator, used for decoding.

Decoding takes a few matrix-vector products. Run module by module, a block calls 450 torch
operators, and the calls take longer than the arithmetic. The kernel supports the default form of a
block, without gradients. Everything else goes through the modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepopt._compat import has_global_hook, in_forward_ad
from deepopt.hope import scan
from deepopt.hope.cms import CMS, CMSLevel
from deepopt.hope.convolution import CausalConv, convolved
from deepopt.hope.memory import Form, Gates, Initial, Inputs, MemoryState, Weights, unit
from deepopt.hope.state import BlockState, TitansState
from deepopt.hope.titans import SelfModifyingTitans, Turns, turned
from deepopt.ops.operator import operator, schema_of

if TYPE_CHECKING:
    from deepopt.hope.block import HopeBlock


class BlockTokenArguments(NamedTuple):
    """What the operator is given; n and m are the memories' hidden widths.

    Attributes:
        x: the residual stream, (batch, dim).
        norm: weight of the norm before the mixer, (dim,).
        key, value, query, gate, output: weights of the mixer's linear maps, (dim, dim).
        turns: weight of the map that says how queries turn, (2 heads that turn, dim); None if none
            turns.
        head_norm: weight of the norm of every head, (d,).
        gates: the first six of `Gates`, (heads, 6).
        convolutions: weights for keys, values and queries, (dim, 1, width).
        level_norms, ups, downs: weights of the CMS levels: (dim,), (hidden, dim), (dim, hidden).
        initial: where retention pulls the weights: w2 and w1 of the generating memories, then of
            mem, without the batch; empty for towards zero.
        weights: w2, w1, anchor_w2 and anchor_w1 of the generating memories, then of mem.
        tails: the last inputs of the convolutions, (batch, dim, width - 1).
        phase: angles of the queries, (batch, heads that turn).
        max_eta, max_erase, max_delta, generator_floor, memory_floor, sharpness: those of `Form`.
        eps: what norms add to mean squares.
    """

    x: Tensor
    norm: Tensor
    key: Tensor
    value: Tensor
    query: Tensor
    gate: Tensor
    output: Tensor
    turns: Tensor | None
    head_norm: Tensor
    gates: Tensor
    convolutions: list[Tensor]
    level_norms: list[Tensor]
    ups: list[Tensor]
    downs: list[Tensor]
    initial: list[Tensor]
    weights: list[Tensor]
    tails: list[Tensor]
    phase: Tensor
    max_eta: float
    max_erase: float
    max_delta: float
    generator_floor: float
    memory_floor: float
    sharpness: float
    eps: float


TENSORS = 18
"""Number of the first fields of `BlockTokenArguments`, which are tensors and lists of them."""
SCALARS = slice(18, 24)
"""Those of `Form.scalars` in `BlockTokenArguments`."""


def forward(
    block: HopeBlock, x: Tensor, state: BlockState | None, lengths: tuple[int, ...] | None
) -> tuple[Tensor, BlockState] | None:
    """The output of `block` for x (batch, 1, dim) and its state, by the kernel.

    None if the modules must compute it. The kernel reads only weights, so it would bypass hooks and
    replaced parts, such as those of adapters and of quantized or offloaded layers.
    """
    if x.shape[1] != 1 or torch.is_grad_enabled() or lengths is not None or in_forward_ad():
        return None
    if torch.compiler.is_compiling():  # a graph would be valid at one position only
        return None
    if not isinstance(state, TitansState) or len(set(state.positions)) > 1:
        return None
    parts = _parts_of(block)
    if parts is None or not _is_plain(parts):
        return None
    titans = parts.titans
    config, form, position = titans.config, titans.config.form, state.positions[0]
    generators, memory = state.generators, state.memory
    if position % config.projection_chunk == 0:
        generators = generators.anchored().owned()
    if position % config.memory_chunk == 0:
        memory = memory.anchored().owned()
    pulled = config.retention == "initial"
    norm, head_norm, *level_norms = map(_weight, parts.norms)
    given = BlockTokenArguments._make([
        x[:, 0], norm, *map(_weight, parts.maps), _weight(parts.rates), head_norm,
        titans.gates().stacked(), [*map(_weight, parts.convolutions)], level_norms,
        [*map(_weight, parts.ups)], [*map(_weight, parts.downs)],
        [*titans.generators.weights, *titans.memory.weights] if pulled else [],
        [*generators[:4], *memory[:4]], list(state.tails), state.phase, *form.scalars,
        torch.finfo(x.dtype).eps,
    ])  # fmt: skip
    if block_token.backend_for(given) == "reference":
        return None
    y, w2, w1, memory_w2, memory_w1, *tails, phase = block_token(given)
    return y[:, None], TitansState(
        generators._replace(w2=w2, w1=w1),
        memory._replace(w2=memory_w2, w1=memory_w1),
        Inputs(*tails),
        phase,
        (position + 1,) * len(state.positions),
    )


class _Parts(NamedTuple):
    """The modules that a block computes with.

    Attributes:
        titans, cms: the mixer and the levels.
        levels: those of `cms`.
        turns, rates: what turns the queries, and its linear map; None if none turns.
        maps: linear maps of the mixer: key, value, query, gate and output.
        convolutions: those of keys, values and queries.
        norms: before the mixer, of every head, and of every level.
        ups, downs: linear maps of the levels.
    """

    titans: SelfModifyingTitans
    cms: CMS
    levels: list[Any]
    turns: Any
    rates: Any
    maps: list[Any]
    convolutions: list[Any]
    norms: list[Any]
    ups: list[Any]
    downs: list[Any]


def _parts_of(block: HopeBlock) -> _Parts | None:
    """The parts of a block; None if the main ones are of other classes.

    They are taken from `_modules`, because nn.Module looks attributes up in Python. With attributes
    this and the checks took 0.19 ms instead of 0.05.
    """
    titans, cms = block._modules.get("titans"), block._modules.get("cms")
    if type(titans) is not SelfModifyingTitans or type(cms) is not CMS:
        return None
    levels, mixer = [*cms.levels], titans._modules
    turns = mixer.get("turns")
    if turns is not None and type(turns) is not Turns:
        return None
    if not all(type(level) is CMSLevel for level in levels):
        return None
    inner = [level._modules for level in levels]
    return _Parts(
        titans, cms, levels, turns, turns._modules.get("rates") if turns is not None else None,
        [mixer.get(name) for name in ("key", "value", "query", "gate", "output")],
        [mixer.get(name) for name in ("key_conv", "value_conv", "query_conv")],
        [block._modules.get("norm"), mixer.get("norm"), *(each.get("norm") for each in inner)],
        [each.get("up") for each in inner], [each.get("down") for each in inner],
    )  # fmt: skip


def _weight(module: nn.Module | None) -> Any:
    return None if module is None else module._parameters["weight"]


OF_NO_EFFECT = {"__init__", "reset_parameters", "extra_repr"}
"""Methods that a call of a module does not use."""
METHODS: dict[type, set[str]] = {
    known: {name for name, value in vars(known).items() if callable(value)} - OF_NO_EFFECT
    for known in (nn.Linear, nn.RMSNorm, CausalConv, Turns, SelfModifyingTitans, CMS, CMSLevel)
}
"""The classes that the kernel stands for, and the names of the methods that compute."""
ORIGINALS = [(vars(known), name, vars(known)[name]) for known in METHODS for name in METHODS[known]]
"""These methods as they were on import, with the live dicts of their classes."""


def _is_plain(parts: _Parts) -> bool:
    """Whether the kernel computes what the modules would.

    They have the default form and parameters for weights. Each is of the very class that belongs
    there, has no hooks, and no method of it has been replaced.
    """
    titans, turns, config = parts.titans, parts.turns, parts.titans.config
    linear = [*parts.maps, *parts.ups, *parts.downs, *([] if turns is None else [parts.rates])]
    modules = [titans, parts.cms, *parts.levels, *([] if turns is None else [turns])]
    return (
        config.form.has_kernel
        and not config.momentum
        and config.hidden > 0
        and config.projection_width > 0
        and (turns is None or turns.sharpness == config.form.sharpness)
        and parts.cms.weights is None
        and all(level.up_change is None for level in parts.levels)
        and all(
            type(layer) is nn.Linear and layer._parameters.get("bias", 0) is None
            for layer in linear
        )
        and all(
            type(x) is nn.RMSNorm and x.eps is None and x.elementwise_affine for x in parts.norms
        )
        and all(type(convolution) is CausalConv for convolution in parts.convolutions)
        and all(
            module._parameters.get("weight") is not None
            for module in (*linear, *parts.norms, *parts.convolutions)
        )
        and not torch.is_autocast_enabled("cpu")
        and not has_global_hook()
        and all(of_class.get(name) is method for of_class, name, method in ORIGINALS)
        and not any(
            module._forward_hooks
            or module._forward_pre_hooks
            or not vars(module).keys().isdisjoint(METHODS[type(module)])
            for module in (*modules, *linear, *parts.norms, *parts.convolutions)
        )
    )


def _supports(given: BlockTokenArguments) -> bool:
    dtype = given.x.dtype
    tensors = [x for x in given[:TENSORS] if isinstance(x, Tensor)]
    tensors += [x for some in given[:TENSORS] if isinstance(some, list) for x in some]
    return dtype in (torch.float32, torch.float64) and all(
        x.dtype == dtype and type(x) in (Tensor, nn.Parameter) for x in tensors
    )


def _shapes(given: BlockTokenArguments) -> list[Tensor]:
    w2, w1, _, _, memory_w2, memory_w1, _, _ = given.weights
    like = [given.x, w2, w1, memory_w2, memory_w1, *given.tails, given.phase]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]


@operator(
    f"({schema_of(BlockTokenArguments)}) -> Tensor[]", _supports, BlockTokenArguments, fake=_shapes
)
def block_token(given: BlockTokenArguments) -> list[Tensor]:
    """One token of every sequence through one block, all of them at one position.

    Args:
        given: everything.

    Returns:
        the residual stream (batch, dim); w2 and w1 of the generating memories, and of mem, after
        the token; the three tails; and the phase.
    """
    x = given.x.unsqueeze(1)
    dim, (heads, _), d = x.shape[-1], given.gates.shape, given.head_norm.shape[0]
    normed = F.rms_norm(x, (dim,), given.norm, given.eps)
    projected = [F.linear(normed, w).mT for w in (given.key, given.value, given.query)]
    made = [
        convolved(*each) for each in zip(projected, given.tails, given.convolutions, strict=True)
    ]
    key, value, query = (out.unflatten(1, (heads, d)) for out, _ in made)
    query, phase = unit(query), given.phase
    if given.turns is not None:
        rates = F.linear(normed, given.turns).mT
        query, phase = turned(rates, query, phase, given.sharpness)
    generators, memory = (MemoryState(*given.weights[at : at + 4]) for at in (0, 4))
    initial = Initial(None, None)
    if given.initial:
        initial = Initial(*(Weights(*given.initial[at : at + 2]) for at in (0, 2)))
    # Chunks of 2 at position 1: the token lies in mid-chunk, so that the given anchors stay.
    scalars: Any = given[SCALARS]
    form = Form.of_scalars(scalars, 2, 2)
    answers, generators, memory = scan.self_modifying(
        Inputs(F.silu(key), F.silu(value), query), generators, memory, initial,
        Gates.unstacked(given.gates), form,
        position=1,
    )  # fmt: skip
    answers = F.rms_norm(answers.permute(0, 3, 1, 2), (d,), given.head_norm, given.eps).flatten(-2)
    x = x + F.linear(answers * F.silu(F.linear(normed, given.gate)), given.output)
    for norm, up, down in zip(given.level_norms, given.ups, given.downs, strict=True):
        x = x + F.linear(F.gelu(F.linear(F.rms_norm(x, (dim,), norm, given.eps), up)), down)
    tails = [tail for _, tail in made]
    return [x[:, 0], generators.w2, generators.w1, memory.w2, memory.w1, *tails, phase]
