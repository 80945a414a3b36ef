"""How ranks split global batches."""

from collections.abc import Callable

import pytest
from recipes import SCHEDULES

from mgvideo.errors import UserError
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import baseline
from mgvideo.plan.shards import check_shards, shard_batch

BASE = Base(
    batch_size=16, num_frames=16, crop_size=64, frame_stride=2, short_side=(72, 84), epochs=10, lr=0.1,
    lr_milestones=(6, 9), gamma=0.1, warmup_epochs=0.5, warmup_lr=0.01,
)  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.__name__)
def test_shards_of_all_ranks_are_the_global_batch_in_order(schedule: Callable[..., Plan], world_size: int) -> None:
    for phase in schedule(BASE, 100, round_epochs=False).phases:
        for slot in phase.slots:
            shards = [shard_batch(slot.batch, phase.bn_groups, rank, world_size) for rank in range(world_size)]
            clips = [clip for shard in shards for clip in range(shard.start, shard.stop)]
            assert clips == list(range(slot.batch))
            assert {shard.batch for shard in shards} == {slot.batch}


@pytest.mark.parametrize(
    ("batch", "groups", "world_size"), [(64, 8, 3), (64, 8, 8), (24, 3, 2), (32, 2, 8), (16, 2, 16)]
)
def test_shards_are_whole_bn_groups_or_lie_inside_one(batch: int, groups: int, world_size: int) -> None:
    group_size = batch // groups
    for rank in range(world_size):
        shard = shard_batch(batch, groups, rank, world_size)
        assert rank in shard.ranks
        if len(shard.ranks) == 1:
            assert shard.start % group_size == 0
            assert shard.stop - shard.start == shard.groups * group_size
        else:
            assert shard.start // group_size == (shard.stop - 1) // group_size, "the part lies inside its group"
            members = [shard_batch(batch, groups, r, world_size) for r in shard.ranks]
            assert sum(m.stop - m.start for m in members) == group_size


def test_ranks_that_cannot_share_a_group_raise() -> None:

    with pytest.raises(UserError, match="use 2 ranks"):
        shard_batch(16, 2, 0, 3)
    with pytest.raises(UserError, match="use 8 ranks"):
        shard_batch(8, 1, 0, 9)
    with pytest.raises(UserError, match="use 2 ranks"):
        check_shards(baseline(BASE, 100), 3)
