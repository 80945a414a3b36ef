"""Reading chosen frames of a video file: decord, PyAV or torchcodec behind one interface, one thread each.

All three give the same frames for the same request: indices count frames in the order of display, seeks land on the
exact frame, and an upright picture comes out whatever the file's rotation says.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

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
    """An open video, a context manager: `frames` frames, `fps` a second on average, read at `height` × `width`."""

    path: str
    frames: int
    fps: float
    height: int
    width: int

    def read(self, indices: Sequence[int] | np.ndarray, box: Box | None = None) -> Tensor:
        """Frames `indices` (any order, repeats allowed), or a box of them: uint8 RGB `[n, height, width, 3]`.

        Raises DecodeError.
        """
        box = box or Box(0, 0, self.height, self.width)
        wanted, places = np.unique(np.asarray(indices), return_inverse=True)
        with errors_over(self.path):
            frames = self._read(wanted, box)
        if frames.shape != (len(wanted), box.height, box.width, 3):
            raise DecodeError(self.path, "changes its size on the way")
        in_order = np.array_equal(places, np.arange(len(wanted)))
        return frames if in_order else frames[torch.from_numpy(places)]

    @abstractmethod
    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
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
    """FFmpeg's libraries as PyAV brings them: knows every codec, and skips what nobody wants or refers to."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `Decoder.open`."""
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
        self.frame: Any = None  # where the decoder stands
        self.wanted: set[int] | None = None  # times of frames to decode; None: all
        self.reformatter = av.video.reformatter.VideoReformatter()
        self._seek(self.times[0])
        if self.frame is None:
            raise DecodeError(path, "no frame can be decoded")
        self.turns: int = round(self.frame.rotation / 90) % 4  # quarter turns counter-clockwise that set it upright
        height, width = read_size(self.frame.height, self.frame.width, short_side)
        self.height, self.width = (width, height) if self.turns % 2 else (height, width)
        self.fps = float(self.stream.average_rate or 0)

    def close(self) -> None:
        """Release the file: PyAV's objects refer to each other, so that only a garbage collection would."""
        self.container.close()

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        out = np.empty((len(indices), box.height, box.width, 3), np.uint8)
        self.wanted = {self.times[i] for i in indices}
        for place, index in enumerate(indices):
            picture = self._picture(self._at(self.times[index]))
            out[place] = box.of(np.rot90(picture, self.turns))
        self.frame = None  # the decoder has skipped frames ahead that another reading may want
        return torch.from_numpy(out)

    def _picture(self, frame: Any) -> np.ndarray:
        """A frame as stored, in RGB `[h, w, 3]`."""
        height, width = (self.width, self.height) if self.turns % 2 else (self.height, self.width)
        plane: Any = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR").planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return rows[:, : width * 3].reshape(height, width, 3)

    def _at(self, time: int) -> Any:
        """The frame displayed at `time`: from where the decoder stands, or from a keyframe where that is nearer."""
        key = self.keys[bisect_right(self.keys, time) - 1]
        # a file's index may be off: the second try is from its beginning
        for start in (key, self.times[0]):
            if self.frame is None or not key <= self.frame.pts <= time:
                self._seek(start)
            while self.frame is not None and self.frame.pts < time:
                self.frame = next(self.decoded, None)
            if self.frame is not None and self.frame.pts == time:
                return self.frame
            self.frame = None
        raise DecodeError(self.path, f"frame {self.times.index(time)} of {self.frames} cannot be decoded")

    def _seek(self, time: int) -> None:
        self.container.seek(time, stream=self.stream)
        self.decoded = self._decode()
        self.frame = next(self.decoded, None)

    def _decode(self) -> Iterator[Any]:
        context = self.stream.codec_context
        for packet in self.container.demux(self.stream):
            skipped = self.wanted is not None and packet.pts is not None and packet.pts not in self.wanted
            context.skip_frame = "NONREF" if skipped else "DEFAULT"
            yield from context.decode(packet)


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
    """decord, where it is right: open GOPs, whose frames it misplaces, and what it fails on PyAV reads instead."""

    def __init__(self) -> None:
        _import("decord", "decord")

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `Decoder.open`."""
        like = PyAV().open(path, short_side)
        assert isinstance(like, _PyAVVideo)
        if like.open_gops or like.turns or like.width <= 72:  # of the widths up to 72 it fails to copy six
            return like
        with like, errors_over(path):
            return _DecordVideo(like)


class _DecordVideo(Video):
    def __init__(self, like: Video) -> None:
        import decord

        self.path, self.height, self.width, self.fps = like.path, like.height, like.width, like.fps
        self.reader = decord.VideoReader(self.path, num_threads=1, height=self.height, width=self.width)
        self.frames = len(self.reader)

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        import decord

        try:
            return box.of(from_dlpack(self.reader.get_batch(indices).to_dlpack()))
        except decord.DECORDError as error:  # after the time and the line of decord's own source
            raise DecodeError(self.path, re.sub(r"^\[[\d:]+\] \S+ ", "", _first_line(error))) from None


class TorchCodec:
    """torchcodec, which needs FFmpeg's shared libraries on the machine."""

    def __init__(self) -> None:
        _import("torchcodec.decoders", "torchcodec")

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `Decoder.open`."""
        check_file(path)
        try:
            with errors_over(path):
                return _TorchCodecVideo(path, short_side)
        except DecodeError:
            PyAV().open(path).close()  # says why in fewer words, unless it can read the file
            raise


class _TorchCodecVideo(Video):
    def __init__(self, path: str, short_side: int | None) -> None:
        from torchcodec.transforms import Resize

        self.path = path
        self.decoder = self._open()
        found = self.decoder.metadata
        self.frames, self.fps = len(self.decoder), found.average_fps or 0.0
        self.height, self.width = read_size(found.height, found.width, short_side)
        if (self.height, self.width) != (found.height, found.width):
            self.decoder = self._open(transforms=[Resize((self.height, self.width))])

    def _open(self, **options: Any) -> Any:
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(self.path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", **options)

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        return box.of(self.decoder.get_frames_at(indices.tolist()).data)


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
