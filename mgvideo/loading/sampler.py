"""Choose the clips to load for each step."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np

from mgvideo.plan.plan import Grid, Plan
from mgvideo.plan.shards import shard_batch

from .random_streams import Stream, random_words
from .requests import BatchRequest, ClipRequest, View

_ROUNDS = 16  # of the Feistel network; the smallest number with which all orders of 5 or 6 videos are equally frequent


@dataclass(frozen=True)
class ClipSampler:
    """Maps a step to the clips to load: a pure function of (plan, dataset size, seed, step).

    A resumed run, or a run with other numbers of workers or ranks, uses the same clips in the same order. Videos are
    drawn from an endless sequence of shuffled passes over the dataset. So every pass has each video once, even if the
    batch size changes within a pass.
    """

    plan: Plan
    size: int  # videos in the dataset
    seed: int

    def shard(self, step: int, rank: int = 0, world_size: int = 1) -> BatchRequest:
        """Return the clips of a step that `rank` of `world_size` ranks loads, in the order of the global batch.

        The cost is proportional to this rank's clips. It does not depend on the global batch or the dataset size.

        Raises:
            UserError: `world_size` ranks cannot share the batch, see `shard_batch`.
        """
        phase, slot = self.plan.phase(step), self.plan.slot(step)
        shard = shard_batch(slot.batch, phase.bn_groups, rank, world_size)
        batch_start = self.plan.clips_before(step)
        positions = np.arange(batch_start + shard.start, batch_start + shard.stop, dtype=np.uint64)
        videos = shuffled_videos(positions, self.size, self.seed).tolist()
        seeds = random_words(self.seed, Stream.CLIP_SEEDS, positions).tolist()
        clips = [ClipRequest(video, slot.grid, seed) for video, seed in zip(videos, seeds, strict=True)]
        return BatchRequest(clips, shard)


def request_views(grid: Grid, clips: int, crops: int, numbers: range, batch: int, step: int) -> BatchRequest:
    """Return the requests of one test batch.

    Args:
        grid: the grid of all clips.
        clips: clips per video.
        crops: crops per clip.
        numbers: the clips to test. Clip `number` is clip `number % clips` of video `number // clips`.
        batch: clips per step, before crops.
        step: which batch of `numbers` to return.
    """
    return BatchRequest(
        [
            ClipRequest(number // clips, grid, 0, View(number % clips, clips, crops))
            for number in numbers[step * batch : (step + 1) * batch]
        ]
    )


def shuffled_videos(positions: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return the video at each position of an endless sequence of shuffled passes over `size` videos.

    A Feistel network permutes the cells of a rectangle of at least `size` cells (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"). A result that is no video (≥ `size`) is permuted again until it is one. So the cost of a
    position does not depend on the dataset size, and no permutation is stored.

    Args:
        positions: uint64 `[n]`, counted from the start of the sequence.
        size: number of videos.
        seed: seed of the run.

    Returns:
        uint64 `[n]`, indices of videos.
    """
    passes, cells = np.divmod(positions, np.uint64(size))
    root = isqrt(size - 1) + 1
    rows = np.uint64(root + root % 2)  # even, because with two odd sides only even permutations would be possible
    columns = np.uint64(-(-size // int(rows)))
    outside = np.arange(len(cells))
    while len(outside):
        cells[outside] = _permute(cells[outside], passes[outside], rows, columns, seed)
        outside = outside[cells[outside] >= size]
    return cells


def _permute(cells: np.ndarray, passes: np.ndarray, rows: np.uint64, columns: np.uint64, seed: int) -> np.ndarray:
    """Permute the cells of a rows × columns rectangle. Each pass has a different permutation."""
    row, column = np.divmod(cells, columns)
    for i in range(0, _ROUNDS, 2):
        row = (row + random_words(seed, Stream.VIDEO_ORDER, i, passes, column) % rows) % rows
        column = (column + random_words(seed, Stream.VIDEO_ORDER, i + 1, passes, row) % columns) % columns
    return row * columns + column
