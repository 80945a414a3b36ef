"""The interface of decoders and open videos, and the error that they raise."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError
from mgvideo.storage.members import parse_member

if TYPE_CHECKING:
    from typing_extensions import Self


TIME_ROUNDING_S = 0.0015  # containers and annotations round times by less


class DecodeError(Exception):
    """Raised when a video cannot be read; `path` names it and `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        # Escape names that are not UTF-8, so that they can be written to logs.
        path, reason = (os.fsencode(text).decode("utf-8", "backslashreplace") for text in (path, reason))
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Box(NamedTuple):
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, frames: Any) -> Any:
        """Return a view of this rectangle of frames `[..., h, w, 3]`."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width, :]


class Video(ABC):
    """An open video and a context manager.

    Attributes:
        path: The file or URL that errors name.
        frames: Number of frames.
        height, width: Size at which frames are read, in pixels.
        times: Seconds at which a player shows each frame, then the end of the last frame: float64 `[frames + 1]`,
            non-decreasing.
        is_folder: Whether the frames are images of a folder, whose times are assumed.
    """

    path: str
    frames: int
    height: int
    width: int
    times: np.ndarray
    lock: IO[bytes] | None = None  # of the local copy of a remote file
    is_folder = False

    @cached_property
    def rate(self) -> float | None:
        """Frames per second if the frames are evenly spaced, else None; see `frame_rate`."""
        return frame_rate(self.times)

    def read(self, indices: Sequence[int] | np.ndarray, box: Box | None = None) -> Tensor:
        """Read frames `indices` (any order, repeats allowed), or a box of them: uint8 RGB `[n, height, width, 3]`.

        Raises:
            DecodeError: The frames cannot be decoded.
        """
        box = box or Box(0, 0, self.height, self.width)
        rising, positions = np.asarray(indices), None
        if (rising[1:] <= rising[:-1]).any():
            rising, positions = np.unique(rising, return_inverse=True)
        with raise_decode_errors(self.path):
            frames = self._read(rising, box)
        if frames.shape != (len(rising), box.height, box.width, 3):
            raise DecodeError(self.path, "the frame size changes within the video")
        return frames if positions is None else frames[torch.from_numpy(positions)]

    @abstractmethod
    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        """Implement `read` for strictly increasing `indices`."""

    def close(self) -> None:  # noqa: B027
        """Release the file. Videos that hold no resources need not override this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def frame_rate(times: np.ndarray) -> float | None:
    """Return the frames per second of `times` (see `Video.times`), or None if the frames are not evenly spaced.

    A rate that the times fit to their rounding is exact: a whole number, or one times 1000 / 1001. Other rates are the
    mean rate if no frame is further than half a frame from its place.
    """
    frames, duration = len(times) - 1, float(times[-1] - times[0])
    if duration <= 0:
        return None
    mean, numbers, offsets = frames / duration, np.arange(frames), times[:-1] - times[0]
    exact = (max(1, round(mean)), max(1, round(mean * 1.001)) / 1.001)
    for rate in sorted(exact, key=lambda rate: abs(rate - mean)):
        if abs(rate / mean - 1) < 0.01 and np.abs(offsets - numbers / rate).max() <= TIME_ROUNDING_S:
            return float(rate)
    return mean if np.abs(offsets * mean - numbers).max() <= 0.5 else None


class Decoder(Protocol):
    """Opens videos. Holds no open file, so it can be pickled and sent to a worker process."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file.

        Frames whose short side is at least 3 × `short_side` are shrunk to `short_side` while decoding, with
        antialiasing, unless the decoder has an attribute `shrink` that is False. Smaller frames
        keep their size, because cropping before resizing is faster: on one core, 32 frames of 340 × 256 for a crop of
        224 take 3.5 ms instead of 9 (decord) or 15 (PyAV).

        Raises:
            DecodeError: The file cannot be opened as a video.
        """


def read_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Return the height and width at which frames are read, see `Decoder.open`."""
    if short_side is None or min(height, width) < 3 * short_side:
        return height, width
    if height < width:
        return short_side, round(width * short_side / height)
    return round(height * short_side / width), short_side


@contextmanager
def raise_decode_errors(path: str) -> Iterator[None]:
    """Convert exceptions other than UserError to DecodeError: libraries raise many types for damaged files."""
    try:
        yield
    except (DecodeError, UserError):
        raise
    except Exception as error:
        # strerror of FFmpeg's errors holds the message without path and error number.
        raise DecodeError(path, getattr(error, "strerror", None) or _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_file(path: str, local: str | None = None) -> None:
    """Raise DecodeError if `path` is missing, empty or not a regular file.

    The messages of video libraries say less, and some libraries hang on a pipe. For a URL, `local` is the local copy.
    """
    local = local or path
    with raise_decode_errors(path):
        member = parse_member(path)
        if member is not None and local.startswith("subfile,"):
            size = os.stat(member.archive).st_size
            if member.offset + member.size > size:
                raise DecodeError(path, f"the archive ends at byte {size}, within this file")
            if member.size == 0:
                raise DecodeError(path, "empty file")
            return
        os.stat(local)
        if not os.path.isfile(local):
            raise DecodeError(path, "not a file")
        with open(local, "rb") as file:
            if not file.read(1):
                raise DecodeError(path, "empty file")
