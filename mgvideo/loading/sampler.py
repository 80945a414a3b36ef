"""From a step to the clips to load."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from mgvideo.plan.plan import Grid, Plan
from mgvideo.plan.shards import shard_batch

from .random_streams import Stream, random_words
from .requests import BatchRequest, ClipRequest, View

_ROUNDS = 16  # as few as leave each order of 5 or 6 videos equally frequent


@dataclass(frozen=True)
class ClipSampler:
    """A pure function of (plan, dataset size, seed, step).

    A resumed run, or one with other workers or another number of ranks, sees the same clips in the same order. The
    videos are an endless row of shuffled passes over the dataset, so each video comes once a pass, also where the
    batch size changes in the middle of one.
    """

    plan: Plan
    size: int  # videos in the dataset
    seed: int

    def shard(self, step: int, rank: int = 0, world_size: int = 1) -> BatchRequest:
        """Return the clips of one of `world_size` ranks, in the order of the global batch.

        The cost grows with this rank's clips, not with the global batch or the dataset.

        Raises:
            UserError: the batch cannot be cut among `world_size` ranks.
        """
        phase, slot = self.plan.phase(step), self.plan.slot(step)
        shard = shard_batch(slot.batch, phase.bn_groups, rank, world_size)
        first = self.plan.clips_before(step)
        positions = np.arange(first + shard.start, first + shard.stop, dtype=np.uint64)
        videos = shuffled_videos(positions, self.size, self.seed).tolist()
        seeds = random_words(self.seed, Stream.CLIP_SEEDS, positions).tolist()
        clips = [ClipRequest(video, slot.grid, seed) for video, seed in zip(videos, seeds, strict=True)]
        return BatchRequest(clips, shard)


def request_views(grid: Grid, clips: int, crops: int, numbers: range, batch: int, step: int) -> BatchRequest:
    """Return the views that a step of a test looks at, `batch` of `numbers`, which counts clips video by video."""
    return BatchRequest(
        [
            ClipRequest(number // clips, grid, 0, View(number % clips, clips, crops))
            for number in numbers[step * batch : (step + 1) * batch]
        ]
    )


def shuffled_videos(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return the video at each position of an endless row of shuffled passes over `size` videos, uint64 as given.

    A Feistel network over a rectangle of at least `size` cells permutes the cells (Black and Rogaway 2002, "Ciphers
    with arbitrary finite domains"); a cell outside the dataset is permuted again until it is inside. So a position
    costs the same whatever the dataset's size, and no order is kept.
    """
    passes, cells = np.divmod(positions, np.uint64(size))
    root = isqrt(size - 1) + 1
    rows = np.uint64(root + root % 2)  # even: with two odd sides every permutation of the cells would be an even one
    columns = np.uint64(-(-size // int(rows)))
    outside = np.arange(len(cells))
    while len(outside):
        cells[outside] = _permuted(cells[outside], passes[outside], rows, columns, seed)
        outside = outside[cells[outside] >= size]
    return cells


def _permuted(cells: np.ndarray, passes: np.ndarray, rows: np.uint64, columns: np.uint64, seed: int) -> np.ndarray:
    """Permute the cells of a rows × columns rectangle, in another way in each pass."""
    row, column = np.divmod(cells, columns)
    for turn in range(0, _ROUNDS, 2):
        row = (row + random_words(seed, Stream.VIDEO_ORDER, turn, passes, column) % rows) % rows
        column = (column + random_words(seed, Stream.VIDEO_ORDER, turn + 1, passes, row) % columns) % columns
    return row * columns + column
