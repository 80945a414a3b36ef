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
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from mgvideo.errors import UserError
from mgvideo.loading.random_streams import Stream, random_seed
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
    crop_area: tuple[float, float] | None = None  # range of the area of a random-resized crop, as a part of the frame
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # range of its width divided by its height
    protocol: str = "regular"  # regular; published: the frames and crops of PySlowFast
    target_fps: float | None = None  # strides count frames at this rate; None: frames of the file
    antialias: bool = True  # resize with antialiasing

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_aspect"):  # JSON, which listings are stored in, has lists
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))

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
        """Resize frames of the box, uint8 `[t, h, w, 3]`, and return its crops, `[t, size, size, 3]` each."""
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


@dataclass(frozen=True)
class ResizedCrops:
    """Crops of a frame, each resized to the grid's size.

    Attributes:
        box: The part of the frame to read.
        crops: Parts of the box.
        size: Side of the resized crops, in pixels.
    """

    box: Box
    crops: tuple[Box, ...]
    size: int

    def apply(self, frames: Tensor, antialias: bool) -> list[Tensor]:
        """Return the crops of frames of the box, uint8 `[t, h, w, 3]`: `[t, size, size, 3]` each."""
        return [resize(crop.crop(frames), self.size, antialias) for crop in self.crops]


def resize(frames: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize frames uint8 `[t, h, w, 3]` to contiguous `[t, size, size, 3]`, bilinear."""
    if frames.shape[1:3] == (size, size):
        return frames.contiguous()
    planes = interpolate(frames.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=antialias)
    return planes.permute(0, 2, 3, 1).contiguous()


def clip_crops(
    request: ClipRequest, draw: ClipDraw, sampling: Sampling, height: int, width: int
) -> ScaledCrops | ResizedCrops:
    """Return the crops of a clip in frames of this size. A random-resized crop is the same under both protocols."""
    if sampling.published and draw.crop is None:
        return scaled_crops(request, draw, height, width)
    boxes = tuple(crop_boxes(request, draw, height, width))
    if request.view is not None:
        return ResizedCrops(Box(0, 0, height, width), boxes, request.grid.size)
    return ResizedCrops(boxes[0], (Box(0, 0, boxes[0].height, boxes[0].width),), request.grid.size)
