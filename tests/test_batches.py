from collections import Counter

import pytest

from mgvideo.batches import Batches, share
from mgvideo.errors import UserError
from mgvideo.plan import Base, Plan
from mgvideo.schedule import Schedule, make_plan

BASE = Base(
    batch=16, frames=16, size=64, stride=2, jitter=(72, 84), epochs=10, lr=0.1, lr_steps=(0, 6, 9), gamma=0.1,
    warmup_epochs=0.5, warmup_lr=0.01,
)  # fmt: skip
SIZE = 100  # divides by no batch, so that passes over the data end inside batches
SCHEDULES = {"baseline": (False, False), "short": (False, True), "long": (True, False), "multigrid": (True, True)}


def plan(name: str = "multigrid") -> Plan:
    long, short = SCHEDULES[name]
    return make_plan(BASE, Schedule(name, long, short, round_epochs=False), SIZE)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_video_once_a_pass(name: str) -> None:
    p = plan(name)
    batches = Batches(p, SIZE, seed=3)
    indices = [request.index for step in range(p.steps) for request in batches(step)]
    assert len(indices) == sum(p.slot(step).batch for step in range(p.steps))
    passes = [indices[i : i + SIZE] for i in range(0, len(indices) - SIZE + 1, SIZE)]
    assert len(passes) > 3
    assert all(Counter(one).most_common(1)[0][1] == 1 for one in passes)
    assert passes[0] != passes[1]


def test_a_batch_depends_on_its_step_alone() -> None:
    p = plan()
    forward = [Batches(p, SIZE, seed=3)(step) for step in range(p.steps)]
    assert [Batches(p, SIZE, seed=3)(step) for step in reversed(range(p.steps))] == forward[::-1]
    assert Batches(p, SIZE, seed=4)(0) != forward[0]
    seeds = [request.seed for batch in forward for request in batch]
    assert len(set(seeds)) == len(seeds)


def test_requests_bear_the_grid_of_their_slot() -> None:
    p = plan()
    batches = Batches(p, SIZE, seed=0)
    for step in range(p.steps):
        assert {request.grid for request in batches(step)} == {p.slot(step).grid}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_together_hold_the_global_batch_in_order(name: str, world: int) -> None:
    for phase in plan(name).phases:
        for slot in phase.slots:
            shares = [share(slot.batch, phase.bn_groups, rank, world) for rank in range(world)]
            clips = [clip for part in shares for clip in range(part.start, part.stop)]
            assert clips == list(range(slot.batch))


@pytest.mark.parametrize(("batch", "groups", "world"), [(64, 8, 3), (64, 8, 8), (24, 3, 2), (32, 2, 8), (16, 2, 16)])
def test_bn_groups_lie_where_the_global_order_cuts_them(batch: int, groups: int, world: int) -> None:
    size = batch // groups
    for rank in range(world):
        part = share(batch, groups, rank, world)
        assert rank in part.ranks
        if len(part.ranks) == 1:
            assert part.start % size == 0
            assert part.stop - part.start == part.groups * size
        else:
            assert part.start // size == (part.stop - 1) // size, "a shared group's part lies inside it"
            members = [share(batch, groups, r, world) for r in part.ranks]
            assert sum(m.stop - m.start for m in members) == size


def test_ranks_that_cannot_share_a_group_are_refused() -> None:
    with pytest.raises(UserError, match="use 2 ranks"):
        share(16, 2, 0, 3)
    with pytest.raises(UserError, match="use 8 ranks"):
        share(8, 1, 0, 9)
