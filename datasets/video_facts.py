"""What is known of a video without opening it: its frames, and where its packets lie."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import av
import numpy as np

from mgvideo.storage.members import place_on_disk

from .frame_table import FrameTable
from .orientation import Orientation

MAX_BLOCK_HEADER = 64  # bytes between the position that FFmpeg gives for a packet and its data
# Fields of a codec context that containers may set and decoders use.
CODEC_FIELDS = ("codec_tag", "width", "height", "color_range", "color_primaries", "color_trc", "colorspace")
COMPARED_PACKETS = 24  # packets of a stream with reordered frames that are decoded to compare both ways
# Fields of a FrameTable that are stored as they are.
TABLE_FIELDS = tuple(f.name for f in fields(FrameTable) if f.name not in ("ticks", "frame_ids", "starts"))
MAX_SHIFT = 127  # packets by which a frame may be displayed earlier or later than it is stored


@dataclass(frozen=True)
class StoredPackets:
    """Where the packets of a stream lie in its file, in storage order.

    Attributes:
        codec: Name of the decoder and fields of its context.
        extradata: The codec's global header.
        offsets: Position of each packet in bytes: `[packets]`, or `[packets + 1]` without `sizes`, where each packet
            ends at the next one.
        sizes: Bytes of each packet: `[packets]`, or None.
        times: The `pts` of each packet: int64 `[packets]`; or if frames are displayed about in storage order, int8, how
            many frames later than its number; None: each packet is the frame of its number.
    """

    codec: Mapping[str, Any]
    extradata: bytes | None
    offsets: np.ndarray
    sizes: np.ndarray | None
    times: np.ndarray | None

    def __len__(self) -> int:
        return len(self.offsets) - (self.sizes is None)

    def open_codec(self) -> Any:
        """Return a context that decodes the packets with one thread."""
        context: Any = av.codec.CodecContext.create(self.codec["name"], "r")
        if self.extradata is not None:
            context.extradata = self.extradata
        for name in CODEC_FIELDS:
            if self.codec[name] is not None:
                setattr(context, name, self.codec[name])
        context.thread_type = "NONE"
        context.thread_count = 1
        return context

    def read(self, file: int, start: int, first: int, table: FrameTable) -> Generator[Any, None, None]:
        """Yield the packets from number `first` on, read from a file descriptor in which the video is at `start`."""
        for number in range(first, len(self)):
            offset = int(self.offsets[number])
            size = int(self.offsets[number + 1]) - offset if self.sizes is None else int(self.sizes[number])
            packet: Any = av.Packet(size)  # with the zeros behind it that decoders require, which bytes do not have
            packet.update(os.pread(file, size, start + offset))
            if table.by_time:
                packet.pts = self._time(number, table)
            yield packet

    def _time(self, number: int, table: FrameTable) -> int:
        if self.times is None:
            return int(table.frame_ids[number])
        time = int(self.times[number])
        return int(table.frame_ids[number + time]) if self.times.dtype == np.int8 else time


@dataclass(frozen=True)
class IndexedStream:
    """Stands for the stream of a container that is not open: its decoder and time base."""

    codec_context: Any
    time_base: Fraction


@dataclass(frozen=True)
class VideoFacts:
    """What `PyAVVideo` finds when it opens a file.

    Attributes:
        table: The frames that can be decoded.
        stream: Number of the stream in its file.
        time_base: Seconds of a tick.
        end: Tick at which the last frame ends.
        shift: Seconds from the start of a player's clock to the first frame.
        rate: See `Video.rate`.
        height, width: Size of a stored picture.
        orientation: How stored pictures are rotated and mirrored for display.
        interlaced: Whether the first frame is stored as two interlaced fields.
        simple: Whether decord and torchcodec read this file correctly, too.
        packets: None if the packets cannot be read without the container.
    """

    table: FrameTable
    stream: int
    time_base: Fraction
    end: int
    shift: float
    rate: float | None
    height: int
    width: int
    orientation: Orientation
    interlaced: bool
    simple: bool
    packets: StoredPackets | None = None

    @property
    def times(self) -> np.ndarray:
        """See `Video.times`."""
        ticks, base = self.table.ticks, self.time_base
        if isinstance(ticks, range):
            ticks = np.arange(ticks.start, ticks.stop, ticks.step)
        seconds = (np.append(ticks, self.end) - ticks[0]) * base.numerator / base.denominator
        return seconds + self.shift if self.shift else seconds

    def pack(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return a description in JSON types, and arrays."""
        table = self.table
        description: dict[str, Any] = {
            "table": {name: getattr(table, name) for name in TABLE_FIELDS},
            "base": [self.time_base.numerator, self.time_base.denominator],
            "first_id": int(table.frame_ids[0]),
            "orientation": list(self.orientation),
        }
        for name in ("stream", "end", "shift", "rate", "height", "width", "interlaced", "simple"):
            description[name] = getattr(self, name)
        arrays = {}
        ticks = np.asarray(table.ticks)
        gaps = np.diff(ticks)
        if len(gaps) and gaps[0] > 0 and (gaps == gaps[0]).all():
            description["even"] = [int(ticks[0]), int(ticks[-1]) + 1, int(gaps[0])]
        else:
            arrays["ticks"] = ticks
        first, seeks, stamps, numbers = table.starts.T
        arrays |= {"starts": first, "start_packets": numbers.astype(np.uint32)}
        if (seeks != first).any() or (stamps != first).any():
            arrays |= {"seeks": seeks, "stamps": stamps}
        if self.packets is not None:
            extradata = self.packets.extradata
            description["codec"] = dict(self.packets.codec)
            description["extradata"] = None if extradata is None else extradata.hex()
            arrays["offsets"] = self.packets.offsets
            arrays |= {} if self.packets.sizes is None else {"sizes": self.packets.sizes}
            arrays |= {} if self.packets.times is None else {"times": self.packets.times}
        return description, arrays

    @classmethod
    def unpack(cls, description: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> VideoFacts:
        """Return what `pack` returned as an object; arrays stay in the memory map. Raises KeyError and others."""
        ticks: Any = range(*description["even"]) if "even" in description else arrays["ticks"]
        first, by_time = description["first_id"], description["table"]["by_time"]
        starts = arrays["starts"]
        columns = starts, arrays.get("seeks", starts), arrays.get("stamps", starts), arrays["start_packets"]
        frame_ids = ticks if by_time else range(first, first + len(ticks))
        table = FrameTable(ticks, frame_ids, np.stack(columns, 1).astype(np.int64), **description["table"])
        packets = None
        if "codec" in description:
            extradata = description["extradata"]
            packets = StoredPackets(
                description["codec"],
                None if extradata is None else bytes.fromhex(extradata),
                arrays["offsets"],
                arrays.get("sizes"),
                arrays.get("times"),
            )
        names = ("stream", "end", "shift", "rate", "height", "width", "interlaced", "simple")
        return cls(
            table=table,
            time_base=Fraction(*description["base"]),
            orientation=Orientation(*description["orientation"]),
            packets=packets,
            **{name: description[name] for name in names},
        )


class PacketCollector:
    """Collects where the packets of a stream lie while they are demuxed, if the file has their data as they are."""

    def __init__(self, local: str) -> None:
        path, self.start = place_on_disk(local)
        self.file = os.open(path, os.O_RDONLY)
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.times: list[int | None] = []
        self.complete = True

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)

    def add(self, packet: Any) -> None:
        """Add the next packet."""
        if not self.complete:
            return
        position, data = packet.pos, bytes(packet)
        self.complete = False
        if position is None or position < 0 or packet.is_discard or packet.is_corrupt or any(packet.iter_sidedata()):
            return
        begin = os.pread(self.file, len(data) + MAX_BLOCK_HEADER, self.start + position).find(data)
        if begin < 0:
            return
        self.complete = True
        self.offsets.append(position + begin)
        self.sizes.append(len(data))
        self.times.append(packet.pts)

    def packets(self, table: FrameTable, context: Any) -> StoredPackets | None:
        """Return the packets if decoding them without the container gives the same frames, else None.

        `table` is that of all frames, `context` that of the stream in its container, which has decoded nothing yet.
        """
        if not self.complete or table.counted or table.packed or table.discarded or table.damaged:
            return None
        offsets = np.array([*self.offsets, self.offsets[-1] + self.sizes[-1]])
        offsets = offsets.astype(np.uint32 if offsets.max() < 2**32 else np.uint64)
        sizes = np.array(self.sizes, np.uint32)
        contiguous = np.array_equal(np.diff(offsets.astype(np.int64)), sizes)
        codec = {"name": context.name, **{name: getattr(context, name) for name in CODEC_FIELDS}}
        packets = StoredPackets(
            codec,
            context.extradata,
            offsets if contiguous else offsets[:-1],
            None if contiguous else sizes,
            self._packed_times(table) if table.by_time else None,
        )
        with suppress(av.error.FFmpegError, ValueError, TypeError, AttributeError):
            return packets if self._decodes_alike(packets, table, context) else None
        return None

    def _packed_times(self, table: FrameTable) -> np.ndarray | None:
        times = np.array(self.times, np.int64)
        numbers = np.arange(len(times))
        if len(times) == len(table.frame_ids):
            shifts = np.searchsorted(table.frame_ids, times) - numbers
            if not shifts.any():
                return None
            if np.abs(shifts).max() <= MAX_SHIFT:
                return shifts.astype(np.int8)
        return times

    def _decodes_alike(self, packets: StoredPackets, table: FrameTable, context: Any) -> bool:
        """Return whether the first frames are the same from the container and without it."""
        reordered = self.times != sorted(self.times, key=lambda time: -1 if time is None else time)
        count = COMPARED_PACKETS if reordered else 1
        decoded = []
        for decoder in (context, packets.open_codec()):
            frames: list[Any] = []
            for _, packet in zip(range(count), packets.read(self.file, self.start, 0, table), strict=False):
                frames += decoder.decode(packet)
            frames += decoder.decode(None)
            decoder.flush_buffers()
            decoded.append([_frame_content(frame, table.by_time) for frame in frames])
        return decoded[0] == decoded[1] and bool(decoded[0])


def _frame_content(frame: Any, by_time: bool) -> tuple[Any, ...]:
    """Return all of a frame that its conversion to RGB depends on."""
    colours = frame.colorspace, frame.color_range, frame.format.name, frame.height, frame.width
    return (frame.pts if by_time else 0, *colours, frame.to_ndarray(format="rgb24").tobytes())
