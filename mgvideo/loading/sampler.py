"""Choose the clips to load for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    batch size changes within a pass. With `classes` the passes are over the classes instead, see `ClassOrder`.
    """

    plan: Plan
    size: int  # videos in the dataset
    seed: int
    repeat: int = 1  # consecutive clips of one video; the plan's batches should be multiples of it
    classes: ClassOrder | None = None  # None: each pass has each video once

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
        seeds = random_words(self.seed, Stream.CLIP_SEEDS, positions).tolist()
        places = positions // np.uint64(self.repeat)
        if self.classes is None:
            videos = shuffled_videos(places, self.size, self.seed).tolist()
        else:
            videos = self.classes.videos_at(places, self.seed).tolist()
        clips = [
            ClipRequest(video, slot.grid, seed, repeats=seeds_of_video)
            for video, seed, seeds_of_video in zip(videos, seeds, self._repeats(places), strict=True)
        ]
        return BatchRequest(clips, shard)

    def _repeats(self, places: np.ndarray) -> list[tuple[int, ...]]:
        """Return for each place in the sequence of videos the seeds of all its clips; empty if it has only one."""
        if self.repeat == 1:
            return [()] * len(places)
        positions = places[:, None] * np.uint64(self.repeat) + np.arange(self.repeat, dtype=np.uint64)
        return [tuple(seeds) for seeds in random_words(self.seed, Stream.CLIP_SEEDS, positions).tolist()]


@dataclass(frozen=True)
class ClassOrder:
    """An endless sequence of videos in which all classes have the same share.

    Each pass has every class once, in shuffled order. The visits to a class go through shuffled passes over its videos.
    So a class of few videos repeats them, and every video of a class is seen before one is seen again.

    Attributes:
        videos: int64 `[videos]`, the videos sorted by class.
        starts: int64 `[classes]`, where each class that has videos starts in `videos`.
        counts: int64 `[classes]`, their numbers of videos.
    """

    videos: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_labels(cls, labels: np.ndarray) -> ClassOrder:
        """Return the order for the classes of all videos, int64 `[videos]`."""
        _, starts, counts = np.unique(np.sort(labels), return_index=True, return_counts=True)
        return cls(np.argsort(labels, kind="stable"), starts, counts)

    def videos_at(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the video at each position of the sequence; shapes as in `shuffled_videos`."""
        visits = positions // np.uint64(len(self.counts))
        classes = shuffled_videos(positions, len(self.counts), seed, Stream.CLASS_ORDER).astype(np.int64)
        places = shuffled_videos(visits, self.counts[classes], seed, Stream.VIDEOS_OF_CLASS, classes)
        return self.videos[self.starts[classes] + places.astype(np.int64)]


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


def shuffled_videos(
    positions: np.ndarray,
    size: int | np.ndarray,
    seed: int,
    stream: Stream = Stream.VIDEO_ORDER,
    *sequence: np.ndarray,
) -> np.ndarray:
    """Return the video at each position of an endless sequence of shuffled passes over `size` videos.

    A Feistel network permutes the cells of a rectangle of at least `size` cells (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"). A result that is no video (≥ `size`) is permuted again until it is one. So the cost of a
    position does not depend on the dataset size, and no permutation is stored.

    Args:
        positions: uint64 `[n]`, counted from the start of the sequence.
        size: number of videos; one for each position if the positions are of several sequences.
        seed: seed of the run.
        stream: of random numbers.
        sequence: integers `[n]` that name the sequence of each position, if there are several.

    Returns:
        uint64 `[n]`, indices of videos.
    """
    sizes = np.broadcast_to(np.asarray(size, np.uint64), positions.shape)
    passes, cells = np.divmod(positions, sizes)
    roots = np.sqrt(sizes - np.uint64(1)).astype(np.uint64) + np.uint64(1)
    rows = roots + roots % np.uint64(2)  # even, because with two odd sides only even permutations would be possible
    columns = (sizes + rows - np.uint64(1)) // rows
    outside = np.arange(len(cells))
    while len(outside):
        keys = [*(part[outside] for part in sequence), passes[outside]]
        cells[outside] = _permute(cells[outside], rows[outside], columns[outside], seed, stream, keys)
        outside = outside[cells[outside] >= sizes[outside]]
    return cells


def _permute(
    cells: np.ndarray, rows: np.ndarray, columns: np.ndarray, seed: int, stream: Stream, keys: Sequence[np.ndarray]
) -> np.ndarray:
    """Permute the cells of rows × columns rectangles. Other keys give other permutations."""
    row, column = np.divmod(cells, columns)
    for i in range(0, _ROUNDS, 2):
        row = (row + random_words(seed, stream, i, *keys, column) % rows) % rows
        column = (column + random_words(seed, stream, i + 1, *keys, row) % columns) % columns
    return row * columns + column
