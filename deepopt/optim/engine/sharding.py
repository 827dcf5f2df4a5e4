"""Matrices whose entries are spread over processes (DTensors): FSDP2, tensor parallel, meshes.

Newton-Schulz, and a memory's products, need whole matrices. Each step every matrix is assigned to
one rank, its owner: an all-to-all brings the owner the pieces of the gradient and of the state, the
owner runs the update rule, and an all-to-all brings everybody the pieces of the update and of the
new state. The state lives in shards between steps, so that it costs a rank what its share costs,
and that checkpoints see nothing but DTensors.

All ranks of a mesh plan the same exchange from shapes and placements alone; nothing is negotiated.
A matrix, and each rank's piece of a tensor, is a box: a (start, stop) per dimension. A rank's
position is its place in the mesh, in row-major order.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from deepopt import routing
from deepopt.optim.engine import State
from deepopt.optim.engine.adamw_path import state_dtype

Box: TypeAlias = tuple[tuple[int, int], ...]

_GRAD = ""
"""The gradient's key, and its update's, beside those of the state."""
ROUND_BYTES = 1 << 26
"""Upper bound on the bytes of whole gradients that an owner gets in one round. A single larger
matrix still goes alone."""
ROUNDS_AHEAD = 2
"""Rounds that travel while one is computed."""


class Layout(NamedTuple):
    """How a tensor of ``shape`` is placed on a device mesh of shape ``mesh``."""

    shape: tuple[int, ...]
    mesh: tuple[int, ...]
    placements: tuple[Any, ...]


class Spread(NamedTuple):
    """Where a parameter lies, and how it is cut into matrices."""

    layout: Layout
    path: routing.Path
    split: int = 1


class Work(NamedTuple):
    """Parameters of one mesh whose matrices have the same sides, and what one matrix costs."""

    cost: float
    ranks: tuple[int, ...]
    params: tuple[Spread, ...]


# -- where everything lies: pure functions, the same on every rank ---------------------------------


@functools.lru_cache(maxsize=64)
def coordinates(mesh: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The coordinates of every position."""
    return tuple(itertools.product(*map(range, mesh)))


@functools.lru_cache(maxsize=4096)
def boxes(layout: Layout) -> tuple[Box, ...]:
    """The piece at every position.

    Mesh dimensions that shard the same dimension of the tensor split it one after the other, from
    left to right. A strided shard (FSDP over tensor parallelism) comes last: it splits what the
    others have left.
    """
    order = sorted(
        range(len(layout.mesh)), key=lambda dim: hasattr(layout.placements[dim], "split_factor")
    )
    pieces = []
    for coordinate in coordinates(layout.mesh):
        box = [(0, size) for size in layout.shape]
        for dim in order:
            if (along := sharded_along(layout.placements[dim])) is not None:
                start, stop = box[along]
                size = -(-(stop - start) // layout.mesh[dim])  # rounded up, as torch.chunk does
                first = min(start + coordinate[dim] * size, stop)
                box[along] = (first, min(first + size, stop))
        pieces.append(tuple(box))
    return tuple(pieces)


def sharded_along(placement: Any) -> int | None:
    """The dimension of a tensor that ``placement`` splits; None if it splits none."""
    return getattr(placement, "dim", None)


def has_to_send(layout: Layout, position: int, owner: int) -> bool:
    """Whether ``position`` sends its piece to the owner.

    Where the tensor is replicated, only the replica with the owner's coordinate does.
    """
    all_coordinates = coordinates(layout.mesh)
    return all(
        mine == owners or sharded_along(placement) is not None
        for mine, owners, placement in zip(
            all_coordinates[position], all_coordinates[owner], layout.placements, strict=True
        )
    )


@functools.lru_cache(maxsize=4096)
def units(spread: Spread) -> tuple[Box, ...]:
    """The matrices of a parameter, in the order of :func:`routing.matrices`, as boxes of it."""
    shape = spread.layout.shape
    lead = len(shape) - 2 if spread.path == "stack" else 0
    whole = [(0, size) for size in shape[lead:]]
    matrices = []
    for indices in itertools.product(*map(range, shape[:lead])):
        for part in range(spread.split):
            box = [*((i, i + 1) for i in indices), *whole]
            if spread.split > 1:
                rows = shape[lead] // spread.split
                box[lead] = (part * rows, (part + 1) * rows)
            matrices.append(tuple(box))
    return tuple(matrices)


@functools.lru_cache(maxsize=4096)
def state_layout(spread: Spread, shape: tuple[int, ...]) -> Layout:
    """How a state tensor of ``shape``, which has a row for each matrix of ``spread``, is placed.

    If the matrices of a stack are divided among ranks, their state goes with them. Otherwise
    dimension 1 is sharded, also over ranks that replicate the parameter, to save memory. A tensor
    with one number per matrix is replicated.
    """
    from torch.distributed.tensor import Replicate, Shard

    inside = Shard(1) if len(shape) > 1 else Replicate()
    shares = [
        placement if _shares_matrices(spread, placement) else inside
        for placement in spread.layout.placements
    ]
    return Layout(shape, spread.layout.mesh, tuple(shares))


def is_local(spread: Spread) -> bool:
    """Whether every rank holds whole matrices that no other rank holds: nothing has to travel."""
    return all(
        size == 1 or _shares_matrices(spread, placement)
        for size, placement in zip(spread.layout.mesh, spread.layout.placements, strict=True)
    )


def _shares_matrices(spread: Spread, placement: Any) -> bool:
    one_dimension = spread.path == "stack" and len(spread.layout.shape) == 3 and spread.split == 1
    return one_dimension and sharded_along(placement) == 0


@functools.lru_cache(maxsize=64)
def assign(works: tuple[Work, ...]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each work, parameter and matrix the position of its owner.

    The most expensive matrices come first, and each goes to the rank with the smallest load so far.
    Ties are broken in bit-reversed order of positions, so that a few owners lie far apart, on
    different machines. Ranks that hold different matrices of a stack keep those they hold.
    """
    load: defaultdict[int, float] = defaultdict(float)
    owners: list[tuple[tuple[int, ...], ...]] = [()] * len(works)
    for index in sorted(range(len(works)), key=lambda index: -works[index].cost):
        cost, ranks, params = works[index]
        width = (len(ranks) - 1).bit_length()
        order = sorted(range(len(ranks)), key=lambda position: f"{position:0{width}b}"[::-1])
        of_work = []
        for spread in params:
            leading = len(spread.layout.shape) - 2 if spread.path == "stack" else 0
            holders: dict[Box, list[int]] = {}
            of_param = []
            for unit in units(spread):
                where = unit[:leading]
                if where not in holders:
                    pieces = boxes(spread.layout)
                    holders[where] = (
                        [
                            position
                            for position in order
                            if overlap(pieces[position][:leading], where) is not None
                        ]
                        if leading
                        else order
                    )
                owner = min(holders[where], key=lambda position: load[ranks[position]])
                load[ranks[owner]] += cost
                of_param.append(owner)
            of_work.append(tuple(of_param))
        owners[index] = tuple(of_work)
    return tuple(owners)


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes share, or None. A scalar has the empty box (), and shares it."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def extent(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def within(piece: Box, box: Box) -> tuple[slice, ...]:
    """The index of ``piece`` in a tensor that holds ``box``."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(piece, box, strict=True))


# -- DTensors --------------------------------------------------------------------------------------


def spread(param: Any, path: routing.Path, split: int = 1) -> Spread:
    """How the matrices of a DTensor are spread.

    Raises:
        RuntimeError: a parameter of partial sums, or pieces that its placements do not explain.
    """
    layout = _layout(param)
    if any(placement.is_partial() for placement in layout.placements):
        raise RuntimeError(
            f"a parameter with the placements {layout.placements} holds partial sums, which cannot "
            "be stepped: redistribute it"
        )
    expected = extent(boxes(layout)[_position(param.device_mesh)])
    if expected != tuple(local(param).shape):
        raise RuntimeError(
            f"a parameter of shape {layout.shape} and placements {layout.placements} has a piece "
            f"of shape {tuple(local(param).shape)} on this rank, where {expected} is expected: "
            "give its group path='elementwise'"
        )
    return Spread(layout, path, split)


def local(tensor: Any) -> Tensor:
    """This rank's piece of a DTensor, in the same storage; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Any) -> Tensor:
    """All of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_pieces(bucket: Any, states: Sequence[State]) -> tuple[Any, list[State]]:
    """A bucket of local matrices as ordinary tensors, which share memory with the DTensors."""
    mine = bucket._replace(
        params=list(map(local, bucket.params)), grads=list(map(local, bucket.grads))
    )
    return mine, [{key: local(tensor) for key, tensor in state.items()} for state in states]


def place(value: Any, param: Any, path: routing.Path = "elementwise", split: int = 1) -> Tensor:
    """A gradient or state tensor, placed as ``param`` needs it.

    Args:
        value: a DTensor of any placement, or a tensor that holds all entries.
        param: an ordinary tensor, for which the result is one too, or a DTensor.
        path: "elementwise" for a gradient or for AdamW's state, which are placed like the parameter
            itself; otherwise the path of the matrices whose state ``value`` is.
        split: number of matrices that each matrix is cut into.
    """
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return whole(value)
    layout = _layout(param)
    if path != "elementwise":
        layout = state_layout(spread(param, path, split), tuple(value.shape))
    if getattr(value, "device_mesh", None) == mesh:
        return value.redistribute(placements=layout.placements)
    everything = tuple((0, size) for size in layout.shape)
    return _wrap(whole(value)[within(boxes(layout)[_position(mesh)], everything)], layout, mesh)


def _layout(tensor: Any) -> Layout:
    return Layout(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tuple(tensor.placements))


def _wrap(piece: Tensor, layout: Layout, mesh: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(layout.shape, device="meta").stride()
    return DTensor.from_local(
        piece,
        mesh,
        layout.placements,
        run_check=False,
        shape=torch.Size(layout.shape),
        stride=stride,
    )


def _ranks(mesh: Any) -> tuple[int, ...]:
    return tuple(mesh.mesh.flatten().tolist())


def _position(mesh: Any) -> int:
    return _ranks(mesh).index(dist.get_rank())


def _process_group(mesh: Any) -> Any:
    """The processes of all of a mesh's dimensions together."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return _subgroup(tuple(sorted(_ranks(mesh))), dist.group.WORLD)


@functools.lru_cache(maxsize=64)
def _subgroup(ranks: tuple[int, ...], world: Any) -> Any:
    # The other ranks may have no parameter on this mesh, and do not call this. `world` is part of
    # the cache's key: a process group that is made anew needs a subgroup of its own.
    return dist.new_group(list(ranks), use_local_synchronization=True)


# -- the exchange ----------------------------------------------------------------------------------


class ShardedBucket(NamedTuple):
    """DTensors of one mesh whose matrices have the same sides, and what they are stepped with."""

    sides: tuple[int, int]
    dtype: torch.dtype
    params: Sequence[Any]
    spreads: Sequence[Spread]
    grads: Sequence[Any]
    states: Sequence[State]

    @classmethod
    def of(cls, bucket: Any, states: Sequence[State]) -> "ShardedBucket":
        """A bucket of ``buckets.py`` with the states of its parameters."""
        kind, params = bucket.kind, bucket.params
        spreads = [spread(param, kind.path, kind.split) for param in params]
        return cls(kind.sides, state_dtype(params[0]), params, spreads, bucket.grads, states)


def init(
    bucket: ShardedBucket,
    shapes: Sequence[dict[str, Tensor]],
    make: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    """Make the states: owners compute them for whole matrices and send out the pieces.

    Args:
        bucket: its gradients are not used.
        shapes: the state of each parameter, on the meta device.
        make: returns the state for a tensor like a stack of matrices.
    """
    for param, spread, state, expected in zip(
        bucket.params, bucket.spreads, bucket.states, shapes, strict=True
    ):
        for key, like in expected.items():
            if key == "step":
                continue
            layout = state_layout(spread, tuple(like.shape))
            piece = extent(boxes(layout)[_position(param.device_mesh)])
            device = local(param).device
            state[key] = _wrap(
                torch.empty(piece, dtype=like.dtype, device=device), layout, param.device_mesh
            )
    for round_ in _rounds([bucket]):
        size = (len(round_.mine), *bucket.sides)
        like = torch.empty(size, dtype=bucket.dtype, device=round_.mesh.device_type)
        round_.send(make(like) if round_.mine else {}, with_update=False)
        round_.receive()


def step(
    buckets: Sequence[ShardedBucket],
    advance: Callable[[int, dict[str, Tensor], Tensor], Tensor],
    apply: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Step the parameters, each matrix on one rank.

    Args:
        buckets: the same, in the same order, on all ranks of a mesh.
        advance: from (index of the bucket, state, gradient) of whole matrices to their update; it
            assigns the new state.
        apply: from (index of the bucket, piece of a parameter, its update); it changes the piece.
    """
    rounds = list(_rounds(buckets))
    fetched = 0
    for number, round_ in enumerate(rounds):
        while fetched < min(number + 1 + ROUNDS_AHEAD, len(rounds)):
            rounds[fetched].fetch()
            fetched += 1
        round_.compute(advance)
        if number >= ROUNDS_AHEAD:
            rounds[number - ROUNDS_AHEAD].receive(apply)
    for round_ in rounds[-ROUNDS_AHEAD:]:
        round_.receive(apply)


class _Matrix(NamedTuple):
    number: int
    """The number of its parameter in the bucket."""
    row: int
    owner: int


def _rounds(buckets: Sequence[ShardedBucket]) -> Iterator["_Round"]:
    """The matrices of all buckets, at most ``ROUND_BYTES`` per owner and round."""
    works = [
        Work(
            math.prod(bucket.sides) * min(bucket.sides),
            _ranks(bucket.params[0].device_mesh),
            tuple(bucket.spreads),
        )
        for bucket in buckets
    ]
    for number, (bucket, owners) in enumerate(zip(buckets, assign(tuple(works)), strict=True)):
        at_once = max(1, ROUND_BYTES // (math.prod(bucket.sides) * bucket.dtype.itemsize))
        taken: defaultdict[int, int] = defaultdict(int)
        rounds: defaultdict[int, list[_Matrix]] = defaultdict(list)
        for index, rows in enumerate(owners):
            for row, owner in enumerate(rows):
                rounds[taken[owner] // at_once].append(_Matrix(index, row, owner))
                taken[owner] += 1
        for matrices in rounds.values():
            yield _Round(number, bucket, matrices)


class _Round:
    """Some matrices of one bucket on their way to their owners and back."""

    def __init__(self, number: int, bucket: ShardedBucket, matrices: Sequence[_Matrix]) -> None:
        self.number, self.bucket, self.matrices = number, bucket, matrices
        self.mesh = bucket.params[0].device_mesh
        self.me = _position(self.mesh)
        self.mine = [matrix for matrix in matrices if matrix.owner == self.me]
        self.whole: dict[str, Tensor] = {}

    def fetch(self) -> None:
        """Send the owners the pieces of gradients and state."""
        outgoing: defaultdict[int, list[Tensor]] = defaultdict(list)
        for matrix in self.matrices:
            for _, tensor, layout, box in self._tensors(matrix):
                held = boxes(layout)[self.me]
                if has_to_send(layout, self.me, matrix.owner) and (
                    (piece := overlap(held, box)) is not None
                ):
                    outgoing[matrix.owner].append(local(tensor)[within(piece, held)])
        incoming: defaultdict[int, list[Tensor]] = defaultdict(list)
        for order, matrix in enumerate(self.mine):
            for key, tensor, layout, box in self._tensors(matrix):
                if key not in self.whole:
                    size = (len(self.mine), *extent(box))
                    self.whole[key] = torch.empty(
                        size, dtype=tensor.dtype, device=self.mesh.device_type
                    )
                for position, held in enumerate(boxes(layout)):
                    if has_to_send(layout, position, self.me) and (
                        (piece := overlap(held, box)) is not None
                    ):
                        incoming[position].append(self.whole[key][order][within(piece, box)])
        self.exchange = _Exchange(self.mesh, outgoing, incoming)

    def compute(self, advance: Callable[[int, dict[str, Tensor], Tensor], Tensor]) -> None:
        """Run the update rule on the received matrices, and send the results out."""
        self.exchange.wait()
        if not self.mine:
            self.send({})
            return
        whole = {key: tensor.flatten(0, 1) for key, tensor in self.whole.items() if key != _GRAD}
        grad = self.whole.pop(_GRAD).reshape(-1, *self.bucket.sides).to(self.bucket.dtype)
        self.whole = {}
        whole["step"] = torch.stack([self.bucket.states[m.number]["step"] for m in self.mine]) + 1
        update = advance(self.number, whole, grad)
        self.send({**whole, _GRAD: update})

    def send(self, new: dict[str, Tensor], with_update: bool = True) -> None:
        """Send all ranks their pieces of the new state and, with ``with_update``, of the update."""
        outgoing: defaultdict[int, list[Tensor]] = defaultdict(list)
        for order, matrix in enumerate(self.mine):
            for key, _, layout, box in self._tensors(matrix, with_update):
                tensor = new[key][order].reshape(extent(box))
                for position, held in enumerate(boxes(layout)):
                    if (piece := overlap(held, box)) is not None:
                        outgoing[position].append(tensor[within(piece, box)])
        incoming: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.updates: list[tuple[Tensor, Tensor]] = []
        for matrix in self.matrices:
            for key, tensor, layout, box in self._tensors(matrix, with_update):
                held = boxes(layout)[self.me]
                if (piece := overlap(held, box)) is not None:
                    if key == _GRAD:
                        tensor = self.bucket.params[matrix.number]
                    target = local(tensor)[within(piece, held)]
                    if key == _GRAD:
                        update = torch.empty_like(target, dtype=self.bucket.dtype)
                        self.updates.append((target, update))
                        target = update
                    incoming[matrix.owner].append(target)
        self.exchange = _Exchange(self.mesh, outgoing, incoming)

    def receive(self, apply: Callable[[int, Tensor, Tensor], None] | None = None) -> None:
        """Wait for the pieces of the new state, and apply those of the update."""
        self.exchange.wait()
        for piece, update in self.updates:
            assert apply is not None
            apply(self.number, piece, update)
        self.updates = []

    def _tensors(
        self, matrix: _Matrix, with_grad: bool = True
    ) -> Iterator[tuple[str, Any, Layout, Box]]:
        """For a matrix' gradient and state: key, the tensor it is part of, its layout, its box."""
        spread, state = self.bucket.spreads[matrix.number], self.bucket.states[matrix.number]
        if with_grad:
            grad = self.bucket.grads[matrix.number]
            yield _GRAD, grad, spread.layout, units(spread)[matrix.row]
        for key in sorted(state.keys() - {"step"}):
            tensor = state[key]
            shape = tuple(tensor.shape)
            row = (matrix.row, matrix.row + 1)
            yield key, tensor, state_layout(spread, shape), (row, *((0, n) for n in shape[1:]))


class _Exchange:
    """An all-to-all under way: ``wait`` copies what the others sent into the targets."""

    def __init__(
        self, mesh: Any, outgoing: dict[int, list[Tensor]], incoming: dict[int, list[Tensor]]
    ) -> None:
        group, ranks = _process_group(mesh), _ranks(mesh)
        peers = [ranks.index(rank) for rank in dist.get_process_group_ranks(group)]
        self.targets = [target for peer in peers for target in incoming.get(peer, ())]
        # As bytes, so that one exchange carries a bfloat16 gradient and float32 state.
        buffer = torch.empty(0, dtype=torch.uint8, device=mesh.device_type)
        pieces = [piece for peer in peers for piece in outgoing.get(peer, ())]
        self.sent = torch.cat([buffer, *(_bytes(piece).to(buffer.device) for piece in pieces)])
        self.received = buffer.new_empty(sum(target.nbytes for target in self.targets))
        self.work = dist.all_to_all_single(
            self.received,
            self.sent,
            [sum(target.nbytes for target in incoming.get(peer, ())) for peer in peers],
            [sum(piece.nbytes for piece in outgoing.get(peer, ())) for peer in peers],
            group=group,
            async_op=True,
        )

    def wait(self) -> None:
        self.work.wait()
        parts = self.received.split([target.nbytes for target in self.targets])
        for target, part in zip(self.targets, parts, strict=True):
            if part.storage_offset() % target.element_size():  # a view needs alignment
                part = part.clone()
            target.copy_(part.view(target.dtype).view(target.shape))
        del self.sent, self.received, self.targets


def _bytes(piece: Tensor) -> Tensor:
    flat = piece.reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
