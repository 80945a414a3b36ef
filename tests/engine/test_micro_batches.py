"""Sizes and bounds of micro-batches."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from mgvideo.engine.micro_batches import clips_that_fit, split_into_micro_batches
from mgvideo.engine.precision import choose_precision
from mgvideo.plan.plan import Grid
from mgvideo.plan.shards import shard_batch

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 16, 63, 64, 1000])
@pytest.mark.parametrize(("batch", "groups", "world"), [(64, 8, 1), (64, 8, 3), (128, 8, 2), (24, 3, 2)])
def test_micro_batches_cover_a_shard_in_order_within_the_limit(batch: int, groups: int, world: int, limit: int) -> None:
    for rank in range(world):
        shard = shard_batch(batch, groups, rank, world)
        micro_batches = split_into_micro_batches(shard, limit)
        assert micro_batches[0].start == 0
        assert micro_batches[-1].stop == shard.stop - shard.start
        assert all(a.stop == b.start for a, b in pairwise(micro_batches))
        assert all(0 < stop - start <= limit for start, stop, _ in micro_batches)
        if limit >= batch // groups:
            size = shard.group_size
            assert all(start % size == 0 and stop - start == n * size for start, stop, n in micro_batches)
            assert sum(micro_batch.groups for micro_batch in micro_batches) == shard.groups


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize(("batch", "groups", "world"), [(16, 2, 4), (22, 2, 8), (8, 1, 3)])
def test_ranks_that_share_a_group_run_equally_many_micro_batches(
    batch: int, groups: int, world: int, limit: int
) -> None:
    shards = [shard_batch(batch, groups, rank, world) for rank in range(world)]
    counts = {len(split_into_micro_batches(shard, limit)) for shard in shards}
    assert len(counts) == 1


def test_fewer_clips_of_a_larger_grid_fit() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precision = choose_precision("fp32", torch.device("cpu"))
    small = clips_that_fit(model, Grid(8, 32, (1, 1), (32, 32)), precision, 2**30)
    large = clips_that_fit(model, Grid(16, 64, (1, 1), (64, 64)), precision, 2**30)
    assert small == pytest.approx(8 * large, rel=0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
