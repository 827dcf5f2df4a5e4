"""Who owns what, and what travels: pure functions, for meshes of any size."""

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

tensor = pytest.importorskip("torch.distributed.tensor")
from deepopt.optim.engine import sharding  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
REPLICATE, SHARDS = tensor.Replicate(), [tensor.Shard(0), tensor.Shard(1)]


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=2, max_size=3)))
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    placements = tuple(draw(st.sampled_from([REPLICATE, *SHARDS])) for _ in mesh)
    return sharding.Layout(shape, mesh, placements)


@given(layouts())
def test_an_owner_is_sent_every_entry_once(layout):
    whole = tuple((0, size) for size in layout.shape)
    for owner in range(math.prod(layout.mesh)):
        pieces = [
            set(itertools.product(*(range(*side) for side in piece)))
            for position, piece in enumerate(sharding.boxes(layout))
            if sharding.has_to_send(layout, position, owner) and sharding.overlap(piece, whole)
        ]
        assert sum(map(len, pieces)) == len(set().union(*pieces)) == math.prod(layout.shape)


@given(layouts(), st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1))
def test_no_rank_has_more_to_do_than_another_by_more_than_one_matrix(layout, counts):
    ranks = tuple(range(math.prod(layout.mesh)))
    batches = tuple(
        sharding.Work(cost, ranks, (sharding.Spread(layout, "matrix"),) * count)
        for cost, count in counts
    )
    load = dict.fromkeys(ranks, 0.0)
    for batch, owners in zip(batches, sharding.assign(batches), strict=True):
        for (owner,) in owners:
            load[owner] += batch.cost
    assert max(load.values()) - min(load.values()) <= max(batch.cost for batch in batches)


def test_few_owners_are_far_apart():
    layout = sharding.Layout((64, 64), (64,), (SHARDS[0],))
    batch = sharding.Work(1.0, tuple(range(64)), (sharding.Spread(layout, "matrix"),) * 8)
    ((*owners,),) = sharding.assign((batch,))
    assert sorted(owner // 8 for (owner,) in owners) == list(range(8))


# 32 layers of width 4096, a gated MLP of 11008: query, key, value, output; gate and up; down.
MODEL = ((128, 4096, 4096), (64, 11008, 4096), (32, 4096, 11008))


def plan(ranks: int) -> tuple[str, ...]:
    """A line of the table in docs/distributed.md."""
    positions = tuple(range(ranks))
    batches = []
    for count, m, n in MODEL:
        layout = sharding.Layout((m, n), (ranks,), (SHARDS[0],))
        spread = sharding.Spread(layout, "matrix")
        batches.append(sharding.Work(min(m, n) ** 2 * max(m, n), positions, (spread,) * count))
    flops, traffic, owned = ([0.0] * ranks for _ in range(3))
    for (_, m, n), owners in zip(MODEL, sharding.assign(tuple(batches)), strict=True):
        short, long = sorted((m, n))
        for (owner,) in owners:
            flops[owner] += 5 * (4 * short**2 * long + 2 * short**3)
            traffic[owner] += 16 * m * n * (ranks - 1) / ranks  # all pieces but the owner's own
            owned[owner] += 1
    entries = sum(count * m * n for count, m, n in MODEL)
    mean = sum(traffic) / ranks
    fsdp = (2 * 2 + 4) * entries * (ranks - 1) / ranks
    return (
        f"{ranks}",
        f"{min(owned):.0f} to {max(owned):.0f}",
        f"{mean / 1e9:.2f} GB",
        f"{mean / fsdp:.1%}",
        f"{max(traffic) / 2e9:.2f} GB",
        f"{max(flops) / 1e12:.1f}",
        f"{sum(flops) / ranks / max(flops):.0%}",
        f"{sum(flops) / max(flops):.0f} times",
    )


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_the_documented_plan_is_the_one_that_is_carried_out(ranks):
    assert f"| {' | '.join(plan(ranks))} |" in DOCUMENT.read_text()
