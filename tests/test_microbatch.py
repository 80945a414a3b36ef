from itertools import pairwise

import pytest
import torch
from torch import nn

from mgvideo.batches import share
from mgvideo.microbatch import clips_that_fit, pieces
from mgvideo.plan import Grid
from mgvideo.precision import choose_precision


@pytest.mark.parametrize("limit", [1, 3, 8, 9, 16, 63, 64, 1000])
@pytest.mark.parametrize(("batch", "groups", "world"), [(64, 8, 1), (64, 8, 3), (128, 8, 2), (24, 3, 2)])
def test_pieces_cover_a_share_in_order_and_fit(batch: int, groups: int, world: int, limit: int) -> None:
    for rank in range(world):
        part = share(batch, groups, rank, world)
        cuts = pieces(part, limit)
        assert cuts[0].start == 0
        assert cuts[-1].stop == part.stop - part.start
        assert all(a.stop == b.start for a, b in pairwise(cuts))
        assert all(0 < piece.stop - piece.start <= limit for piece in cuts)
        if limit >= batch // groups:
            assert all(
                p.start % part.group_size == 0 and (p.stop - p.start) == p.groups * part.group_size for p in cuts
            )
            assert sum(piece.groups for piece in cuts) == part.groups


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize(("batch", "groups", "world"), [(16, 2, 4), (22, 2, 8), (8, 1, 3)])
def test_ranks_that_share_a_group_run_as_many_pieces(batch: int, groups: int, world: int, limit: int) -> None:
    counts = {len(pieces(share(batch, groups, rank, world), limit)) for rank in range(world)}
    assert len(counts) == 1


def test_measured_clips_shrink_with_the_grid() -> None:
    model = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    precision = choose_precision("fp32", torch.device("cpu"))
    small = clips_that_fit(model, Grid(8, 32, (1, 1), (32, 32)), precision, 2**30)
    large = clips_that_fit(model, Grid(16, 64, (1, 1), (64, 64)), precision, 2**30)
    assert small == pytest.approx(8 * large, rel=0.2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
