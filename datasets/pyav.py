"""The PyAV decoder: exact for every file that FFmpeg reads, and the fastest of the three decoders."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
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
    decode_packets,
    frame_ticks,
    open_stream,
    read_table,
    stored_packets,
)
from .orientation import Orientation, read_orientation
from .videofile import Box, DecodeError, Video, check_file, raise_decode_errors, read_size

# formats in which decord and torchcodec seek correctly, by FFmpeg's names
SIMPLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


@dataclass
class PyAV:
    """Decodes with the FFmpeg libraries of PyAV: reads every codec, skips frames to which no other frame refers."""

    shrink: bool = True  # see `Decoder.open`

    def open(self, path: str, short_side: int | None = None) -> PyAVVideo:
        """See `Decoder.open`."""
        with raise_decode_errors(path):
            check_file(path, copy := local_copy(path))
            return PyAVVideo(path, copy, short_side if self.shrink else None)


class PyAVVideo(Video):
    """A video open in PyAV.

    Attributes:
        path: The file or URL that errors name.
        local: The local file that is read.
        table: The frames of the file.
        orientation: How stored pictures are rotated and mirrored for display.
        interlaced: Whether the first frame is stored as two interlaced fields.
        simple: Whether decord and torchcodec read this file correctly, too.
    """

    def __init__(self, path: str, local: str, short_side: int | None) -> None:
        self.path, self.local = path, local
        self.frame: Any = None  # the last decoded frame
        self.frame_id = 0  # its ID, see FrameTable.frame_ids
        self.needed: set[int] | None = None  # IDs of the frames to decode; None: all
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.container, self.stream = open_stream(path, local)
        self.index = int(self.stream.index)  # kept, because it cannot be read after the container is closed
        try:
            self._read_properties(short_side)
        except BaseException:
            self.close()
            raise

    def _read_properties(self, short_side: int | None) -> None:
        self.table: FrameTable = read_table(self.path, self.local, self.container, self.stream)
        self._seek(self.table.starts[0] if self.table.starts else None)
        # whether a seek to the first start reaches the first frame
        self.seeks_to_start = self.frame is not None and self.frame_id == self.table.frame_ids[0]
        if not self.seeks_to_start:
            self._rewind()
        if self.frame is None:
            raise DecodeError(self.path, "no frame can be decoded")
        self.table = self.table.from_frame(self.frame_id)
        self.frames = len(self.table.ticks)
        self.orientation: Orientation = read_orientation(self.frame)
        self.interlaced = bool(self.frame.interlaced_frame)
        height, width = read_size(self.frame.height, self.frame.width, short_side)
        self.height, self.width = self.orientation.size(height, width)
        is_only_stream = len(self.container.streams.video) == 1
        self.simple = (
            self.table.simple
            and self.seeks_to_start
            and self.orientation.upright
            and is_only_stream
            and self.container.format.name in SIMPLE_FORMATS
        )

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
        # The audio starts before the video. Audio before time 0 only primes the audio decoder and is not played.
        return seconds + (first - max(start, min(first, 0.0)))

    def close(self) -> None:
        """Release the file and frames now: reference cycles would keep them until the next garbage collection."""
        self.decoded, self.frame = iter(()), None
        self.container.close()

    def rising_ticks(self) -> list[int]:
        """Return `table.ticks` shifted to start at 0 and made strictly increasing, as an output file requires."""
        order = np.arange(self.frames)
        ticks = np.maximum.accumulate(self.table.ticks - order) + order
        rising: list[int] = (ticks - ticks[0]).tolist()
        return rising

    def decode_all(self) -> Iterator[Any]:
        """Yield all frames in display order as PyAV frames. Raises DecodeError."""
        with raise_decode_errors(self.path):
            self.needed = None
            self._rewind()
            for index in range(self.frames):
                yield self._decode_frame(index)

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        out = np.empty((len(indices), box.height, box.width, 3), np.uint8)
        if self.table.by_time:
            self.needed = {int(self.table.frame_ids[i]) for i in indices}
        for number, index in enumerate(indices.tolist()):
            out[number] = box.crop(self.orientation.apply(self._to_rgb(self._decode_frame(index))))
        if self.table.by_time:
            self.frame = None  # the decoder may have skipped later frames that the next read needs
        return torch.from_numpy(out)

    def _to_rgb(self, frame: Any) -> np.ndarray:
        """Convert a stored frame to RGB, uint8 `[h, w, 3]`, before rotation."""
        height, width = self.orientation.size(self.height, self.width)
        plane: Any = self.reformatter.reformat(
            frame, width, height, "rgb24", interpolation="BILINEAR", threads=1
        ).planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        return rows[:, : width * 3].reshape(height, width, 3)

    def _decode_frame(self, index: int) -> Any:
        """Decode frame `index`: continue from the current frame, or seek if that skips frames."""
        frame_id = int(self.table.frame_ids[index])
        start = self.table.start(frame_id)
        start_id = start.frame_id if start else self.table.frame_ids[0]
        if self.frame is None or not start_id <= self.frame_id <= frame_id:
            self._seek(start)
        self._advance_to(frame_id)
        if self.frame is None or self.frame_id != frame_id:  # the index of the file is wrong
            self._rewind()
            self._advance_to(frame_id)
        if self.frame is None or self.frame_id != frame_id:
            raise DecodeError(self.path, f"frame {index} of {self.frames} cannot be decoded")
        return self.frame

    def _advance_to(self, frame_id: int) -> None:
        while self.frame is not None and self.frame_id < frame_id:
            self._decode_next()

    def _decode_next(self) -> None:
        self.frame = next(self.decoded, None)
        if self.frame is not None:
            self.frame_id = self.frame.pts if self.table.by_time else self.frame_id + 1

    def _seek(self, start: Start | None) -> None:
        """Seek to a start and decode its first frame; rewind if `start` is None or the seek misses it."""
        if start is not None:
            with suppress(av.error.FFmpegError):  # the file has no index
                self.container.seek(start.seek, stream=self.stream)
            packets = stored_packets(self.container, self.stream)
            first = next(packets, None)
            if first is not None and self.table.reaches(first, start):
                self._start_decoding(start.frame_id, _prepend(first, packets))
                return
            packets.close()
        self._rewind()

    def _rewind(self) -> None:
        """Reopen the file and decode the first frame, because some formats cannot seek to the beginning."""
        self.container.close()
        self.container, self.stream = open_stream(self.path, self.local, self.index)
        self._start_decoding(0, stored_packets(self.container, self.stream))

    def _start_decoding(self, first: int, packets: Generator[Any, None, None]) -> None:
        """Start to decode packets. In a table by number, the first decoded frame has the ID `first`."""

        def is_needed(time: int) -> bool:
            return self.needed is None or time in self.needed  # self.needed changes between reads

        self.decoded = decode_packets(self.stream, packets, self.table, is_needed)
        self.frame_id = first - 1
        self._decode_next()


def _prepend(first: Any, packets: Generator[Any, None, None]) -> Generator[Any, None, None]:
    """Yield `first`, then the rest of the packets."""
    with closing(packets):
        yield first
        yield from packets
