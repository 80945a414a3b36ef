"""The PyAV decoder: exact for every file that FFmpeg reads, and the fastest of the three decoders."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from mgvideo.storage.members import file_on_disk, place_on_disk
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
from .orientation import read_orientation
from .packet_index import PacketIndex, find_index
from .video_facts import IndexedStream, PacketCollector, VideoFacts
from .videofile import Box, DecodeError, Video, check_file, frame_rate, raise_decode_errors, read_size

# formats in which decord and torchcodec seek correctly, by FFmpeg's names
SIMPLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}


class PyAV:
    """Decodes with the FFmpeg libraries of PyAV: reads every codec, skips frames to which no other frame refers.

    Attributes:
        shrink: See `Decoder.open`.
        indexes: The packet indexes of folders. A video in them is opened without reading the file; others are added.
        renew: Open every file itself, and replace its record in the index.
    """

    def __init__(
        self, shrink: bool = True, indexes: Mapping[str, PacketIndex] | None = None, renew: bool = False
    ) -> None:
        self.shrink, self.indexes, self.renew = shrink, indexes or {}, renew

    def open(self, path: str, short_side: int | None = None) -> PyAVVideo:
        """See `Decoder.open`."""
        short_side = short_side if self.shrink else None
        with raise_decode_errors(path):
            local = local_copy(path)
            name = local if file_on_disk(local) == local else path  # in the index; a member of an archive by its path
            index = find_index(name, self.indexes)
            if index is None:
                check_file(path, local)
                return PyAVVideo(path, local, short_side)
            if not self.renew and (record := index.find(name)) is not None:
                with suppress(KeyError, TypeError, ValueError, IndexError):  # written by another version
                    return PyAVVideo(path, local, short_side, VideoFacts.unpack(*record))
            check_file(path, local)
            status = os.stat(file_on_disk(local))
            with closing(PacketCollector(local)) as packets:
                video = PyAVVideo(path, local, short_side, collector=packets)
            index.add(name, status, *video.facts.pack())
            return video


def index_video(decoder: PyAV, path: str) -> str:
    """Add a video to the indexes of a decoder; return the error of a video that cannot be read, or ""."""
    try:
        decoder.open(path).close()
    except DecodeError as error:
        return str(error)
    return ""


class PyAVVideo(Video):
    """A video open in PyAV.

    Its packets are read from the container, or without it if `facts` say where they lie. If that fails, the container
    is opened.

    Attributes:
        path: The file or URL that errors name.
        local: The local file that is read.
        facts: What is known of the file.
        table: The frames of the file.
        orientation: How stored pictures are rotated and mirrored for display.
        interlaced: Whether the first frame is stored as two interlaced fields.
        simple: Whether decord and torchcodec read this file correctly, too.
        container: None while packets are read without it.
    """

    def __init__(
        self,
        path: str,
        local: str,
        short_side: int | None,
        facts: VideoFacts | None = None,
        collector: PacketCollector | None = None,
    ) -> None:
        self.path, self.local = path, local
        self.frame: Any = None  # the last decoded frame
        self.frame_id = 0  # its ID, see FrameTable.frame_ids
        self.needed: set[int] | None = None  # IDs of the frames to decode; None: all
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.decoded: Iterator[Any] = iter(())
        self.container: Any = None
        self.file: int | None = None  # descriptor to read packets from
        self.start = 0  # position of the video in that file
        self.stream: Any = None
        try:
            if facts is None or facts.packets is None:
                self.container, self.stream = open_stream(path, local, None if facts is None else facts.stream)
            self.facts = self._read_facts(collector) if facts is None else facts
            if self.container is None:
                self._open_packets()
            # Before frames are skipped: otherwise libdav1d never returns those of the first packet.
            self.stream.codec_context.open(strict=False)
        except BaseException:
            self.close()
            raise
        self.table, self.orientation, self.index = self.facts.table, self.facts.orientation, self.facts.stream
        self.interlaced, self.simple, self.rate = self.facts.interlaced, self.facts.simple, self.facts.rate
        self.frames = len(self.table.ticks)
        height, width = read_size(self.facts.height, self.facts.width, short_side)
        self.height, self.width = self.orientation.size(height, width)

    def _read_facts(self, collector: PacketCollector | None) -> VideoFacts:
        """Read the frame table and decode the first frame."""
        self.index = int(self.stream.index)  # kept, because it cannot be read after the container is closed
        whole = read_table(
            self.path, self.local, self.container, self.stream, None if collector is None else collector.add
        )
        packets = None if collector is None else collector.packets(whole, self.stream.codec_context)
        self.table = whole
        self._seek(Start(*whole.starts[0].tolist()) if len(whole.starts) else None)
        # whether a seek to the first start reaches the first frame
        seeks_to_start = self.frame is not None and self.frame_id == whole.frame_ids[0]
        if not seeks_to_start:
            self._rewind()
        if self.frame is None:
            raise DecodeError(self.path, "no frame can be decoded")
        table = whole.from_frame(self.frame_id)
        orientation = read_orientation(self.frame)
        is_only_stream = len(self.container.streams.video) == 1
        simple = (
            table.simple
            and seeks_to_start
            and orientation.upright
            and is_only_stream
            and self.container.format.name in SIMPLE_FORMATS
        )
        gaps = np.diff(table.ticks)
        gap = int(np.partition(gaps, len(gaps) // 2)[len(gaps) // 2]) if len(gaps) else 0
        facts = VideoFacts(
            table=table,
            stream=self.index,
            time_base=Fraction(self.stream.time_base),
            end=int(table.ticks[-1]) + (gap or frame_ticks(self.stream)),
            shift=self._start_shift(table),
            rate=None,
            height=self.frame.height,
            width=self.frame.width,
            orientation=orientation,
            interlaced=bool(self.frame.interlaced_frame),
            simple=bool(simple),
            packets=packets if table is whole else None,
        )
        return replace(facts, rate=frame_rate(facts.times))

    def _start_shift(self, table: FrameTable) -> float:
        """Return the seconds from the start of a player's clock to the first frame: audio may start earlier."""
        base = self.stream.time_base
        first = int(table.ticks[0]) * base.numerator / base.denominator
        start = first if self.container.start_time is None else self.container.start_time / av.time_base
        if start > first - 1 / av.time_base:
            return 0.0
        # Audio before time 0 only primes the audio decoder and is not played.
        return float(first - max(start, min(first, 0.0)))

    def _open_packets(self) -> None:
        """Prepare to read packets without the container."""
        assert self.facts.packets is not None
        file, self.start = place_on_disk(self.local)
        self.file = os.open(file, os.O_RDONLY)
        self.stream = IndexedStream(self.facts.packets.open_codec(), self.facts.time_base)

    @cached_property
    def times(self) -> np.ndarray:  # type: ignore[override]
        """See `Video.times`."""
        return self.facts.times

    def close(self) -> None:
        """Release the file and frames now: reference cycles would keep them until the next garbage collection."""
        self.decoded, self.frame = iter(()), None
        if self.container is not None:
            self.container.close()
        if self.file is not None:
            os.close(self.file)
            self.file = None

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
        try:
            if self.frame is None or not start_id <= self.frame_id <= frame_id:
                self._seek(start)
            self._advance_to(frame_id)
        except (av.error.FFmpegError, OSError):
            if self.file is None:
                raise
            self.frame = None  # read the container instead
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
            frame: Any = self.frame
            self.frame_id = frame.pts if self.table.by_time else self.frame_id + 1

    def _seek(self, start: Start | None) -> None:
        """Seek to a start and decode its first frame; rewind if `start` is None or the seek misses it."""
        if self.file is not None:
            assert self.facts.packets is not None
            self.stream.codec_context.flush_buffers()
            number, first_id = (start.packet, start.frame_id) if start else (0, 0)
            self._start_decoding(first_id, self.facts.packets.read(self.file, self.start, number, self.table))
            return
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
        if self.container is not None:
            self.container.close()
        if self.file is not None:
            os.close(self.file)
            self.file = None
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
