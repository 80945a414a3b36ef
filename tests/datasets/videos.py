"""Real videos for the tests, each frame showing its own number."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 8


def numbered(number: int, height: int, width: int) -> np.ndarray:
    """A frame whose eight columns are dark or light as its number's bits, with a gradient from top to bottom."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    columns = np.array(bits)[np.arange(width) * BITS // width]
    rows = np.linspace(0, 60, height)[:, None]
    return np.stack([40 + 130 * columns + rows, 60 + 110 * columns + rows / 2, 60 + 90 * columns + rows], -1).astype(
        np.uint8
    )


def number_of(frame: Any) -> int:
    """The number that a frame `[h, w, 3]` shows, whatever it was resized to."""
    picture = np.asarray(frame).astype(float).mean((0, 2))
    middles = (np.arange(BITS) + 0.5) * len(picture) / BITS
    return int(sum(1 << bit for bit, x in enumerate(middles.astype(int)) if picture[x] > 120))


def write(
    path: Path,
    frames: int = 40,
    height: int = 60,
    width: int = 80,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Callable[[int], int] = lambda number: number,
    fps: int = 25,
) -> Path:
    """Write a video of numbered frames; `times` gives each frame's time of display in units of 1 / fps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(number, height, width), format="rgb24")
            frame.pts, frame.time_base = times(number), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
