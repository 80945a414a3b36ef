"""The decoders: PyAV, decord and torchcodec, one thread each.

All return the same upright frames for the same request; indices count frames in display order. decord and torchcodec
return wrong frames for some files, so PyAV reads every file but these: MP4, MOV, Matroska and WebM with one upright
video stream, all of whose packets are shown and whose keyframes depend on no earlier packet.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from mgvideo.errors import UserError

from .packet_index import PacketIndex
from .pyav import PyAV, PyAVVideo
from .videofile import Box, DecodeError, Decoder, Video

__all__ = ["Box", "DecodeError", "Decoder", "Decord", "PyAV", "TorchCodec", "Video"]


class _LibraryVideo(Video):
    """A video open in decord or torchcodec. PyAV reads the frames if that library fails."""

    def __init__(self, pyav_video: PyAVVideo, short_side: int | None) -> None:
        self.path, self.local, self.rate = pyav_video.path, pyav_video.local, pyav_video.rate
        self.frames, self.times = pyav_video.frames, pyav_video.times
        self.height, self.width, self.short_side = pyav_video.height, pyav_video.width, short_side
        self.reader = self._open_reader()

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        try:
            return box.crop(self._decode_frames(indices))
        except Exception:  # libraries raise many types; if PyAV also fails, its error gives the reason
            with PyAV().open(self.path, self.short_side) as video:
                return video.read(indices, box)

    @abstractmethod
    def _open_reader(self) -> Any:
        """Open the file and return the library's reader; `len()` of it is the number of frames."""

    @abstractmethod
    def _decode_frames(self, indices: np.ndarray) -> Tensor:
        """Decode whole frames, uint8 RGB `[n, height, width, 3]`."""


class _LibraryDecoder(ABC):
    """A decoder that uses PyAV for files that its library does not read correctly; attributes as of PyAV."""

    library: tuple[str, str]  # its module and its package

    def __init__(self) -> None:
        _require_library(*self.library)
        self.shrink = True
        self.indexes: Mapping[str, PacketIndex] = {}

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `Decoder.open`."""
        short_side = short_side if self.shrink else None
        pyav_video = PyAV(self.shrink, self.indexes).open(path, short_side)
        if not pyav_video.simple or not self._supports(pyav_video):
            return pyav_video
        try:
            video = self._open_video(pyav_video, short_side)
        except Exception:  # any error of the library: PyAV can read this file
            return pyav_video
        if len(video.reader) != pyav_video.frames:
            return pyav_video
        pyav_video.close()
        return video

    def _supports(self, pyav_video: PyAVVideo) -> bool:
        return True

    @abstractmethod
    def _open_video(self, pyav_video: PyAVVideo, short_side: int | None) -> _LibraryVideo: ...


class Decord(_LibraryDecoder):
    """Decodes with decord, and with PyAV where decord returns wrong frames."""

    library = ("decord", "decord")

    def _supports(self, pyav_video: PyAVVideo) -> bool:
        return pyav_video.width > 72  # decord fails to copy frames of six of the widths up to 72

    def _open_video(self, pyav_video: PyAVVideo, short_side: int | None) -> _LibraryVideo:
        return _DecordVideo(pyav_video, short_side)


class _DecordVideo(_LibraryVideo):
    def _open_reader(self) -> Any:
        import decord

        return decord.VideoReader(self.local, num_threads=1, height=self.height, width=self.width)

    def _decode_frames(self, indices: np.ndarray) -> Tensor:
        return from_dlpack(self.reader.get_batch(indices).to_dlpack())


class TorchCodec(_LibraryDecoder):
    """Decodes with torchcodec (requires FFmpeg's shared libraries), and with PyAV where that returns wrong frames."""

    library = ("torchcodec.decoders", "torchcodec")

    def __init__(self) -> None:
        super().__init__()
        from torchcodec.decoders import VideoDecoder

        try:
            VideoDecoder(b"no video")  # torchcodec 0.17 loads FFmpeg's libraries with the first video, not on import
        except (OSError, RuntimeError, ValueError) as error:
            if "libtorchcodec" in str(error):
                raise _missing_ffmpeg("torchcodec") from None

    def _open_video(self, pyav_video: PyAVVideo, short_side: int | None) -> _LibraryVideo:
        return _TorchCodecVideo(pyav_video, short_side)


class _TorchCodecVideo(_LibraryVideo):
    def _open_reader(self) -> Any:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize

        return VideoDecoder(
            self.local,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
            transforms=[Resize((self.height, self.width))] if min(self.height, self.width) == self.short_side else None,
        )

    def _decode_frames(self, indices: np.ndarray) -> Tensor:
        return self.reader.get_frames_at(indices.tolist()).data


def _require_library(module: str, package: str) -> None:
    """Import a decoder's library now, so that a missing library is one error and not an error for each video."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise UserError(f"decoder: {package} is not installed; pip install {package}, or choose decoder=pyav") from None
    except (OSError, RuntimeError):
        raise _missing_ffmpeg(package) from None


def _missing_ffmpeg(package: str) -> UserError:
    return UserError(
        f"decoder: {package} is installed but cannot load FFmpeg's shared libraries; install FFmpeg 4 to 8 "
        "(Debian: apt-get install ffmpeg; conda: conda install ffmpeg), or choose decoder=pyav"
    )
