"""Motion: a synthetic dataset of mp4 files with eight classes that differ only in motion.

A textured blob on a textured background moves left, right, up or down, turns clockwise or counter-clockwise, grows or
shrinks. In every frame and every class, its position is uniform over the frame (which wraps around), its angle uniform
over the circle and its size uniform over a range (which wraps around, too). So a single frame has no information about
the class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgvideo.errors import UserError

from .decoders import Decoder
from .generated import DrawnVideo, VideoKnobs, make_dataset
from .lists import video_list
from .parallel import FileProgress, ignore_progress
from .video import VideoDataset

CLASSES = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "turns clockwise",
    "turns counter-clockwise",
    "grows",
    "shrinks",
)
VELOCITIES = {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}
TURNS = {4: 1, 5: -1}
GROWTHS = {6: 1, 7: -1}

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Knobs(VideoKnobs):
    """Settings of a Motion dataset, which determine its difficulty. Lengths are fractions of the frame's height."""

    shapes: int = 1  # blobs in a video, each of a different class; more than one makes the task multi-label
    sizes: tuple[float, float] = (0.26, 0.5)  # range of the distance from the centre of a blob to its farthest point
    speeds: tuple[float, float] = (0.0095, 0.019)  # range of the speed of a moving blob, per frame
    turning: float = 1.5  # speed of a turning blob's rim, relative to `speeds`
    growth: float = 0.2  # speed of a growing blob's rim, relative to `speeds`
    contrast: tuple[float, float] = (0.2, 0.4)  # range of the difference in brightness between blob and background
    texture: tuple[float, float] = (0.03, 0.1)  # strength of the background's and of the blob's texture
    colour: float = 0.1  # strength of tints

    def __post_init__(self) -> None:
        low, high = self.sizes
        if not 0 < low < high <= 0.5:
            raise UserError(f"Motion: sizes must rise, above 0 and up to 0.5 of the height, not {tuple(self.sizes)}")
        if self.height % 2 or self.width % 2 or self.width < self.height:
            raise UserError(
                f"Motion: width and height must be even and width at least height, not {self.width}×{self.height}"
            )
        if not 1 <= self.shapes <= len(CLASSES):
            raise UserError(f"Motion: shapes must be 1 to {len(CLASSES)}, not {self.shapes}")
        if min(self.train, self.val, self.frames) < 1:
            raise UserError("Motion: train, val and frames must be at least 1")


def make_motion(
    root: str, knobs: Knobs, processes: int | None = None, progress: FileProgress = ignore_progress
) -> Path:
    """Create the dataset under `root` unless it exists; returns its folder, see `make_dataset`."""
    return make_dataset(root, knobs, CLASSES, draw_video, processes, progress)


def motion(root: str, knobs: Knobs, split: str, decoder: Decoder | None = None) -> VideoDataset:
    """Return the `train` or `val` videos; creates the files if needed. No flips, because a flip changes the class."""
    return video_list(
        str(make_motion(root, knobs)), f"{split}.csv", multi_label=knobs.shapes > 1, decoder=decoder, flip=False
    )


def draw_video(knobs: Knobs, split: str, index: int) -> DrawnVideo:
    """Draw a video of the dataset: a pure function of its arguments."""
    rng = np.random.default_rng((knobs.seed, split == "val", index))
    others = [c for c in rng.permutation(len(CLASSES)).tolist() if c != index % len(CLASSES)]
    labels = [index % len(CLASSES), *others[: knobs.shapes - 1]]
    return DrawnVideo(labels, draw_frames(labels, knobs, rng))


def draw_frames(labels: list[int], knobs: Knobs, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of one video, uint8 RGB `[h, w, 3]`, with a blob for each label; later blobs are in front."""
    h, w = knobs.height, knobs.width
    y, x = np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32)
    grey = rng.uniform(0.4, 0.6)
    tint = knobs.colour * rng.uniform(-0.5, 0.5, 3)
    background = grey + tint + knobs.texture[0] * _texture(x / h, y[:, None] / h, rng)
    blobs = [(_sprite(grey, knobs, rng), _trajectory(label, knobs, rng)) for label in labels]
    for t in range(knobs.frames):
        frame = background.copy()
        for sprite, path in blobs:
            _paint(frame, sprite, *path[t])
        yield (255 * frame.clip(0, 1) + 0.5).astype(np.uint8)


def _paint(frame: Array, sprite: Array, cx: float, cy: float, angle: float, size: float) -> None:
    """Paint a sprite RGBA `[n, n, 4]` on a frame `[h, w, 3]` that wraps around.

    `cx`, `cy`: centre as fractions of width and height. `angle` in radians. `size`: distance from the centre to the
    edge of the sprite as a fraction of the height.
    """
    h, w, _ = frame.shape
    dx, dy = (np.arange(w) - cx * w + w / 2) % w - w / 2, (np.arange(h) - cy * h + h / 2) % h - h / 2
    columns, rows = np.flatnonzero(abs(dx) < size * h), np.flatnonzero(abs(dy) < size * h)
    dx, dy = dx[columns], dy[rows][:, None]
    middle = (len(sprite) - 1) / 2
    cos, sin = middle / (size * h) * np.cos(angle), middle / (size * h) * np.sin(angle)
    # The edge of the sprite is transparent, so coordinates beyond it can be clamped.
    u, v = (
        (offset + middle + 0.5).clip(0, len(sprite) - 1).astype(np.intp)
        for offset in (cos * dx + sin * dy, cos * dy - sin * dx)
    )
    rgba, block = sprite[v, u], np.ix_(rows, columns)
    frame[block] += rgba[..., 3:] * (rgba[..., :3] - frame[block])


def _trajectory(label: int, knobs: Knobs, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return centre x and y (fractions of width and height), angle (radians) and size at each frame: `[frames, 4]`."""
    low, high = knobs.sizes
    x, y, turn, size_fraction = rng.uniform(0, 1, 4)  # size_fraction: position of the size in its range
    steps = rng.uniform(*knobs.speeds) * np.arange(knobs.frames)
    dx, dy = VELOCITIES.get(label, (0, 0))
    rim = low + size_fraction * (high - low)
    angle = 2 * np.pi * turn + TURNS.get(label, 0) * knobs.turning * steps / rim
    size = low + (size_fraction * (high - low) + GROWTHS.get(label, 0) * knobs.growth * steps) % (high - low)
    x, y = x + dx * steps * knobs.height / knobs.width, y + dy * steps
    return np.stack([x + 0 * steps, y + 0 * steps, angle, size], axis=1)


def _sprite(grey: float, knobs: Knobs, rng: np.random.Generator) -> Array:
    """Draw a random blob, float32 RGBA `[n, n, 4]`: a circle with a wavy radius, filled with a texture."""
    n = 2 * knobs.height
    v, u = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j].astype(np.float32)
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    waves = np.arange(2, 6)[:, None, None]
    strength, phase = rng.uniform(0.3, 1, waves.shape) / waves, rng.uniform(0, 2 * np.pi, waves.shape)
    rim = 1 + (strength * np.cos(waves * angle + phase)).sum(0)
    rim *= 0.9 / rim.max()
    brightness = grey + rng.choice([-1, 1]) * rng.uniform(*knobs.contrast)
    tint = knobs.colour * rng.uniform(-0.5, 0.5, 3)
    sprite = np.empty((n, n, 4), np.float32)
    sprite[..., :3] = brightness + tint + knobs.texture[1] * _texture(u, v, rng)
    sprite[..., 3] = ((rim - radius) * 16).clip(0, 1)
    return sprite


def _texture(x: Array, y: Array, rng: np.random.Generator, waves: int = 6) -> Array:
    """Return smooth colour noise around 0, float32 `[h, w, 3]`: a sum of plane waves, mainly in brightness."""
    angle, length = rng.uniform(0, 2 * np.pi, waves), rng.uniform(0.5, 2, waves)
    phase, colour = rng.uniform(0, 2 * np.pi, waves), 0.7 + 0.3 * rng.uniform(-1, 1, (waves, 3))
    along = x[..., None] * np.cos(angle) + y[..., None] * np.sin(angle)
    return (np.cos(2 * np.pi * along / length + phase) @ colour / np.sqrt(waves / 2)).astype(np.float32)
