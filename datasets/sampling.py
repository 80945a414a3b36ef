"""The frames and crops of a clip: pure functions of the request and the video's dimensions.

`draw_clip` draws all random numbers before the file is opened, because the decoder takes the short side. Once the
video's dimensions are known, `clip_indices` and `crop_boxes` turn the draws into frame indices and crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from mgvideo.errors import UserError
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.loading.requests import ClipRequest

from .videofile import Box

# Times in annotations and files are rounded. If a span starts less than this before a frame, it starts with that frame.
ROUNDING_TOLERANCE_S = 0.0015


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of a dataset's published recipes, in addition to the grid."""

    flip: bool = True  # mirror training clips left to right with probability 1/2
    inverse_jitter: bool = False  # draw the inverse of the short side uniformly (Charades)
    segments: bool = False  # split the video into one segment a frame, take one frame of each (Something-Something)
    crop_area: tuple[float, float] | None = None  # range of the area of a random-resized crop, as a part of the frame
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # range of its width divided by its height


@dataclass(frozen=True)
class ClipDraw:
    """The random draws for one clip; `start`, `top` and `left` are fractions from 0 to 1 of the possible range."""

    stride: int
    short_side: int
    start: float
    top: float
    left: float
    flip: bool
    crop: RelativeCrop | None = None


class RelativeCrop(NamedTuple):
    """The draw of a random-resized crop: `fraction`, from 0 to 1, is how large the crop is among all that fit."""

    area: tuple[float, float]  # range, as a part of the frame
    fraction: float
    aspect: float  # width divided by height

    def size_in(self, height: float, width: float) -> tuple[float, float]:
        """Return height and width of the crop in a frame of this size, in the frame's unit."""
        largest = min(self.area[1], width / (height * self.aspect), height * self.aspect / width)
        smallest = min(self.area[0], largest)
        area = (smallest + self.fraction * (largest - smallest)) * height * width
        return math.sqrt(area / self.aspect), math.sqrt(area * self.aspect)

    def short_side(self, size: int) -> int:
        """Return the short side of a frame in which no side of the crop is below `size` pixels.

        It holds for a square frame; in longer frames the crop is larger.
        """
        return math.ceil(size / min(self.size_in(1.0, 1.0)))


def draw_relative_crop(request: ClipRequest, sampling: Sampling) -> RelativeCrop | None:
    """Draw a random-resized crop if the sampling has one: uniform in area and in the logarithm of the aspect ratio.

    The area is uniform among those that fit with the drawn aspect ratio. torchvision and PySlowFast draw both again if
    a crop does not fit; here a clip needs one draw, which is known before the file is opened.
    """
    if sampling.crop_area is None or request.view is not None:
        return None
    fraction, place = np.random.default_rng(random_seed(request.seed, Stream.CROP)).random(2).tolist()
    low, high = (math.log(aspect) for aspect in sampling.crop_aspect)
    return RelativeCrop(sampling.crop_area, fraction, math.exp(low + place * (high - low)))


def draw_clip(request: ClipRequest, sampling: Sampling) -> ClipDraw:
    """Draw the sampling of a training clip from the request's seed; a test view is deterministic.

    A test view uses the lower ends of the grid's ranges. Its clips are spaced uniformly from the video's first frame to
    its last; a single clip is in the middle.

    Raises:
        UserError: The crop is larger than the short side.
    """
    grid, view = request.grid, request.view
    (low, high), strides = grid.scales, grid.strides
    if low < grid.size:
        raise UserError(f"grid: a crop of {grid.size} pixels does not fit a short side of {low}; raise base.short_side")
    if view is not None:
        start = view.clip / (view.clips - 1) if view.clips > 1 else 0.5
        return ClipDraw(strides[0], low, start, 0.5, 0.5, False)
    rng = np.random.default_rng(request.seed)
    stride = int(rng.integers(strides[0], strides[1], endpoint=True))
    side, start, top, left, coin = rng.random(5)
    if sampling.inverse_jitter:
        short_side = round(1 / (1 / high + side * (1 / low - 1 / high)))
    else:
        short_side = low + int(side * (high - low + 1))
    crop = draw_relative_crop(request, sampling)
    short_side = short_side if crop is None else crop.short_side(grid.size)
    return ClipDraw(stride, short_side, start, top, left, sampling.flip and bool(coin < 0.5), crop)


def opening_short_side(request: ClipRequest, sampling: Sampling) -> int:
    """Return the short side for which to open a video: the largest that is drawn for any clip of `request.repeats`.

    So a clip is read from the same pixels, whether it is read alone or with the other clips of its video.
    """
    seeds = request.repeats or (request.seed,)
    return max(draw_clip(replace(request, seed=seed), sampling).short_side for seed in seeds)


def frame_span(seconds: Sequence[float] | np.ndarray, times: np.ndarray) -> tuple[int, int]:
    """Return the range of frames, as (first, one past the last), that are shown in `seconds`; the end is exclusive.

    `times`: see `videofile.Video.times`. The range is empty if the span starts after the video ends. Otherwise it has
    at least one frame.
    """
    start, end = seconds
    frames = len(times) - 1
    if start <= times[0] and end > times[-1]:
        return 0, frames
    tolerance = min(ROUNDING_TOLERANCE_S, 0.4 * float(np.median(np.diff(times))))
    if start > times[-1] - tolerance:
        return frames, frames
    first = max(0, int(np.searchsorted(times[:-1], start + tolerance, "right")) - 1)
    return first, max(first + 1, int(np.searchsorted(times[:-1], end - tolerance)))


def clip_indices(request: ClipRequest, draw: ClipDraw, sampling: Sampling, first: int, stop: int) -> np.ndarray:
    """Return the indices of a clip's frames within frames `first` to `stop` (exclusive): int64 `[frames]`.

    If the clip does not fit, the last frame is repeated, as in PySlowFast.
    """
    frames = request.grid.frames
    if sampling.segments:
        return first + _segment_indices(request, stop - first)
    span = (frames - 1) * draw.stride + 1
    room = max(stop - first - span, 0)
    # A random fraction is below 1, so each start is equally likely; the last view has 1, hence the min().
    start = min(int(draw.start * (room + 1)), room)
    return np.minimum(first + start + np.arange(frames) * draw.stride, stop - 1)


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
    """Return the squares, or the random-resized crop, to cut from a frame before resizing them to the grid's size.

    A training clip has one random crop; each position is equally likely. A test view has crops evenly spaced along the
    longer side; a single one is in the middle. The side of a square is rounded to whole pixels of the frame, so the
    short side that was drawn is exact to half a pixel of the frame.
    """
    if draw.crop is not None:
        rows, columns = (max(1, round(length)) for length in draw.crop.size_in(height, width))
        rows, columns = min(rows, height), min(columns, width)
        return [Box(int(draw.top * (height - rows + 1)), int(draw.left * (width - columns + 1)), rows, columns)]
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
