"""List the frames of a video file in display order, and the packets at which decoding can start.

Demuxing suffices for most files, in which each packet is one frame with its display time. For other files (no times,
times that are reset, fields in separate packets, skipped frames), all frames are decoded once and counted.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.stream import Disposition

from mgvideo.storage.members import file_on_disk

from .packets import CLOSED_START, OPEN_START, PacketParser, packet_parser
from .videofile import DecodeError

# streams of covers and previews, which are not videos
COVER_DISPOSITIONS = Disposition.attached_pic.value | Disposition.timed_thumbnails.value
LOSSY_FORMATS = {"mpegts"}  # formats in which packets may be lost (broadcasts, cameras)
SEEK_BY_DTS_FORMATS = {"mpegts"}  # formats that seek by decoding time (dts), not by display time (pts)
# formats without display times; FFmpeg guesses them, and wrongly for .m1v and .m2v
NO_DISPLAY_TIME_FORMATS = {"avi", "mpegvideo"}
RESTART_FRAMES = 16  # decoders reorder at most so many frames: a larger step back means that times are reset
MAX_CACHED_FILES = 1000  # a process keeps the decoded times of so many files


class Start(NamedTuple):
    """A packet at which decoding can start.

    Attributes:
        frame_id: ID of the first frame that is decoded and displayed, see `FrameTable.frame_ids`.
        seek: The time to seek to, in ticks.
        stamp: The `pts` of the packet, or its `dts` in a table by number.
        packet: Number of the packet in storage order.
    """

    frame_id: int
    seek: int
    stamp: int
    packet: int


NO_STARTS = np.empty((0, len(Start._fields)), np.int64)


@dataclass(frozen=True)
class FrameTable:
    """The frames of a stream in display order.

    Attributes:
        ticks: Display time of each frame in units of the stream's time base: int64 `[frames]`, or a range;
            non-decreasing.
        frame_ids: Identifies each decoded frame: int64 `[frames]`, or a range; increasing. Its display time if
            `by_time`, else its number.
        starts: Packets at which decoding can start, sorted: int64 `[starts, 4]`, the fields of `Start`. If empty,
            decoding starts at the beginning.
        by_time: Whether frames are identified by time.
        packed: Whether packets must pass FFmpeg's filter `mpeg4_unpack_bframes`.
        counted: Whether the table was made by decoding all packets; those that cannot be decoded are skipped.
        simple: Whether the table is by time, all packets are displayed, and frames after a keyframe are displayed after
            it and depend on no earlier packet.
        discarded: Number of packets that an edit list hides.
        damaged: Number of damaged packets.
        lost: Number of frames at the beginning that cannot be decoded.
        breaks: Number of frames of a counted table with missing, repeated or reset times.
    """

    ticks: np.ndarray | range
    frame_ids: np.ndarray | range
    starts: np.ndarray
    by_time: bool = False
    packed: bool = False
    counted: bool = False
    simple: bool = False
    discarded: int = 0
    damaged: int = 0
    lost: int = 0
    breaks: int = 0

    def start(self, frame_id: int) -> Start | None:
        """Return the last start from which the frame can be decoded; None: the beginning of the file."""
        number = int(np.searchsorted(self.starts[:, 0], frame_id, "right"))
        return Start(*self.starts[number - 1].tolist()) if number else None

    def reaches(self, packet: Any, start: Start) -> bool:
        """Return whether decoding from `packet`, where a seek to `start` ended, reaches the frames of `start`."""
        if not self.by_time:
            return bool(packet.dts == start.stamp)
        return bool((self.starts[self.starts[:, 0] <= start.frame_id, 2] == packet.pts).any())

    def from_frame(self, frame_id: int) -> FrameTable:
        """Return the table without the frames before `frame_id`, which cannot be decoded."""
        if frame_id <= self.frame_ids[0]:
            return self
        first = int(np.searchsorted(self.frame_ids, frame_id))
        return replace(self, ticks=self.ticks[first:], frame_ids=self.frame_ids[first:], simple=False, lost=first)


def open_stream(path: str, local: str, index: int | None = None) -> tuple[Any, Any]:
    """Open the file `local` with one thread; returns the container and the video stream.

    Without `index`, chooses the stream that a player shows: not a cover or a stream with a single picture; of several
    videos the default one, else the largest, else the first. Errors name the file `path`.

    Raises:
        DecodeError: The file has no video stream or no decoder for it. Errors of PyAV are not converted.
    """
    container: Any = av.open(local)
    try:
        if index is None:
            index = _choose_stream(path, container)
            if len(container.streams.video) > 1:  # _choose_stream has read their packets
                container.close()
                container = av.open(local)
        stream = container.streams[index]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
    except BaseException:
        container.close()
        raise
    return container, stream


def video_streams(container: Any) -> list[Any]:
    """Return the video streams of a container except covers and previews."""
    return [stream for stream in container.streams.video if not stream.disposition.value & COVER_DISPOSITIONS]


def _choose_stream(path: str, container: Any) -> int:
    streams = video_streams(container)
    if not streams:
        raise DecodeError(path, "no video stream" + (", only a cover" if container.streams.video else ""))
    readable = [stream for stream in streams if stream.codec_context is not None]
    if not readable:
        raise DecodeError(path, "no decoder for its codec")
    if len(readable) == 1:
        return int(readable[0].index)
    packets = Counter(packet.stream_index for packet in container.demux(readable) if packet.size)

    def rank(stream: Any) -> tuple[bool, bool, int, int]:
        default = bool(stream.disposition & Disposition.default)
        return packets[stream.index] > 1, default, stream.width * stream.height, -stream.index

    return int(max(readable, key=rank).index)


def stored_packets(container: Any, stream: Any) -> Generator[Any, None, None]:
    """Yield the packets of a stream from the container's position. The caller must close this generator."""
    demuxing: Any = container.demux(stream)
    with closing(demuxing) as packets:  # an open demuxer leaks memory
        for packet in packets:
            if packet.size:  # an empty packet is a skipped frame; decoders take it for the end of the file
                yield packet


def decode_packets(
    stream: Any, packets: Generator[Any, None, None], table: FrameTable, is_needed: Callable[[int], bool] | None = None
) -> Iterator[Any]:
    """Yield the frames of the packets of a stream; closes `packets`.

    In a table by time, frames whose time is not `is_needed` are skipped if no other frame refers to them.
    """
    context = stream.codec_context
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream) if table.packed else None
    with closing(packets):
        for packet in packets:
            if table.by_time:
                context.skip_frame = "DEFAULT" if is_needed is None or is_needed(packet.pts) else "NONREF"
            for part in (packet,) if unpack is None else unpack.filter(packet):
                try:
                    frames = context.decode(part)
                except av.error.FFmpegError:
                    if not table.counted:
                        raise
                else:
                    yield from frames
        yield from context.decode(None)


def read_table(
    path: str, local: str, container: Any, stream: Any, on_packet: Callable[[Any], None] | None = None
) -> FrameTable:
    """Read the frame table of a newly opened stream of the file `local`; errors name the file `path`.

    If the packets do not identify the frames, decodes all of them. `on_packet` is called with each packet.

    Raises:
        DecodeError: The stream has no frames. Errors of PyAV are not converted.
    """
    parser = packet_parser(stream)
    pts: list[Any] = []
    dts: list[Any] = []
    keyframes: set[int] = set()
    discarded: set[int] = set()
    damaged = 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if on_packet is not None:
            on_packet(packet)
        number = len(pts)
        pts.append(packet.pts)
        dts.append(packet.dts)
        if packet.is_discard:
            discarded.add(number)
        damaged += packet.is_corrupt
        if packet.is_keyframe:
            keyframes.add(number)
        elif not parser.needs_all:
            continue
        try:
            parser.add(number, packet)
        except (IndexError, StopIteration, ValueError):
            parser.one_to_one = False
    if not pts:
        raise DecodeError(path, "no frames")
    table = None
    lossy = damaged > 0 and container.format.name in LOSSY_FORMATS
    if parser.one_to_one and 0 in parser.starts and not lossy:
        left_out = discarded | parser.hidden
        shown = [i for i in range(len(pts)) if i not in left_out] if left_out else range(len(pts))
        reorders = stream.codec_context.has_b_frames if parser.reorders is None else parser.reorders
        timed = container.format.name not in NO_DISPLAY_TIME_FORMATS and not parser.packed
        if timed and _are_display_times(pts, dts, shown, reorders):
            seeks = dts if container.format.name in SEEK_BY_DTS_FORMATS else pts
            closed = {number for number, kind in parser.starts.items() if kind == CLOSED_START}
            simple = not left_out and closed == keyframes
            table = _table_by_time(parser, pts, seeks, shown, discarded, simple)
        elif not discarded:
            table = _table_in_decoding_order(parser, pts if timed else dts, dts, shown)
    if table is None:
        no_times = container.format.name in NO_DISPLAY_TIME_FORMATS
        table = _count_frames(path, local, stream.index, sorted(set(dts) - {None}) if no_times else None)
    return replace(table, discarded=len(discarded), damaged=damaged) if discarded or damaged else table


def _are_display_times(pts: Sequence[Any], dts: Sequence[Any], shown: Sequence[int], reorders: bool) -> bool:
    """Return whether `pts` are correct display times: one for each frame, all different."""
    times = [pts[i] for i in shown] if len(shown) < len(pts) else list(pts)
    if not times or None in pts or len(set(times)) < len(times):
        return False
    decoding = [time for time in dts if time is not None]
    if decoding != sorted(decoding):
        return False  # times are reset
    # If frames are reordered, display times that increase in storage order are really decoding times.
    return len(times) < 3 or not reorders or times != sorted(times)


def _table_by_time(
    parser: PacketParser,
    pts: Sequence[int],
    seeks: Sequence[int | None],
    shown: Sequence[int],
    discarded: set[int],
    simple: bool,
) -> FrameTable:
    """Build the table of a stream with correct display times; `seeks` are the times to seek to, by packet number."""
    ticks = np.array(sorted([pts[i] for i in shown]))
    starts = []
    for number in parser.starts:
        time, seek = pts[number], seeks[number]
        if seek is None:
            continue
        if number in discarded:  # later frames that depend on this packet may be displayed
            later = [pts[i] for i in shown[bisect_left(shown, number) :] if pts[i] >= time]
            if not later:
                continue
            time = min(later)
        starts.append(Start(time, seek, pts[number], number))
    starts.sort(key=lambda start: start.frame_id)
    return FrameTable(ticks, ticks, _start_array(starts), by_time=True, simple=simple)


def _table_in_decoding_order(
    parser: PacketParser, pts: Sequence[Any], dts: Sequence[Any], shown: Sequence[int]
) -> FrameTable | None:
    """Build the table of a stream without correct display times, whose frames are numbered in decoding order.

    Returns None if decoding order need not be display order.
    """
    stamps, times = [dts[i] for i in shown], [pts[i] for i in shown]
    if None in stamps or parser.starts[0] == OPEN_START or any(b <= a for a, b in pairwise(stamps)):
        return None
    if None in times or any(b <= a for a, b in pairwise(times)):
        times = stamps
    starts = [
        Start(number, dts[i], dts[i], i) for number, i in enumerate(shown) if parser.starts.get(i) == CLOSED_START
    ]
    return FrameTable(np.array(times), np.arange(len(times)), _start_array(starts), packed=parser.packed)


def _start_array(starts: Sequence[Start]) -> np.ndarray:
    return np.array(starts, np.int64).reshape(-1, len(Start._fields))


def _count_frames(path: str, local: str, index: int, decoding: Sequence[int] | None) -> FrameTable:
    """Build the table of a stream by decoding all of it. Frames get the times `decoding` of packets if given."""
    stat = os.stat(file_on_disk(local))
    times, gap = _decoded_times(path, local, index, stat.st_size, stat.st_mtime_ns)
    if not times:
        raise DecodeError(path, "no frame can be decoded")
    if decoding is not None:
        times = (*decoding[: len(times)], *((None,) * (len(times) - len(decoding))))
    breaks = sum(b is None or (a is not None and b <= a) for a, b in pairwise((None, *times)))
    return FrameTable(make_monotonic(times, gap), np.arange(len(times)), NO_STARTS, counted=True, breaks=breaks)


@lru_cache(MAX_CACHED_FILES)
def _decoded_times(path: str, local: str, index: int, size: int, changed: int) -> tuple[tuple[int | None, ...], int]:
    """Return the times of all frames in decoding order, and the ticks from one frame to the next.

    `size` and `changed` (modification time in ns) are part of the cache key.
    """
    container, stream = open_stream(path, local, index)
    with container:
        frames = decode_packets(
            stream, stored_packets(container, stream), FrameTable(np.empty(0), np.empty(0), NO_STARTS, counted=True)
        )
        times = tuple(frame.dts if frame.pts is None else frame.pts for frame in frames)
        return times, frame_ticks(stream)


def frame_ticks(stream: Any) -> int:
    """Return the ticks from one frame to the next according to the file's header, at least 1."""
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * stream.time_base))) if rate and stream.time_base else 1


def make_monotonic(times: Sequence[int | None], gap: int) -> np.ndarray:
    """Make the times of frames in display order non-decreasing: int64 `[frames]`.

    If a time is missing or times are reset, the frame follows the previous one after `gap` ticks.
    """
    ticks: list[int] = []
    shift = 0
    for time in times:
        last = ticks[-1] if ticks else None
        if time is None:
            ticks.append(0 if last is None else last + gap)
            continue
        if last is not None and time + shift < last - RESTART_FRAMES * gap:
            shift = last + gap - time
        ticks.append(time + shift if last is None else max(last, time + shift))
    return np.array(ticks, np.int64)
