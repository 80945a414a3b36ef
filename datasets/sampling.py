"""The frames and crops of a clip: pure functions of the request and the video's dimensions.

`draw_clip` draws all random numbers before the file is opened, because the decoder takes the short side. Once the
video's dimensions are known, `clip_indices` and `crop_boxes` turn the draws into frame indices and crops. Under
`protocol="published"` they follow PySlowFast's temporal_sampling and spatial_sampling, with `scaled_crops` in place of
`crop_boxes`; docs/datasets/sampling.md has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest

from .videofile import TIME_ROUNDING_S, Box, Video

MEDIAN_FRAMES = 500  # frames before and after the start of a span that give the usual time between frames
ROUNDING = 1e-9  # added to real positions before they are truncated, because whole ones may be computed a bit too small


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a dataset and a recipe, in addition to the grid."""

    flip: bool = True  # mirror training clips left to right with probability 1/2
    inverse_jitter: bool = False  # draw the inverse of the short side uniformly (Charades)
    segments: bool = False  # split the video into one segment a frame, take one frame of each (Something-Something)
    protocol: str = "regular"  # regular; published: the frames and crops of PySlowFast
    target_fps: float | None = None  # strides count frames at this rate; None: frames of the file
    antialias: bool = True  # resize with antialiasing

    @property
    def published(self) -> bool:
        """Whether frames and crops are those of PySlowFast."""
        return self.protocol == "published"


@dataclass(frozen=True)
class ClipDraw:
    """The draws for one clip; `start`, `top` and `left` are fractions from 0 to 1 of the possible range."""

    stride: int
    short_side: int
    start: float
    top: float
    left: float
    flip: bool


def draw_clip(request: ClipRequest, sampling: Sampling) -> ClipDraw:
    """Draw the sampling of a training clip from the request's seed; a test view is deterministic.

    A test view uses the lower ends of the grid's ranges, and a single clip is in the middle; `clip_indices` places
    several.

    Raises:
        UserError: The crop is larger than the short side.
    """
    grid, view = request.grid, request.view
    (low, high), strides = grid.scales, grid.strides
    if low < grid.size:
        raise UserError(f"grid: a crop of {grid.size} pixels does not fit a short side of {low}; raise base.short_side")
    if view is not None:
        return ClipDraw(strides[0], low, 0.5, 0.5, 0.5, False)
    rng = np.random.default_rng(request.seed)
    stride = int(rng.integers(strides[0], strides[1], endpoint=True))
    side, start, top, left, coin = rng.random(5)
    if sampling.inverse_jitter:
        short_side = round(1 / (1 / high + side * (1 / low - 1 / high)))
    else:
        short_side = low + int(side * (high - low + 1))
    return ClipDraw(stride, short_side, start, top, left, sampling.flip and bool(coin < 0.5))


def frame_span(seconds: Sequence[float] | np.ndarray, times: np.ndarray) -> tuple[int, int]:
    """Return the range of frames, as (first, one past the last), that are shown in `seconds`; the end is exclusive.

    `times`: see `videofile.Video.times`. A span that starts less than TIME_ROUNDING_S before a frame starts with it.
    The range is empty if the span starts after the video ends. Otherwise it has at least one frame.
    """
    start, end = seconds
    frames = len(times) - 1
    if start <= times[0] and end > times[-1]:
        return 0, frames
    near = np.searchsorted(times, start)
    gaps = np.diff(times[max(0, near - MEDIAN_FRAMES) : near + MEDIAN_FRAMES])
    tolerance = min(TIME_ROUNDING_S, 0.4 * float(np.median(gaps if len(gaps) else np.diff(times))))
    if start > times[-1] - tolerance:
        return frames, frames
    first = max(0, int(np.searchsorted(times[:-1], start + tolerance, "right")) - 1)
    return first, max(first + 1, int(np.searchsorted(times[:-1], end - tolerance)))


def clip_indices(
    request: ClipRequest, draw: ClipDraw, sampling: Sampling, first: int, stop: int, video: Video | None = None
) -> np.ndarray:
    """Return the indices of a clip's frames within frames `first` to `stop` (exclusive): int64 `[frames]`.

    If the clip does not fit, the last frame is repeated, as in PySlowFast. Without a `video`, `target_fps` is ignored.
    """
    length = stop - first
    if sampling.segments:
        return first + _segment_indices(request, length)
    if video is not None and video.is_folder and sampling.published:
        sampling = replace(sampling, protocol="regular", target_fps=None)  # PySlowFast counts the images of a folder
    ratio, mean_gap = (1.0, 0.0) if video is None else target_ratio(sampling, video, first, stop)
    step = draw.stride * ratio
    positions = _clip_positions(request, draw, sampling.published, step, length)
    if video is not None and mean_gap:
        seconds = float(video.times[first]) + positions * mean_gap + ROUNDING
        positions = np.searchsorted(video.times[first:stop], seconds, "right") - 1
    return first + np.clip(positions + ROUNDING, 0, length - 1).astype(np.int64)


def target_ratio(sampling: Sampling, video: Video, first: int, stop: int) -> tuple[float, float]:
    """Return how many frames of a video make one at `target_fps`, and the mean seconds of one if they are uneven.

    The ratio is 1 without `target_fps`, or if all frames have one time. The seconds are 0 if the frames from `first` to
    `stop` (exclusive) are evenly spaced.
    """
    if sampling.target_fps is None:
        return 1.0, 0.0
    if video.rate is not None:
        return video.rate / sampling.target_fps, 0.0
    mean_gap = float(video.times[stop] - video.times[first]) / (stop - first)
    return (1 / (mean_gap * sampling.target_fps), mean_gap) if mean_gap else (1.0, 0.0)


def _clip_positions(request: ClipRequest, draw: ClipDraw, published: bool, step: float, length: int) -> np.ndarray:
    """Return the positions of a clip's frames, `step` apart, in a video of `length` frames: float64 `[frames]`.

    Test clip k of K starts at k / K of the possible range if `published`, else at k / (K − 1).
    """
    frames, view = request.grid.frames, request.view
    start = draw.start
    if view is not None and view.clips > 1:
        start = view.clip / (view.clips if published else view.clips - 1)
    if published:
        size = max(1.0, step * frames)
        start *= max(length - size, 0)
        return np.linspace(start, start + size - 1, frames)
    room = max(length - 1 - (frames - 1) * step, 0)
    if step.is_integer():  # start at a frame; a random fraction is below 1, so each is equally likely
        return min(int(start * (room + 1)), room) + np.arange(frames) * step
    return start * room + np.arange(frames) * step


def _segment_indices(request: ClipRequest, length: int) -> np.ndarray:
    """Return one frame of each segment: a random one, or for test clip k of K the one at (k + ½) / K.

    PySlowFast does the same with K = 1. The segments cover the whole video, so the grid's stride is not used.
    """
    frames, view = request.grid.frames, request.view
    ends = np.round(np.arange(frames + 1) * (length - 1) / frames)
    if view is None:
        fractions = np.random.default_rng((request.seed, frames)).random(frames)
        return (ends[:-1] + fractions * (np.diff(ends) + 1)).astype(np.int64)
    return (ends[:-1] + (view.clip + 0.5) / view.clips * np.diff(ends)).astype(np.int64)


def crop_boxes(request: ClipRequest, draw: ClipDraw, height: int, width: int) -> list[Box]:
    """Return the squares to crop from a frame before resizing them to the grid's size.

    A training clip has one random crop; each position is equally likely. A test view has crops evenly spaced along the
    longer side; a single one is in the middle. The side of a square is rounded to whole pixels of the frame, so the
    short side that was drawn is exact to half a pixel of the frame.
    """
    side = max(1, round(min(height, width) * request.grid.size / draw.short_side))
    room = height - side, width - side
    if request.view is None:
        return [Box(int(draw.top * (room[0] + 1)), int(draw.left * (room[1] + 1)), side, side)]
    crops = request.view.crops
    fractions = np.linspace(0, 1, crops) if crops > 1 else [0.5]
    is_portrait = height > width
    return [
        Box(
            round(room[0] * (fraction if is_portrait else 0.5)),
            round(room[1] * (0.5 if is_portrait else fraction)),
            side,
            side,
        )
        for fraction in fractions
    ]


@dataclass(frozen=True)
class ScaledCrops:
    """Crops of a frame that is scaled as in PySlowFast: the short side to the drawn one, the long side rounded down.

    Only `box` of the frame is resized. In testing it starts where a pixel of the scaled frame starts exactly at a pixel
    of the frame, so that the crops have the same pixels as those of the whole scaled frame.

    Attributes:
        box: The part of the frame to read.
        factors: Scaled height and width divided by those of the frame.
        crops: Squares of the resized box.
    """

    box: Box
    factors: tuple[float, float]
    crops: tuple[Box, ...]

    def apply(self, frames: Tensor, antialias: bool) -> list[Tensor]:
        """Resize the box, uint8 `[t, h, w, 3]`, and return its crops, `[t, size, size, 3]` each."""
        if self.factors != (1, 1):
            # The sizes that torch computes from the factors are rounded down.
            factors = tuple(factor * (1 + 1e-9) for factor in self.factors)
            planes = frames.permute(0, 3, 1, 2)
            frames = interpolate(planes, scale_factor=factors, mode="bilinear", antialias=antialias).permute(0, 2, 3, 1)
        return [crop.crop(frames) for crop in self.crops]


def scaled_crops(request: ClipRequest, draw: ClipDraw, height: int, width: int) -> ScaledCrops:
    """Return the crops of the published protocol.

    A test view has crops at both ends of the longer side and in the middle; a single one is in the middle. A training
    clip has one random crop that starts at a pixel of the frame, so that no more than the crop is resized. The first
    row and column of that crop do not depend on the pixels beside them.
    """
    size, short, view = request.grid.size, min(height, width), request.view
    is_portrait = height > width
    axes = []
    for side, fraction, is_longer in ((height, draw.top, is_portrait), (width, draw.left, not is_portrait)):
        # In floating point and rounded down, as in PySlowFast. It leaves a frame of the right size alone.
        scaled = side if short == draw.short_side else math.floor(side / short * draw.short_side)
        if view is None:
            start = int(fraction * (side - math.ceil(size * side / scaled) + 1))
            axes.append((scaled / side, start, [0], size))
            continue
        middle = math.ceil((scaled - size) / 2)
        starts = [0, middle, scaled - size] if view.crops == 3 and is_longer else [middle] * view.crops
        period = scaled // math.gcd(scaled, side)  # every `period` pixels of the scaled frame, pixels of both coincide
        # A bilinear pixel depends on the one before it too, which up to `overlap` pixels of the scaled frame cover.
        overlap = math.ceil(max(scaled / side - 1, 0) / 2)
        origin = max(0, min(starts) - overlap) // period * period
        axes.append((scaled / side, origin * side // scaled, [n - origin for n in starts], max(starts) - origin + size))
    (tall, top, tops, rows), (wide, left, lefts, columns) = axes
    # The last pixels of a crop depend on one more pixel of the frame.
    box = Box(
        top,
        left,
        min(math.ceil(rows / tall) + 1, height - top),
        min(math.ceil(columns / wide) + 1, width - left),
    )
    return ScaledCrops(box, (tall, wide), tuple(Box(y, x, size, size) for y, x in zip(tops, lefts, strict=True)))
