"""PyAV as a decoder: exact on whatever FFmpeg reads, and the quickest of the three."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from mgvideo.paths import local

from .videofile import Box, DecodeError, Video, check_file, errors_over, read_size


class PyAV:
    """FFmpeg's libraries as PyAV brings them: knows every codec, and skips what nobody wants or refers to."""

    def open(self, path: str, short_side: int | None = None) -> PyAVVideo:
        """See `Decoder.open`."""
        with errors_over(path):
            check_file(path, copy := local(path))
            return PyAVVideo(path, copy, short_side)


class PyAVVideo(Video):
    """A video open in PyAV: `local` is the file that is read, `path` what it is known by.

    `times`: when each frame is displayed, in ticks of the file's clock. `turns`: quarter turns counter-clockwise that
    set the stored picture upright. `plain`: seeking back finds the beginning, and no frame is stored after a keyframe
    that it is shown before.
    """

    def __init__(self, path: str, local: str, short_side: int | None) -> None:
        self.path, self.local = path, local
        self.frame: Any = None  # where the decoder stands
        self.wanted: set[int] | None = None  # times of frames to decode; None: all
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.container = av.open(local)
        try:
            self._examine(short_side)
        except BaseException:
            self.close()
            raise

    def _examine(self, short_side: int | None) -> None:
        self._choose_stream()
        times = [(_time(p), p.is_keyframe) for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        if None in (time for time, _ in times):
            raise DecodeError(self.path, "frames without times; put the stream into a container, such as mp4")
        self.keys = sorted(time for time, is_key in times if is_key)
        # what comes before the first keyframe cannot be decoded
        self.times = sorted(time for time, _ in times if self.keys and time >= self.keys[0])
        self.frames = len(self.times)
        if not self.frames:
            raise DecodeError(self.path, "no frames")
        self._seek(self.times[0])
        self.plain = self.frame is not None and self.frame.pts == self.times[0] and not _open_gops(times)
        if self.frame is None or self.frame.pts != self.times[0]:
            self._rewind()
        if self.frame is None:
            raise DecodeError(self.path, "no frame can be decoded")
        self.turns: int = round(self.frame.rotation / 90) % 4
        height, width = read_size(self.frame.height, self.frame.width, short_side)
        self.height, self.width = (width, height) if self.turns % 2 else (height, width)
        self.fps = float(self.stream.average_rate or 0)

    def _choose_stream(self) -> None:
        if not self.container.streams.video:
            raise DecodeError(self.path, "no video stream")
        self.stream: Any = self.container.streams.video[0]
        if self.stream.codec_context is None:
            raise DecodeError(self.path, "no decoder for its codec")
        self.stream.thread_type = "NONE"
        self.stream.codec_context.thread_count = 1

    def close(self) -> None:
        """Release file and frames: objects here refer to each other, so that only a garbage collection would."""
        self.decoded, self.frame = iter(()), None
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
        plane: Any = self.reformatter.reformat(
            frame, width, height, "rgb24", interpolation="BILINEAR", threads=1
        ).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return rows[:, : width * 3].reshape(height, width, 3)

    def _at(self, time: int) -> Any:
        """The frame displayed at `time`: from where the decoder stands, or from a keyframe where that is nearer."""
        key = self.keys[bisect_right(self.keys, time) - 1]
        if self.frame is None or not key <= self.frame.pts <= time:
            self._seek(key)
        self._walk(time)
        if self.frame is None or self.frame.pts != time:  # the file's index is off
            self._rewind()
            self._walk(time)
        if self.frame is None or self.frame.pts != time:
            raise DecodeError(self.path, f"frame {self.times.index(time)} of {self.frames} cannot be decoded")
        return self.frame

    def _walk(self, time: int) -> None:
        while self.frame is not None and self.frame.pts < time:
            self.frame = next(self.decoded, None)

    def _seek(self, time: int) -> None:
        self.container.seek(time, stream=self.stream)
        self.decoded = self._decode()
        self.frame = next(self.decoded, None)

    def _rewind(self) -> None:
        """To the first frame, whatever the format makes of seeking there."""
        self.container.close()
        self.container = av.open(self.local)
        self._choose_stream()
        self.decoded = self._decode()
        self.frame = next(self.decoded, None)

    def _decode(self) -> Iterator[Any]:
        context = self.stream.codec_context
        demuxing: Any = self.container.demux(self.stream)  # a generator, which loses memory where it is not closed
        with closing(demuxing) as packets:
            for packet in packets:
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


def _time(packet: Any) -> Any:
    """When a packet's frame is displayed; formats without such times store frames in the order of display."""
    return packet.dts if packet.pts is None else packet.pts
