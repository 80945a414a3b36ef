"""What passes between the core and a dataset: a request for a clip, and the clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mgvideo.plan.plan import Grid
from mgvideo.plan.shards import BatchShard


@dataclass(frozen=True)
class View:
    """Which part of a video a test looks at: clip `clip` of `clips` uniformly spaced, all `crops` crops of it."""

    clip: int
    clips: int
    crops: int  # 1: centre; 3: along the longer side


@dataclass(frozen=True)
class ClipRequest:
    """One clip to read. Every random choice in reading it comes from `seed`; with a `view` there is none."""

    index: int
    grid: Grid
    seed: int
    view: View | None = None


class BatchRequest(NamedTuple):
    """The clips of one batch, and in training which part of the global batch they are."""

    clips: Sequence[ClipRequest]
    shard: BatchShard | None = None


@dataclass(frozen=True)
class DecodeFailure:
    """A video that could not be read."""

    index: int
    path: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """A clip as a dataset returns it.

    `clip` is uint8 `[t, s, s, 3]`, for a request with a view `[crops, t, s, s, 3]`. `label` is an int64 scalar, for
    multi-label tasks a float32 multi-hot `[classes]`. `index` is the video that the clip really came from: in training
    a substitute's where the requested one failed, `failures` naming those; in testing the requested one's, with a
    black clip where it failed.
    """

    clip: Tensor
    label: Tensor
    index: int
    failures: tuple[DecodeFailure, ...] = ()
