"""The decoders: PyAV, and decord or torchcodec where they are right, one thread each.

All give the same frames for the same request: indices count frames in the order of display, and pictures are upright.
decord and torchcodec read MP4, MOV, Matroska and WebM files with one video stream whose packets are all shown, upright,
and whose keyframes need nothing stored before them. Of other files they misplace frames, so PyAV reads those.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mgvideo.errors import UserError

from .pyav import PyAV, PyAVVideo
from .videofile import Box, DecodeError, Decoder, Video

__all__ = ["Box", "DecodeError", "Decoder", "Decord", "PyAV", "TorchCodec", "Video"]


class _Other(Video):
    """A video open in another library than PyAV, which stands in where that library fails."""

    def __init__(self, like: PyAVVideo, short_side: int | None) -> None:
        self.path, self.local, self.frames, self.times = like.path, like.local, like.frames, like.times
        self.height, self.width, self.short_side = like.height, like.width, short_side
        self.file = self._open()

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        try:
            return box.of(self._frames(indices))
        except Exception:  # decord's own class, torchcodec's many; PyAV names the reason if it fails as well
            with PyAV().open(self.path, self.short_side) as video:
                return video.read(indices, box)

    @abstractmethod
    def _open(self) -> Any:
        """The library's own object, whose length is the number of frames."""

    @abstractmethod
    def _frames(self, indices: np.ndarray) -> Tensor:
        """Whole frames."""


class _Library(ABC):
    """A decoder that leaves to PyAV what it cannot read rightly."""

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `Decoder.open`."""
        like = PyAV().open(path, short_side)
        if not like.plain or not self._suits(like):
            return like
        try:
            video = self._video(like, short_side)
        except Exception:  # whatever it raises over a file that PyAV can read
            return like
        if len(video.file) != like.frames:
            return like
        like.close()
        return video

    def _suits(self, like: PyAVVideo) -> bool:
        return True

    @abstractmethod
    def _video(self, like: PyAVVideo, short_side: int | None) -> _Other: ...


class Decord(_Library):
    """decord."""

    def __init__(self) -> None:
        _import("decord", "decord")

    def _suits(self, like: PyAVVideo) -> bool:
        return like.width > 72  # of the widths up to 72 it fails to copy six

    def _video(self, like: PyAVVideo, short_side: int | None) -> _Other:
        return _DecordVideo(like, short_side)


class _DecordVideo(_Other):
    def _open(self) -> Any:
        import decord

        return decord.VideoReader(self.local, num_threads=1, height=self.height, width=self.width)

    def _frames(self, indices: np.ndarray) -> Tensor:
        return from_dlpack(self.file.get_batch(indices).to_dlpack())


class TorchCodec(_Library):
    """torchcodec, which needs FFmpeg's shared libraries on the machine."""

    def __init__(self) -> None:
        _import("torchcodec.decoders", "torchcodec")

    def _video(self, like: PyAVVideo, short_side: int | None) -> _Other:
        return _TorchCodecVideo(like, short_side)


class _TorchCodecVideo(_Other):
    def _open(self) -> Any:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        return VideoDecoder(
            self.local,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
            transforms=[Resize((self.height, self.width))] if min(self.height, self.width) == self.short_side else None,
        )

    def _frames(self, indices: np.ndarray) -> Tensor:
        return self.file.get_frames_at(indices.tolist()).data


def _import(module: str, package: str) -> None:
    """Import a decoder's library now, so that its absence is one clear line and not a thousand bad videos."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"decoder: {package} is not installed; pip install {package}, or choose decoder=pyav") from None
    except (OSError, RuntimeError):
        raise UserError(
            f"decoder: {package} is installed but cannot load FFmpeg's shared libraries; install FFmpeg 4 to 8 "
            "(Debian: apt-get install ffmpeg; conda: conda install ffmpeg), or choose decoder=pyav"
        ) from None
