"""An open video file: what every decoder offers, and how it says what is wrong with a file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


class DecodeError(Exception):
    """A video that cannot be read: `path` and `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        # a name that is not UTF-8 must not end the run that writes it down
        path, reason = (os.fsencode(text).decode("utf-8", "backslashreplace") for text in (path, reason))
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Box(NamedTuple):
    """A part of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frames: Any) -> Any:
        """This part of frames `[..., h, w, 3]`: a view."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width, :]


class Video(ABC):
    """An open video, a context manager: `frames` frames, read at `height` × `width`.

    `times`: seconds at which each frame appears, and at which the last one disappears, on a player's clock: float64
    `[frames + 1]`, never falling.
    """

    path: str
    frames: int
    height: int
    width: int
    times: np.ndarray

    def read(self, indices: Sequence[int] | np.ndarray, box: Box | None = None) -> Tensor:
        """Frames `indices` (any order, repeats allowed), or a box of them: uint8 RGB `[n, height, width, 3]`.

        Raises DecodeError.
        """
        box = box or Box(0, 0, self.height, self.width)
        wanted, places = np.asarray(indices), None
        if (wanted[1:] <= wanted[:-1]).any():
            wanted, places = np.unique(wanted, return_inverse=True)
        with errors_over(self.path):
            frames = self._read(wanted, box)
        if frames.shape != (len(wanted), box.height, box.width, 3):
            raise DecodeError(self.path, "changes its size on the way")
        return frames if places is None else frames[torch.from_numpy(places)]

    @abstractmethod
    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        """As `read`; `indices` rise and do not repeat."""

    def close(self) -> None:  # noqa: B027
        """Release the file, where dropping the object would not do it at once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Decoder(Protocol):
    """A video library. Holds no open file, so that it may travel to a worker process."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file; raises DecodeError.

        Frames of three times `short_side` or more are shrunk to it while decoding. Below that, cropping whole frames
        and resizing what is left costs less: on one core, 32 frames of 340 × 256 for a crop of 224, 3.5 ms instead of
        9 (decord) or 15 (PyAV).
        """


def read_size(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width to read frames at, see `Decoder.open`."""
    if short_side is None or min(height, width) < 3 * short_side:
        return height, width
    if height < width:
        return short_side, round(width * short_side / height)
    return round(height * short_side / width), short_side


@contextmanager
def errors_over(path: str) -> Iterator[None]:
    """Turn whatever a library raises over a file into a DecodeError; damaged ones meet with all kinds of errors."""
    try:
        yield
    except (DecodeError, UserError):
        raise
    except Exception as error:
        # FFmpeg's errors, of several kinds, have the words alone there, without path and number
        raise DecodeError(path, getattr(error, "strerror", None) or _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_file(path: str, local: str | None = None) -> None:
    """Raise DecodeError where there is no file to decode: libraries say less, and some hang on a pipe.

    `local` is the copy to look at where the path is a URL.
    """
    local = local or path
    with errors_over(path):
        os.stat(local)
        if not os.path.isfile(local):
            raise DecodeError(path, "not a file")
        with open(local, "rb") as file:
            if not file.read(1):
                raise DecodeError(path, "empty file")
