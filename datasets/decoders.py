"""Reading chosen frames of a video file: decord, PyAV or torchcodec behind one interface, one thread each.

All three give the same frames for the same request: indices count frames in the order of display, seeks land on the
exact frame, and resizing is swscale's bilinear, done while decoding. An upright picture comes out whatever the file's
rotation says.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mgvideo.errors import UserError


class DecodeError(Exception):
    """A video that cannot be read: `path` and `reason`."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Video(ABC):
    """An open video, a context manager: `frames` frames, `fps` a second on average, read at `height` × `width`."""

    path: str
    frames: int
    fps: float
    height: int
    width: int

    def read(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Frames `indices` (any order, repeats allowed): uint8 RGB `[n, height, width, 3]`; raises DecodeError."""
        wanted, places = np.unique(np.asarray(indices), return_inverse=True)
        with errors_over(self.path):
            frames = self._read(wanted)
        if frames.shape != (len(wanted), self.height, self.width, 3):
            raise DecodeError(self.path, f"changes its size to {frames.shape[2]}×{frames.shape[1]} pixels")
        in_order = np.array_equal(places, np.arange(len(wanted)))
        return frames if in_order else frames[torch.from_numpy(places)]

    @abstractmethod
    def _read(self, indices: np.ndarray) -> Tensor:
        """As `read`; `indices` rise and do not repeat."""

    def close(self) -> None:  # noqa: B027
        """Release the file, where dropping the object would not do it at once."""

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Decoder(Protocol):
    """A video library. Holds no open file, so that it may travel to a worker process."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file to read it resized to this short side, or as it is; raises DecodeError."""


def resized(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Height and width with this short side and the same aspect, up to rounding."""
    if short_side is None:
        return height, width
    if height < width:
        return short_side, round(width * short_side / height)
    return round(height * short_side / width), short_side


@contextmanager
def errors_over(path: str) -> Iterator[None]:
    """Turn whatever a library raises over a file into a DecodeError."""
    try:
        yield
    except OSError as error:
        raise DecodeError(path, error.strerror or _first_line(error)) from None
    except (RuntimeError, ValueError, LookupError, AssertionError) as error:
        raise DecodeError(path, _first_line(error)) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_file(path: str) -> None:
    """Raise DecodeError where there is no file to decode: libraries say less, and some hang on a pipe."""
    with errors_over(path):
        os.stat(path)
        if not os.path.isfile(path):
            raise DecodeError(path, "not a file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise DecodeError(path, "empty file")


class PyAV:
    """FFmpeg's libraries as PyAV brings them: knows every codec."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file to read it resized to this short side, or as it is; raises DecodeError."""
        check_file(path)
        with errors_over(path):
            return _PyAVVideo(path, short_side)


class _PyAVVideo(Video):
    def __init__(self, path: str, short_side: int | None) -> None:
        self.path = path
        self.container = av.open(path)
        if not self.container.streams.video:
            raise DecodeError(path, "no video stream")
        self.stream: Any = self.container.streams.video[0]
        self.stream.thread_type = "NONE"
        self.stream.codec_context.thread_count = 1
        times = [(_time(p), p.is_keyframe) for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        self.keys = sorted(time for time, is_key in times if is_key)
        # of each frame, in the order of display; what comes before the first keyframe cannot be decoded
        self.times = sorted(time for time, _ in times if self.keys and time >= self.keys[0])
        self.open_gops = _open_gops(times)
        self.frames = len(self.times)
        if not self.frames:
            raise DecodeError(path, "no frames")
        self.container.seek(self.times[0], stream=self.stream)
        first = next(self.container.decode(self.stream), None)
        if first is None:
            raise DecodeError(path, "no frame can be decoded")
        self.turns = round(first.rotation / 90) % 4  # quarter turns counter-clockwise that set it upright
        height, width = (first.width, first.height) if self.turns % 2 else (first.height, first.width)
        self.height, self.width = resized(height, width, short_side)
        self.fps = float(self.stream.average_rate or 0)
        self.reformatter = av.video.reformatter.VideoReformatter()

    def _read(self, indices: np.ndarray) -> Tensor:
        height, width = (self.width, self.height) if self.turns % 2 else (self.height, self.width)
        out = np.empty((len(indices), height, width, 3), np.uint8)
        for place, frame in enumerate(self._decode([self.times[i] for i in indices])):
            picture: Any = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR").planes[0]
            rows = np.frombuffer(picture, np.uint8).reshape(height, picture.line_size)
            out[place] = rows[:, : width * 3].reshape(height, width, 3)
        return torch.from_numpy(np.ascontiguousarray(np.rot90(out, self.turns, axes=(1, 2))))

    def close(self) -> None:
        """Release the file: PyAV's objects refer to each other, so that only a garbage collection would."""
        self.container.close()

    def _decode(self, times: list[int]) -> Iterator[Any]:
        """The frames at these rising times, seeking where a keyframe saves decoding."""
        frames: Iterator[Any] = iter(())
        now = None
        for time in times:
            key = self.keys[bisect_right(self.keys, time) - 1]
            if now is None or now < key:
                frames = self._from(key)
            frame = next((f for f in frames if f.pts >= time), None)
            if frame is None or frame.pts != time:  # the file's index may be off: try from its beginning
                frames = self._from(self.times[0])
                frame = next((f for f in frames if f.pts >= time), None)
            if frame is None or frame.pts != time:
                raise DecodeError(self.path, f"frame {self.times.index(time)} of {self.frames} cannot be decoded")
            now = time
            yield frame

    def _from(self, time: int) -> Iterator[Any]:
        self.container.seek(time, stream=self.stream)
        return self.container.decode(self.stream)


def _open_gops(times: list[tuple[int, bool]]) -> bool:
    """Whether a frame is displayed before the keyframe that it is stored after, given times as they are stored."""
    key = times[0][0] if times else 0
    for time, is_key in times:
        key = time if is_key else key
        if time < key:
            return True
    return False


def _time(packet: Any) -> int:
    """When a packet's frame is displayed; formats without such times store frames in the order of display."""
    return packet.dts if packet.pts is None else packet.pts


class Decord:
    """decord, where it is exact: what it would misplace (open GOPs, rotated videos) PyAV reads instead."""

    def __init__(self) -> None:
        _import("decord", "decord")

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file to read it resized to this short side, or as it is; raises DecodeError."""
        reference = PyAV().open(path, short_side)  # decord fixes the size at opening, so that it must be known before
        assert isinstance(reference, _PyAVVideo)
        if reference.turns or reference.open_gops:
            return reference
        with reference, errors_over(path):
            return _DecordVideo(reference)


class _DecordVideo(Video):
    def __init__(self, like: Video) -> None:
        import decord

        self.path, self.height, self.width, self.fps = like.path, like.height, like.width, like.fps
        self.reader = decord.VideoReader(self.path, num_threads=1, height=self.height, width=self.width)
        self.frames = len(self.reader)

    def _read(self, indices: np.ndarray) -> Tensor:
        import decord

        try:
            return from_dlpack(self.reader.get_batch(indices).to_dlpack())
        except decord.DECORDError as error:  # after the time and the line of decord's own source
            raise DecodeError(self.path, re.sub(r"^\[[\d:]+\] \S+ ", "", _first_line(error))) from None


class TorchCodec:
    """torchcodec, which needs FFmpeg's shared libraries on the machine."""

    def __init__(self) -> None:
        _import("torchcodec.decoders", "torchcodec")

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open a file to read it resized to this short side, or as it is; raises DecodeError."""
        with errors_over(path):
            return _TorchCodecVideo(path, short_side)


class _TorchCodecVideo(Video):
    def __init__(self, path: str, short_side: int | None) -> None:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        self.path = path
        with PyAV().open(path, short_side) as like:  # the size is fixed at opening, so that it must be known before
            self.height, self.width, self.fps = like.height, like.width, like.fps
        self.decoder = VideoDecoder(
            path,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
            transforms=None if short_side is None else [Resize((self.height, self.width))],
        )
        self.frames = len(self.decoder)

    def _read(self, indices: np.ndarray) -> Tensor:
        return self.decoder.get_frames_at(indices.tolist()).data


def _import(module: str, package: str) -> None:
    """Import a decoder's library now, so that its absence is one clear line and not a thousand bad videos."""
    import importlib

    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"decoder: {package} is not installed; pip install {package}, or choose decoder=pyav") from None
    except (OSError, RuntimeError):
        raise UserError(
            f"decoder: {package} is installed but cannot load FFmpeg's shared libraries; install FFmpeg 4 to 8 "
            "(Debian: apt-get install ffmpeg; conda: conda install ffmpeg), or choose decoder=pyav"
        ) from None
