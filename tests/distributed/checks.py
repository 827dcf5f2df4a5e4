"""What holds on two and on four processes; ``test_distributed.py`` starts them and reports."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from world import check, main

import deepopt
from deepopt.optim import output_map
from deepopt.optim.engine import sharding
from deepopt.optim.layer_inputs import forget_inputs, seen_inputs
from deepopt.optim.registry import REGISTRY
from tests.optim.contract.inputs import INPUTS

MEMORIES = ("linear", "covariance", "delta")
STEPS = 4


def network(*sizes: int) -> nn.Sequential:
    """Float64, so that the order of sums does not show; the same on every process."""
    torch.manual_seed(1)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers).double()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range = range(STEPS),
    split: int = 1,
    part: int = 0,
) -> None:
    width = next(p for p in model.parameters() if p.ndim == 2).shape[1]
    for step in steps:
        batch = torch.randn(8, width, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        model(batch.chunk(split)[part]).square().mean().backward()
        optimizer.step()


def make(model: nn.Module, memory: str = "delta", **options) -> deepopt.DeepMomentum:
    return deepopt.DeepMomentum(model.parameters(), lr=1e-2, memory=memory, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reference(*sizes: int, memory: str = "delta", steps: int = STEPS) -> nn.Sequential:
    model = network(*sizes)
    train(model, make(model, memory), range(steps))
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for (name, mine), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(
            whole(mine.detach()),
            right.detach(),
            rtol=0,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def fsdp(model: nn.Module, mesh) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def copies_of_shards(shards: int):
    size = (dist.get_world_size() // shards, shards)
    return init_device_mesh("cpu", size, mesh_dim_names=("copies", "shards"))


def ranks() -> tuple[int, int]:
    return dist.get_world_size(), dist.get_rank()


def everywhere(number: float) -> list[float]:
    found: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(found, number)
    return found


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# -- engines ---------------------------------------------------------------------------------------


@check(2)
def ddp_equals_one_process(folder: Path) -> None:
    for memory in MEMORIES:
        model = network(40, 33, 17)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        train(ddp, make(ddp, memory), range(STEPS), *ranks())
        assert_same(model, reference(40, 33, 17, memory=memory))


@check(2)
def zero_redundancy_optimizer_equals_one_process(folder: Path) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns when it is imported

    model = network(40, 33, 17)
    ddp = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(
        ddp.parameters(), deepopt.DeepMomentum, lr=1e-2, memory="delta"
    )
    train(ddp, optimizer, range(STEPS), *ranks())
    assert_same(model, reference(40, 33, 17))
    kept = [sum(t.numel() for t in s.values()) for s in optimizer.optim.state.values()]
    assert sum(everywhere(sum(kept))) < 1.01 * sum(
        t.numel() for s in _stepped(network(40, 33, 17)).state.values() for t in s.values()
    )


def _stepped(model: nn.Module) -> deepopt.DeepMomentum:
    optimizer = make(model)
    train(model, optimizer, range(1))
    return optimizer


@check(2)
@check(4)
def fsdp_equals_one_process_with_even_uneven_and_empty_shards(folder: Path) -> None:
    sizes = 40, 33, 64, 33, 17, 64, 17  # 17 rows on four ranks: 5, 5, 5 and 2
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for memory in MEMORIES:
        model = fsdp(network(*sizes), mesh)
        train(model, make(model, memory), range(STEPS), *ranks())
        assert_same(model, reference(*sizes, memory=memory))


@check(2)
def every_registered_class_steps_shards_as_it_steps_whole_parameters(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for name, entry in REGISTRY.items():
        for options in () if entry.wraps else INPUTS[name].options:
            for shape in ((33, 20), (20, 33), (7,), ()):
                plain, spread = _pair(shape, mesh, [Shard(0) if shape else Replicate()])
                _step_both(plain, spread, cls=entry.cls, **options)


@check(4)
def ranks_with_empty_shards_take_part(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    # Three rows of matrices, as a vector's path has them, on four ranks: 1, 1, 1 and none.
    for shape, path in ((3, 64), "matrix"), ((5, 20, 17), "stack"), ((2, 20, 17), "stack"):
        for dim in range(len(shape)):
            plain, spread = _pair(shape, mesh, [Shard(dim)])
            _step_both(plain, spread, path=path)


@check(2)
def convolutions_are_dealt_whole(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for dim in range(4):
        plain, spread = _pair((17, 5, 3, 3), mesh, [Shard(dim)])
        _step_both(plain, spread, path="matrix")


def _pair(shape: tuple[int, ...], mesh, placements) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(2)
    plain = torch.randn(shape, dtype=torch.float64)
    spread = distribute_tensor(plain.clone(), mesh, placements)
    return nn.Parameter(plain), nn.Parameter(spread)


def _step_both(
    plain: nn.Parameter, spread: nn.Parameter, split: int = 1, cls=deepopt.DeepMomentum, **options
) -> torch.optim.Optimizer:
    """Step both with the same gradients, and compare."""
    optimizers = [
        cls([{"params": [p], "split": split}], **{"lr": 1e-2, **options}) for p in (plain, spread)
    ]
    for step in range(STEPS):
        torch.manual_seed(step)
        plain.grad = torch.randn_like(plain)
        spread.grad = distribute_tensor(plain.grad.clone(), spread.device_mesh, spread.placements)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole(spread.detach()), plain.detach(), rtol=0, atol=1e-6)
    for key, value in optimizers[0].state[plain].items():
        torch.testing.assert_close(
            whole(optimizers[1].state[spread][key]), value, rtol=1e-6, atol=1e-9
        )
    return optimizers[1]


@check(2)
def tensor_parallel_equals_one_process(folder: Path) -> None:
    sizes = 40, 34, 18
    for memory in MEMORIES:
        model = network(*sizes)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        train(model, make(model, memory))
        assert_same(model, reference(*sizes, memory=memory))


@check(4)
def fsdp_over_tensor_parallel_equals_one_process(folder: Path) -> None:
    sizes = 40, 34, 18  # 34 rows by 2 of tensor parallelism by 2 of FSDP: 9 and 8 rows
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for memory in MEMORIES:
        model = network(*sizes)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        fsdp(model, mesh["data"])
        train(model, make(model, memory), range(STEPS), 2, mesh["data"].get_local_rank())
        assert_same(model, reference(*sizes, memory=memory))


@check(4)
def hybrid_sharding_equals_one_process(folder: Path) -> None:
    sizes = 40, 33, 17
    mesh = copies_of_shards(2)
    for memory in MEMORIES:
        model = fsdp(network(*sizes), mesh)
        optimizer = make(model, memory)
        train(model, optimizer, range(STEPS), *ranks())
        assert_same(model, reference(*sizes, memory=memory))
        momentum = optimizer.state[model[0].weight]["momentum"]
        assert sum(everywhere(momentum.to_local().numel())) == momentum.numel()


@check(4)
def a_mesh_may_be_part_of_the_world(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("stages", "copies", "shards"))
    mine = mesh["copies", "shards"]
    plain, spread = _pair((33, 20), mine, [Replicate(), Shard(0)])
    _step_both(plain, spread)


@check(2)
def the_parts_of_a_split_matrix_are_dealt_apart(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for shape, path in ((60, 17), "matrix"), ((3, 40, 17), "stack"):
        for dim in range(len(shape)):
            plain, spread = _pair(shape, mesh, [Shard(dim)])
            with counted() as found:
                _step_both(plain, spread, path=path, split=2)
            matrices = STEPS * (2 if path == "matrix" else 6)
            mine = everywhere((sum(found) - matrices) / matrices)
            # Ranks that share out a stack keep what they have: two of the three.
            assert mine == ([2 / 3, 1 / 3] if path == "stack" and dim == 0 else [0.5, 0.5])


@check(4)
def any_placements_of_a_stack_equal_one_process(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in (
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(0), Shard(0)],
        [Shard(2), Shard(1)],
        [Replicate(), Replicate()],
    ):
        plain, spread = _pair((5, 20, 17), mesh, placements)
        _step_both(plain, spread, path="stack")


# -- layer inputs ----------------------------------------------------------------------------------


@check(2)
def replicas_average_the_inputs_that_they_see(folder: Path) -> None:
    size, rank = ranks()
    model = network(5, 4, 3)
    inputs = torch.randn(3 * size, 5, dtype=torch.float64)
    replica = DistributedDataParallel(model)
    with deepopt.capture_inputs(replica):
        replica(inputs.chunk(size)[rank]).sum().backward()
    rows = seen_inputs(model[0].weight)
    torch.testing.assert_close((rows.mT @ rows)[0], inputs.mT @ inputs / len(inputs))
    assert seen_inputs(model[2].weight).any()
    forget_inputs(model[2].weight)
    assert not seen_inputs(model[2].weight).any()


@check(2)
def inputs_of_shards_are_refused_or_said_to_be_missed(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for shard in fsdp, lambda model, mesh: parallelize_module(model, mesh, plan):
        with pytest.raises(RuntimeError, match=r"DTensor parameters .* layer '0' is one"):
            deepopt.capture_inputs(shard(network(40, 34, 18), mesh))
        model, expected = network(40, 34, 18), network(40, 34, 18)
        with deepopt.capture_inputs(model):
            shard(model, mesh)
            optimizer = deepopt.DeltaGradientDescent(model.parameters(), lr=1e-2)
            with pytest.warns(UserWarning, match=r"DTensors .* cannot be captured"):
                train(model, optimizer)
        train(expected, torch.optim.SGD(expected.parameters(), lr=1e-2))
        assert_same(model, expected)


# -- which rank computes what ---------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[int]]:
    """Matrices that went through Newton-Schulz on this process."""
    found: list[int] = []
    original = output_map.orthogonal_update

    def counting(*args: Any) -> list[Tensor]:
        found.append(len(args[-1].momentum))
        return original(*args)

    with replaced(output_map, "orthogonal_update", counting):
        yield found


@check(4)
def every_matrix_is_orthogonalized_on_one_rank_and_the_ranks_share_evenly(folder: Path) -> None:
    for mesh in init_device_mesh("cpu", (4,)), copies_of_shards(2):
        model = fsdp(network(*[32] * 7), mesh)  # six alike
        optimizer = make(model, path="auto")
        with counted() as found:
            train(model, optimizer, range(1), *ranks())
        assert sorted(everywhere(sum(found))) == [1, 1, 2, 2]


@check(4)
def experts_are_stepped_where_they_are(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    _, spread = _pair((5, 20, 17), mesh, [Shard(0)])
    optimizer = deepopt.DeepMomentum([spread], path="stack")
    spread.grad = spread.detach().clone()
    optimizer.step()
    with counted() as found, CommDebugMode() as communication:
        optimizer.step()
    assert everywhere(sum(found)) == [2, 2, 1, 0]
    assert communication.get_total_counts() == 0


@check(2)
def rounds_of_any_size_give_the_same(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    sizes = [32] * 8
    expected = reference(*sizes)
    for matrices in 1, 2, 100:
        with replaced(sharding, "ROUND_BYTES", matrices * 32 * 32 * 8):
            model = fsdp(network(*sizes), mesh)
            train(model, make(model), range(STEPS), *ranks())
            assert_same(model, expected)


@check(4)
def the_state_of_matrices_is_sharded(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for memory in MEMORIES:
        model = fsdp(network(40, 33, 17), mesh)
        optimizer = make(model, memory)
        train(model, optimizer, range(1), *ranks())
        for param in model.parameters():
            for key, tensor in optimizer.state[param].items():
                if key == "step":
                    assert type(tensor) is Tensor
                elif tensor.ndim > 1:
                    assert sum(everywhere(tensor.to_local().numel())) == tensor.numel(), key
                else:
                    assert isinstance(tensor, DTensor), key


@contextmanager
def traffic() -> Iterator[list[int]]:
    """Bytes that this process sends to others by all-to-alls, one number for each."""
    found: list[int] = []
    original = dist.all_to_all_single

    def counting(output, input, output_sizes, input_sizes, group=None, async_op=False):
        mine = dist.get_rank(group)
        found.append(sum(input_sizes) - input_sizes[mine])
        return original(output, input, output_sizes, input_sizes, group=group, async_op=async_op)

    with replaced(dist, "all_to_all_single", counting):
        yield found


@check(4)
def the_traffic_of_a_step_is_what_the_documentation_says(folder: Path) -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    model = fsdp(network(*[32] * 9).float(), mesh)  # eight matrices, two for each rank
    optimizer = make(model, path="auto")
    train_float(model, optimizer, 2)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    with CommDebugMode() as communication, traffic() as found:
        optimizer.step()
    entries, rows = 32 * 32, 32
    gradient = update = 4 * entries
    state = 4 * (entries + 2 * rows)  # momentum; row_moment and row_weight
    numbers = 4 * 3  # norm, erasure and grad_norm
    spread = len(matrices) * (gradient + update + 2 * state) / size * (size - 1) / size
    announced = len(matrices) * numbers * (size - 1) / size
    assert sum(found) == spread + announced
    assert communication.get_total_counts() == len(found) == 2


def train_float(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()


@check(2)
def bfloat16_parameters_keep_float32_state(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(33, 21).bfloat16())
    spread = nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    optimizers = [deepopt.DeepMomentum([p], lr=1e-2) for p in (plain, spread)]
    for _ in range(STEPS):
        plain.grad = torch.randn_like(plain)
        spread.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(whole(spread.detach()), plain.detach())
    assert optimizers[1].state[spread]["momentum"].dtype == torch.float32


class Drawn:
    """A memory whose state begins with random numbers."""

    def init(self, like: Tensor) -> dict[str, Tensor]:
        return {"start": torch.randn_like(like), "momentum": torch.zeros_like(like)}

    def write(self, state, grad, retention) -> None:
        state["momentum"] = state["momentum"].lerp(grad, 1 - retention)

    def read(self, state, grad, retention) -> Tensor:
        return state["momentum"] + 0.1 * state["start"]

    def __repr__(self) -> str:
        return "Drawn()"


@check(4)
def a_random_beginning_is_drawn_once_for_each_matrix(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(dist.get_rank())
    param = nn.Parameter(distribute_tensor(torch.zeros(33, 20), mesh, [Replicate(), Shard(0)]))
    param.grad = torch.ones_like(param)
    optimizer = deepopt.DeepMomentum([param], memory=Drawn())
    optimizer.step()
    start = whole(optimizer.state[param]["start"])
    assert 0.9 < start.std() < 1.1
    assert len({round(x, 6) for x in everywhere(float(whole(param.detach()).sum()))}) == 1
    copies = everywhere(float(param.to_local().detach().sum()))
    assert copies[0] == copies[2]
    assert copies[1] == copies[3]


@check(2)
def a_grad_scaler_skips_on_all_ranks_what_is_infinite_on_one(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for fused in False, True:
        torch.manual_seed(0)
        param = nn.Parameter(distribute_tensor(torch.randn(32, 20), mesh, [Shard(0)]))
        before = param.detach().clone()
        optimizer = deepopt.DeepMomentum([param], lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(2):
            loss = scaler.scale((param * param).sum())
            loss.backward()
            if step == 0 and dist.get_rank() == 1:
                param.grad.to_local()[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(whole(param.detach()), whole(before)) == (step == 0)
        assert whole(param.detach()).isfinite().all()
        assert optimizer.state[param]["step"] == 1


@check(2)
def what_cannot_be_stepped_is_refused_before_anything_moves(folder: Path) -> None:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    good = nn.Parameter(distribute_tensor(torch.zeros(32, 32), mesh, [Shard(0)]))
    sums = nn.Parameter(DTensor.from_local(torch.zeros(32, 32), mesh, [Partial()]))
    for options, wrong, message in (
        ({}, [sums], "partial sums"),
        ({"differentiable": True}, [], "differentiable"),
    ):
        optimizer = deepopt.DeepMomentum([good, *wrong], **options)
        for param in (good, *wrong):
            param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert not optimizer.state
        assert not good.to_local().any()


@check(2)
def partial_gradients_are_summed(folder: Path) -> None:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    plain, spread = _pair((33, 20), mesh, [Replicate()])
    optimizers = [deepopt.DeepMomentum([p], lr=1e-2) for p in (plain, spread)]
    plain.grad = torch.ones_like(plain)
    spread.grad = DTensor.from_local(plain.grad / 2, mesh, [Partial()])
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(whole(spread.detach()), plain.detach(), rtol=0, atol=1e-6)


# -- checkpoints -----------------------------------------------------------------------------------

SIZES = 40, 33, 17
OPTIONS = {
    "plain": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
}


@check(4)
def checkpoints_load_into_any_number_of_processes(folder: Path) -> None:
    size, rank = ranks()
    # Four shards, two copies of two shards, two shards, and one process.
    meshes = (
        (init_device_mesh("cpu", (size,)), ranks()),
        (copies_of_shards(2), ranks()),
        (copies_of_shards(2)["shards"], (2, rank % 2)),
        (None, (1, 0)),
    )
    expected = reference(*SIZES, memory="covariance", steps=2 * STEPS)
    for source, kind in (0, "plain"), (0, "flat"), (0, "full"), (-1, "flat"):
        mesh, part = meshes[source]
        model = network(*SIZES) if mesh is None else fsdp(network(*SIZES), mesh)
        optimizer = make(model, "covariance")
        train(model, optimizer, range(STEPS), *part)
        weights = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
        options = OPTIONS[kind]
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        dcp.save({"optimizer": saved, "model": weights}, checkpoint_id=folder / f"{source} {kind}")
        for target, share in meshes:
            other = network(*SIZES)
            other.load_state_dict(weights)
            if target is not None:
                fsdp(other, target)
            fresh = make(other, "covariance")
            wanted = get_optimizer_state_dict(other, fresh, options=options)
            assert_unmoved(other, weights)
            dcp.load({"optimizer": wanted}, checkpoint_id=folder / f"{source} {kind}")
            set_optimizer_state_dict(other, fresh, wanted, options=options)
            assert_unmoved(other, weights)
            train(other, fresh, range(STEPS, 2 * STEPS), *share)
            assert_same(other, expected)


@check(4)
def a_checkpoint_of_fsdp_over_tensor_parallel_loads_into_one_process(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    sizes = 40, 34, 18
    model = network(*sizes)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    fsdp(parallelize_module(model, mesh["tensor"], plan), mesh["data"])
    optimizer = make(model)
    train(model, optimizer, range(STEPS), 2, mesh["data"].get_local_rank())
    options = OPTIONS["flat"]
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=folder / "saved")
    other = network(*sizes)
    other.load_state_dict({name: whole(p.detach()) for name, p in model.named_parameters()})
    fresh = make(other)
    wanted = get_optimizer_state_dict(other, fresh, options=options)
    dcp.load({"optimizer": wanted}, checkpoint_id=folder / "saved")
    set_optimizer_state_dict(other, fresh, wanted, options=options)
    train(other, fresh, range(STEPS, 2 * STEPS))
    assert_same(other, reference(*sizes, steps=2 * STEPS))


def load_without_processes(folder: Path) -> None:
    model = network(*SIZES)
    optimizer = make(model, "covariance")
    loaded = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS["flat"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(loaded, checkpoint_id=folder / "0 flat", no_dist=True)
    model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"], options=OPTIONS["flat"])
    train(model, optimizer, range(STEPS, 2 * STEPS))
    assert_same(model, reference(*SIZES, memory="covariance", steps=2 * STEPS))


def assert_unmoved(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, param in model.named_parameters():
        assert torch.equal(whole(param.detach()), weights[name]), name


@check(2)
def a_checkpoint_of_one_process_loads_into_shards(folder: Path) -> None:
    size, rank = ranks()
    for kind in "delta", "covariance":
        plain = network(*SIZES)
        optimizer = make(plain, kind)
        train(plain, optimizer)
        saved = optimizer.state_dict()
        model = network(*SIZES)
        model.load_state_dict(plain.state_dict())
        fsdp(model, init_device_mesh("cpu", (size,)))
        resumed = make(model, kind)
        resumed.load_state_dict(saved)
        train(model, resumed, range(STEPS, 2 * STEPS), size, rank)
        assert_same(model, reference(*SIZES, memory=kind, steps=2 * STEPS))
        # And back, by torch's own state_dict of the shards.
        back = network(*SIZES)
        back.load_state_dict({n: whole(p.detach()) for n, p in model.named_parameters()})
        single = make(back, kind)
        single.load_state_dict(resumed.state_dict())
        train(back, single, range(2 * STEPS, 3 * STEPS))
        assert_same(back, reference(*SIZES, memory=kind, steps=3 * STEPS))


if __name__ == "__main__":
    main()
