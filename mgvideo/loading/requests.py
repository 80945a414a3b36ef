"""The types that the core and a dataset exchange: a request for a clip, and the clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mgvideo.plan.plan import Grid
from mgvideo.plan.shards import BatchShard


@dataclass(frozen=True)
class View:
    """A test view of a video: clip `clip` of `clips` uniformly spaced clips, with `crops` crops."""

    clip: int
    clips: int
    crops: int  # 1: centre; 3: along the longer side


@dataclass(frozen=True)
class ClipRequest:
    """One clip to read.

    Every random choice in reading it is drawn from `seed`. With a `view` nothing is random.
    """

    index: int  # of the video in the dataset
    grid: Grid
    seed: int
    view: View | None = None
    repeats: tuple[int, ...] = ()  # the seeds of all clips that are read of this video together; empty: only this one


class BatchRequest(NamedTuple):
    """The clips of one batch, and in training the shard of the global batch that they are."""

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

    `clip` is uint8 `[t, s, s, 3]`, or `[crops, t, s, s, 3]` for a request with a view. `label` is an int64 scalar, or
    float32 multi-hot `[classes]` for multi-label tasks.

    `index` is the video that the clip was read from. If the requested video cannot be read, `failures` lists what
    failed. In training `index` is then the substitute video; in testing it stays the requested video and the clip is
    black.
    """

    clip: Tensor
    label: Tensor
    index: int
    failures: tuple[DecodeFailure, ...] = ()
