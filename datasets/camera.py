"""Camera: a dataset of mp4 files in which a virtual camera moves over photographs; twelve classes of camera motion.

The camera pans, tilts, zooms or rolls, in one direction or to and fro, and videos are cut. In every frame and every
class, the camera's position is uniform over the photograph (continued by its mirror images), its angle uniform over the
circle, and its zoom log-uniform over a range. So a single frame has no information about the class. Training and
validation use different photographs, which ship with scikit-image (the extra `camera`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mgvideo.errors import UserError

from .decoders import Decoder
from .generated import DrawnVideo, VideoKnobs, make_dataset
from .lists import video_list
from .parallel import FileProgress, ignore_progress
from .video import VideoDataset

CLASSES = (
    "pans left",
    "pans right",
    "tilts up",
    "tilts down",
    "zooms in",
    "zooms out",
    "rolls clockwise",
    "rolls counter-clockwise",
    "pans to and fro",
    "tilts to and fro",
    "zooms to and fro",
    "rolls to and fro",
)
# Files of skimage/data in the wheels of scikit-image, all in the public domain, CC0 or without known restrictions:
# docs/datasets/camera.md lists their sources.
PHOTOGRAPHS = {
    "train": ("astronaut.png", "brick.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "rocket.jpg"),
    "val": ("camera.png", "chelsea.png", "coffee.png", "gravel.png"),
}

Array = NDArray[np.floating[Any]]


class Level(NamedTuple):
    """An image of height × width, continued by its mirror image to the right and below, with two more pixels each."""

    height: int
    width: int
    pixels: NDArray[np.uint8]  # [(2 height + 2) · (2 width + 2), 3]


@dataclass(frozen=True)
class Knobs(VideoKnobs):
    """Settings of a Camera dataset. Lengths are fractions of the frame's height."""

    speeds: tuple[float, float] = (0.01, 0.025)  # range of the speed of a pan or tilt, per frame
    zooming: float = 1.0  # change of the zoom's logarithm, relative to the speeds
    rolling: float = 1.5  # angle of a roll in radians, relative to the speeds
    turns: tuple[int, int] = (10, 16)  # range of the frames between two changes of direction, to and fro
    views: tuple[float, float] = (0.3, 0.7)  # range of the frame's height, as a fraction of the photograph's short side
    cuts: int = 1  # largest number of cuts, besides those where the zoom leaves its range
    gains: tuple[float, float] = (0.7, 1.2)  # range of the brightness, relative to the photograph's

    def __post_init__(self) -> None:
        low, high = self.views
        if not 0 < low < high <= 1:
            raise UserError(f"Camera: views must rise, above 0 and up to 1, not {tuple(self.views)}")
        if self.height % 2 or self.width % 2:
            raise UserError(f"Camera: width and height must be even, not {self.width}×{self.height}")
        if min(self.train, self.val, self.frames, self.turns[0]) < 1 or self.cuts < 0:
            raise UserError("Camera: train, val, frames and turns must be at least 1, cuts at least 0")


def make_camera(
    root: str, knobs: Knobs, processes: int | None = None, progress: FileProgress = ignore_progress
) -> Path:
    """Create the dataset under `root` unless it exists; returns its folder, see `make_dataset`.

    Raises:
        UserError: the photographs are not installed.
    """
    if not (Path(root) / knobs.name).is_dir():
        _photograph_folder()
    return make_dataset(root, knobs, CLASSES, draw_video, processes, progress)


def camera(root: str, knobs: Knobs, split: str, decoder: Decoder | None = None) -> VideoDataset:
    """Return the `train` or `val` videos; creates the files if needed. No flips, because a flip changes the class."""
    return video_list(str(make_camera(root, knobs)), f"{split}.csv", decoder=decoder, flip=False)


def draw_video(knobs: Knobs, split: str, index: int) -> DrawnVideo:
    """Draw a video of the dataset: a pure function of its arguments and the photographs."""
    label = index % len(CLASSES)
    rng = np.random.default_rng((knobs.seed, split == "val", index))
    return DrawnVideo([label], draw_frames(label, knobs, split, rng))


def draw_frames(label: int, knobs: Knobs, split: str, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of one video, uint8 RGB `[h, w, 3]`."""
    pan, tilt, roll, zoom, cut = _camera_path(label, knobs, rng)
    photographs = [_photograph(name) for name in PHOTOGRAPHS[split]]
    low, high = np.log(knobs.views)
    for t in range(knobs.frames):
        if t == 0 or cut[t]:
            levels = photographs[rng.integers(len(photographs))]
            # x and y in periods of the photograph and its mirror image, the camera's angle, and the colours
            x, y, angle = rng.uniform(0, 1, 3) * (1, 1, 2 * np.pi)
            gain, start = rng.uniform(*knobs.gains) * rng.uniform(0.9, 1.1, 3), t
        height, width = levels[0].height, levels[0].width
        view = np.exp(low + zoom[t] * (high - low)) * min(height, width)  # the frame's height in the photograph
        turned = angle + roll[t] - roll[start]
        right, down = (pan[t] - pan[start]) * view, (tilt[t] - tilt[start]) * view
        centre = (
            2 * width * x + np.cos(angle) * right - np.sin(angle) * down,
            2 * height * y + np.sin(angle) * right + np.cos(angle) * down,
        )
        frame = _film(levels, centre, turned, view, knobs) * gain
        yield (frame.clip(0, 255) + 0.5).astype(np.uint8)


def _camera_path(label: int, knobs: Knobs, rng: np.random.Generator) -> tuple[Array, ...]:
    """Return pan, tilt (frame heights), roll (radians), zoom (fraction of its range), and where there is a cut.

    Each has a value a frame. In all classes there are cuts where the zoom would leave its range if the camera zoomed,
    so that they do not tell the class.
    """
    motion, direction = (label // 2, 1 - 2 * (label % 2)) if label < 8 else (label - 8, 1)
    frames = np.arange(knobs.frames)
    phase, speed = rng.uniform(0, 1), rng.uniform(*knobs.speeds)
    half = int(rng.integers(knobs.turns[0], knobs.turns[1] + 1))
    position = frames + int(rng.integers(2 * half))
    to_and_fro = half - abs(position % (2 * half) - half)
    travel = speed * (frames if label < 8 else to_and_fro - to_and_fro[0])
    zoomed = phase + rng.choice([-1, 1]) * knobs.zooming * travel / np.log(knobs.views[1] / knobs.views[0])
    if motion == 2:  # a smaller view is closer: zooming in lowers it
        zoomed = phase - direction * knobs.zooming * travel / np.log(knobs.views[1] / knobs.views[0])
    cut = np.diff(np.floor(zoomed), prepend=np.floor(zoomed[0])) != 0
    cut[rng.integers(knobs.frames, size=rng.integers(knobs.cuts + 1))] = True
    still = np.zeros(knobs.frames)
    pan = -direction * travel if motion == 0 else still
    tilt = -direction * travel if motion == 1 else still
    roll = direction * knobs.rolling * travel if motion == 3 else still
    return pan, tilt, roll, zoomed % 1 if motion == 2 else still + phase, cut


def _film(levels: Sequence[Level], centre: tuple[float, float], angle: float, view: float, knobs: Knobs) -> Array:
    """Return the frame `[h, w, 3]` that a camera sees, interpolated linearly.

    Args:
        levels: the photograph, and copies of half, a quarter, … of its size.
        centre: of the frame, x and y in pixels of the photograph.
        angle: of the camera, radians.
        view: height of the frame in pixels of the photograph.
    """
    pixel = view / knobs.height  # of the frame, in pixels of the photograph
    level = min(max(0, int(np.log2(max(1.0, pixel)))), len(levels) - 1)
    image, scale = levels[level], 2**level
    dx = (np.arange(knobs.width) + 0.5 - knobs.width / 2) * pixel
    dy = ((np.arange(knobs.height) + 0.5 - knobs.height / 2) * pixel)[:, None]
    x = ((centre[0] + np.cos(angle) * dx - np.sin(angle) * dy) / scale - 0.5) % (2 * image.width)
    y = ((centre[1] + np.sin(angle) * dx + np.cos(angle) * dy) / scale - 0.5) % (2 * image.height)
    left, top = x.astype(np.int32), y.astype(np.int32)
    fx, fy = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    stride = 2 * image.width + 2
    corner = top * stride + left
    corners = [image.pixels.take(corner + offset, axis=0) for offset in (0, 1, stride, stride + 1)]
    return (corners[0] * (1 - fx) + corners[1] * fx) * (1 - fy) + (corners[2] * (1 - fx) + corners[3] * fx) * fy


@lru_cache(maxsize=16)
def _photograph(name: str) -> list[Level]:
    """Return a photograph, and copies of half, a quarter, … of its size."""
    with Image.open(_photograph_folder() / name) as file:
        image = np.asarray(file.convert("RGB"), np.float32)
    levels = [_level(image)]
    while min(image.shape[:2]) >= 64:
        height, width = (side // 2 for side in image.shape[:2])
        image = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3).mean((1, 3))
        levels.append(_level(image))
    return levels


def _level(image: Array) -> Level:
    """Return a level of an RGB image `[h, w, 3]` from 0 to 255."""
    height, width, _ = image.shape
    tiled = np.pad((image + 0.5).astype(np.uint8), ((0, height + 2), (0, width + 2), (0, 0)), "symmetric")
    return Level(height, width, tiled.reshape(-1, 3))


def _photograph_folder() -> Path:
    """Return the folder of scikit-image's photographs, without importing it.

    Raises:
        UserError: scikit-image is not installed.
    """
    package = importlib.util.find_spec("skimage")
    folders = list(package.submodule_search_locations or []) if package else []
    folder = Path(folders[0], "data") if folders else Path()
    missing = [name for names in PHOTOGRAPHS.values() for name in names if not (folder / name).is_file()]
    if missing:
        what = "scikit-image is not installed" if not folders else f"{folder} has no {', '.join(missing)}"
        raise UserError(f"dataset=camera: {what}: run pip install 'mgvideo[camera]' (or pip install scikit-image)")
    return folder
