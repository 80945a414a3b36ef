"""Which pixels of which frames a request asks for: pure functions of the request and the video's dimensions.

`choose` draws everything before a file is opened, because decoders may shrink while decoding; `clip_indices` and
`crop_boxes` turn the draws into places once the video's dimensions are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest

from .videofile import Box

SLACK_S = 0.0015  # annotations and files round times: a stretch that begins so shortly before a frame begins with it


@dataclass(frozen=True)
class Sampling:
    """How a dataset's published recipes sample, beside what the grid says."""

    flip: bool = True  # mirror every other training clip
    inverse_jitter: bool = False  # draw the short side uniformly in its inverse (Charades)
    segments: bool = False  # one frame of each of as many segments as there are frames (Something-Something)


@dataclass(frozen=True)
class Choice:
    """The draws for one clip; `start`, `top` and `left` are shares, from 0 to 1, of the room there is."""

    stride: int
    short_side: int
    start: float
    top: float
    left: float
    flip: bool


def choose(request: ClipRequest, sampling: Sampling) -> Choice:
    """Draw from the request's seed; for a view there is nothing to draw.

    A view takes the lower ends of the grid's ranges; its clips are spaced uniformly from the video's first frame to
    its last, a single one in the middle. Raises UserError where the crop does not fit.
    """
    grid, view = request.grid, request.view
    (low, high), strides = grid.scales, grid.strides
    if low < grid.size:
        raise UserError(f"grid: a crop of {grid.size} pixels does not fit a short side of {low}; raise base.short_side")
    if view is not None:
        start = view.clip / (view.clips - 1) if view.clips > 1 else 0.5
        return Choice(strides[0], low, start, 0.5, 0.5, False)
    rng = np.random.default_rng(request.seed)
    stride = int(rng.integers(strides[0], strides[1], endpoint=True))
    uniform, start, top, left, heads = rng.random(5)
    if sampling.inverse_jitter:
        short_side = round(1 / (1 / high + uniform * (1 / low - 1 / high)))
    else:
        short_side = low + int(uniform * (high - low + 1))
    return Choice(stride, short_side, start, top, left, sampling.flip and bool(heads < 0.5))


def frame_span(seconds: Sequence[float] | np.ndarray, times: np.ndarray) -> tuple[int, int]:
    """First frame, and one past the last, of those on display in a stretch of seconds, of which the end is not part.

    `times`: see `videofile.Video.times`. A stretch that begins after the video has no frames, any other at least one.
    """
    start, end = seconds
    frames = len(times) - 1
    if start <= times[0] and end > times[-1]:
        return 0, frames
    slack = min(SLACK_S, 0.4 * float(np.median(np.diff(times))))
    if start > times[-1] - slack:
        return frames, frames
    first = max(0, int(np.searchsorted(times[:-1], start + slack, "right")) - 1)
    return first, max(first + 1, int(np.searchsorted(times[:-1], end - slack)))


def clip_indices(request: ClipRequest, choice: Choice, sampling: Sampling, first: int, stop: int) -> np.ndarray:
    """Indices of a clip's frames within frames `first` to `stop` (exclusive): int64 `[frames]`.

    Where the stretch is too short for the clip its last frame is repeated, as in PySlowFast.
    """
    frames = request.grid.frames
    if sampling.segments:
        return first + _segment_indices(request, stop - first)
    span = (frames - 1) * choice.stride + 1
    room = max(stop - first - span, 0)
    # a random share below 1 reaches each start alike, the share 1 of the last view the last start
    start = min(int(choice.start * (room + 1)), room)
    return np.minimum(first + start + np.arange(frames) * choice.stride, stop - 1)


def _segment_indices(request: ClipRequest, length: int) -> np.ndarray:
    """One frame of each segment, at random or, for clip k of K, at (k + ½) / K of it: as PySlowFast, where K is 1.

    The stride of the grid has no say: the segments cover the whole video, whatever their number.
    """
    frames, view = request.grid.frames, request.view
    ends = np.round(np.arange(frames + 1) * (length - 1) / frames)
    if view is None:
        shares = np.random.default_rng((request.seed, frames)).random(frames)
        return (ends[:-1] + shares * (np.diff(ends) + 1)).astype(np.int64)
    return (ends[:-1] + (view.clip + 0.5) / view.clips * np.diff(ends)).astype(np.int64)


def crop_boxes(request: ClipRequest, choice: Choice, height: int, width: int) -> list[Box]:
    """The squares of a frame that, resized to the grid's size, are its crops: one, or a view's along the longer side.

    Cropping comes before resizing, so that a crop's side is whole in pixels of the frame: the short side drawn holds
    to half of such a pixel. At random each place is as likely; a view's crops are spaced evenly, one is the middle.
    """
    side = max(1, round(min(height, width) * request.grid.size / choice.short_side))
    room = height - side, width - side
    if request.view is None:
        return [Box(int(choice.top * (room[0] + 1)), int(choice.left * (room[1] + 1)), side, side)]
    crops = request.view.crops
    shares = np.linspace(0, 1, crops) if crops > 1 else [0.5]
    tall = height > width
    return [
        Box(round(room[0] * (share if tall else 0.5)), round(room[1] * (0.5 if tall else share)), side, side)
        for share in shares
    ]
