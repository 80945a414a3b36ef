"""PyAV as a decoder: exact on whatever FFmpeg reads, and the fastest of the three."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from functools import cached_property
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from mgvideo.storage.paths import local_copy

from .frame_table import (
    FrameTable,
    Start,
    decode,
    frame_ticks,
    open_stream,
    read_table,
    stored_packets,
)
from .orientation import Orientation, orientation
from .videofile import Box, DecodeError, Video, check_file, errors_over, read_size

# formats that the other decoders seek in rightly, under the names that FFmpeg gives them
PLAIN_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


class PyAV:
    """FFmpeg's libraries as PyAV brings them: reads every codec, and skips frames that no other frame refers to."""

    def open(self, path: str, short_side: int | None = None) -> PyAVVideo:
        """See `Decoder.open`."""
        with errors_over(path):
            check_file(path, copy := local_copy(path))
            return PyAVVideo(path, copy, short_side)


class PyAVVideo(Video):
    """A video open in PyAV: `local` is the file that is read, `path` what errors call it.

    `table` lists the frames, `orientation` says how pictures are shown. `plain`: the other decoders read the file, too.
    """

    def __init__(self, path: str, local: str, short_side: int | None) -> None:
        self.path, self.local = path, local
        self.frame: Any = None  # where the decoder stands
        self.place = 0  # its place, see FrameTable
        self.wanted: set[int] | None = None  # times of frames to decode; None: all
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.container, self.stream = open_stream(path, local)
        self.index = int(self.stream.index)  # of a closed container it cannot be read
        try:
            self._examine(short_side)
        except BaseException:
            self.close()
            raise

    def _examine(self, short_side: int | None) -> None:
        self.table: FrameTable = read_table(self.path, self.local, self.container, self.stream)
        self._go_to(self.table.starts[0] if self.table.starts else None)
        # whether seeking back finds the beginning
        self.seeks = self.frame is not None and self.place == self.table.places[0]
        if not self.seeks:
            self._rewind()
        if self.frame is None:
            raise DecodeError(self.path, "no frame can be decoded")
        self.table = self.table.from_place(self.place)
        self.frames = len(self.table.ticks)
        self.orientation: Orientation = orientation(self.frame)
        self.interlaced = bool(self.frame.interlaced_frame)
        height, width = read_size(self.frame.height, self.frame.width, short_side)
        self.height, self.width = self.orientation.size(height, width)
        simple = self.table.simple and self.seeks and self.orientation.upright
        alone = len(self.container.streams.video) == 1
        self.plain = simple and alone and self.container.format.name in PLAIN_FORMATS

    @cached_property
    def times(self) -> np.ndarray:  # type: ignore[override]
        """See `Video.times`."""
        ticks, base = self.table.ticks, self.stream.time_base
        gap = int(np.partition(np.diff(ticks), self.frames // 2 - 1)[self.frames // 2 - 1]) if self.frames > 1 else 0
        end = int(ticks[-1]) + (gap or frame_ticks(self.stream))
        seconds = (np.append(ticks, end) - ticks[0]) * base.numerator / base.denominator
        first = int(ticks[0]) * base.numerator / base.denominator
        start = first if self.container.start_time is None else self.container.start_time / av.time_base
        if start > first - 1 / av.time_base:
            return seconds
        # sound begins earlier than pictures; what it has before 0 is for decoders, and is not heard
        return seconds + (first - max(start, min(first, 0.0)))

    def close(self) -> None:
        """Release file and frames: objects here refer to each other, so that only a garbage collection would."""
        self.decoded, self.frame = iter(()), None
        self.container.close()

    def rising_ticks(self) -> list[int]:
        """`table.ticks` from 0, for a file that must not hold two frames of one time, nor any before 0."""
        order = np.arange(self.frames)
        ticks = np.maximum.accumulate(self.table.ticks - order) + order
        rising: list[int] = (ticks - ticks[0]).tolist()
        return rising

    def walk(self) -> Iterator[Any]:
        """All frames in order, as PyAV's objects. Raises DecodeError."""
        with errors_over(self.path):
            self.wanted = None
            self._rewind()
            for index in range(self.frames):
                yield self._at(index)

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        out = np.empty((len(indices), box.height, box.width, 3), np.uint8)
        if self.table.by_time:
            self.wanted = {int(self.table.places[i]) for i in indices}
        for number, index in enumerate(indices.tolist()):
            out[number] = box.of(self.orientation.apply(self._picture(self._at(index))))
        if self.table.by_time:
            self.frame = None  # the decoder has skipped frames ahead that another reading may need
        return torch.from_numpy(out)

    def _picture(self, frame: Any) -> np.ndarray:
        """A frame as stored, in RGB `[h, w, 3]`."""
        height, width = self.orientation.size(self.height, self.width)
        plane: Any = self.reformatter.reformat(
            frame, width, height, "rgb24", interpolation="BILINEAR", threads=1
        ).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return rows[:, : width * 3].reshape(height, width, 3)

    def _at(self, index: int) -> Any:
        """Frame `index`: from where the decoder stands, or from a start where that is nearer."""
        place = int(self.table.places[index])
        start = self.table.start(place)
        if self.frame is None or not (start.place if start else self.table.places[0]) <= self.place <= place:
            self._go_to(start)
        self._walk_to(place)
        if self.frame is None or self.place != place:  # the file's index is off
            self._rewind()
            self._walk_to(place)
        if self.frame is None or self.place != place:
            raise DecodeError(self.path, f"frame {index} of {self.frames} cannot be decoded")
        return self.frame

    def _walk_to(self, place: int) -> None:
        while self.frame is not None and self.place < place:
            self._next()

    def _next(self) -> None:
        self.frame = next(self.decoded, None)
        if self.frame is not None:
            self.place = self.frame.pts if self.table.by_time else self.place + 1

    def _go_to(self, start: Start | None) -> None:
        """To the first frame from a start, or from the beginning where there is none or a seek misses it."""
        if start is not None:
            with suppress(av.error.FFmpegError):  # the file has no index
                self.container.seek(start.seek, stream=self.stream)
            packets = stored_packets(self.container, self.stream)
            first = next(packets, None)
            if first is not None and self.table.lands(first, start):
                self._decode(start.place, _put_back(first, packets))
                return
            packets.close()
        self._rewind()

    def _rewind(self) -> None:
        """To the first frame, whatever the format makes of seeking there."""
        self.container.close()
        self.container, self.stream = open_stream(self.path, self.local, self.index)
        self._decode(0, stored_packets(self.container, self.stream))

    def _decode(self, first: int, packets: Generator[Any, None, None]) -> None:
        """Start to decode packets; without times the first frame that comes out is number `first`."""
        # asked for each packet, since other frames may be wanted by then
        self.decoded = decode(self.stream, packets, self.table, lambda time: self.wanted is None or time in self.wanted)
        self.place = first - 1
        self._next()


def _put_back(first: Any, packets: Generator[Any, None, None]) -> Generator[Any, None, None]:
    with closing(packets):
        yield first
        yield from packets
