"""Which frames a video file has, in the order in which people see them, and where decoding may start for each.

Demuxing tells this for most files: each packet is a frame, and has the time at which it is shown. Where packets do not
tell (no times, times that start over, half frames, skipped frames), all frames are decoded once and counted.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
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

from .packets import CLOSED_START, OPEN_START, PacketParser, packet_parser
from .videofile import DecodeError

PICTURES = (
    Disposition.attached_pic.value | Disposition.timed_thumbnails.value
)  # covers and previews, which are no videos
LOSSY_FORMATS = {"mpegts"}  # of broadcasts and cameras: players go on where packets are lost
SOUGHT_BY_DTS = {"mpegts"}  # formats that find a packet by its time of decoding
NO_DISPLAY_TIMES = {"avi", "mpegvideo"}  # formats whose display times FFmpeg makes up: of .m1v and .m2v it errs
RESTART_FRAMES = 16  # a decoder reorders no more frames: times that go back further start over
COUNTED_FILES = 1000  # whose counts a process remembers


class Start(NamedTuple):
    """A packet at which decoding may start.

    `place`: that of the first frame that comes out and is shown. `seek`: the time to seek to. `stamp`: the packet's
    `pts`, or, in a table by number, its `dts`.
    """

    place: int
    seek: int
    stamp: int


@dataclass(frozen=True)
class FrameTable:
    """The frames of a stream in the order in which people see them.

    `ticks`: when each is shown, in units of the stream's time base, int64 `[frames]`, never falling. `places`: what
    identifies a decoded frame, int64 `[frames]`, rising: its time where `by_time`, else its number. `starts`: sorted;
    without any, decoding starts at the beginning.
    `packed`: packets pass FFmpeg's filter `mpeg4_unpack_bframes`. `counted`: found by decoding all packets, passing
    over those that cannot be decoded. `simple`: by time, all that is stored is shown, and what follows a keyframe is
    shown after it and needs nothing stored before it. What is not as people expect: `discarded` packets that an edit
    list keeps from being shown, `damaged` ones, `lost` frames at the beginning that cannot be decoded, `breaks` in the
    times of counted frames.
    """

    ticks: np.ndarray
    places: np.ndarray
    starts: tuple[Start, ...]
    by_time: bool = False
    packed: bool = False
    counted: bool = False
    simple: bool = False
    discarded: int = 0
    damaged: int = 0
    lost: int = 0
    breaks: int = 0

    def start(self, place: int) -> Start | None:
        """The last start that reaches the frame at `place`; None: the beginning."""
        number = bisect_right(self.starts, place, key=lambda start: start.place)
        return self.starts[number - 1] if number else None

    def lands(self, packet: Any, start: Start) -> bool:
        """Whether decoding from this packet, which a seek to `start` has found, reaches the start's frames."""
        if not self.by_time:
            return bool(packet.dts == start.stamp)
        return any(other.stamp == packet.pts for other in self.starts if other.place <= start.place)

    def from_place(self, place: int) -> FrameTable:
        """The table without the frames before `place`, which cannot be decoded."""
        if place <= self.places[0]:
            return self
        first = int(np.searchsorted(self.places, place))
        return replace(self, ticks=self.ticks[first:], places=self.places[first:], simple=False, lost=first)


def open_stream(path: str, local: str, index: int | None = None) -> tuple[Any, Any]:
    """Open the file `local`; returns the container and its stream `index`, or the one that people see.

    Covers and streams of a single picture are no videos. Of several videos people see the default one, else the
    largest, else the first. `path` is what errors call the file. Raises DecodeError, or what PyAV raises.
    """
    container: Any = av.open(local)
    try:
        if index is None:
            index = _choose_stream(path, container)
            if len(container.streams.video) > 1:  # their packets were read
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
    """The video streams that are no covers or previews."""
    return [stream for stream in container.streams.video if not stream.disposition.value & PICTURES]


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
    """Packets of a stream from where its container stands; close this generator."""
    demuxing: Any = container.demux(stream)
    with closing(demuxing) as packets:  # one that is left open loses memory
        for packet in packets:
            if packet.size:  # else a recorder has left out a frame; decoders would take the packet for the end
                yield packet


def decode(
    stream: Any, packets: Generator[Any, None, None], table: FrameTable, wanted: Callable[[int], bool] | None = None
) -> Iterator[Any]:
    """Frames of the packets of a stream; closes `packets`.

    In a table by time, packets at times that are not `wanted` are skipped where no other frame refers to them.
    """
    context = stream.codec_context
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", stream) if table.packed else None
    with closing(packets):
        for packet in packets:
            if table.by_time:
                context.skip_frame = "DEFAULT" if wanted is None or wanted(packet.pts) else "NONREF"
            for part in (packet,) if unpack is None else unpack.filter(packet):
                try:
                    frames = context.decode(part)
                except av.error.FFmpegError:
                    if not table.counted:
                        raise
                else:
                    yield from frames
        yield from context.decode(None)


def read_table(path: str, local: str, container: Any, stream: Any) -> FrameTable:
    """The table of a stream that nothing was read from yet; `local` is its file, `path` what errors call it.

    Where packets do not tell the frames, decodes all of them. Raises DecodeError, or what PyAV raises.
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
        timed = container.format.name not in NO_DISPLAY_TIMES and not parser.packed
        if timed and _are_display_times(pts, dts, shown, reorders):
            seeks = dts if container.format.name in SOUGHT_BY_DTS else pts
            closed = {number for number, kind in parser.starts.items() if kind == CLOSED_START}
            simple = not left_out and closed == keyframes
            table = _table_by_time(parser, pts, seeks, shown, discarded, simple)
        elif not discarded:
            table = _table_by_number(parser, pts if timed else dts, dts, shown)
    if table is None:
        no_times = container.format.name in NO_DISPLAY_TIMES
        table = _count_frames(path, local, stream.index, sorted(set(dts) - {None}) if no_times else None)
    return replace(table, discarded=len(discarded), damaged=damaged) if discarded or damaged else table


def _are_display_times(pts: Sequence[Any], dts: Sequence[Any], shown: Sequence[int], reorders: bool) -> bool:
    """Whether the times `pts` are those at which frames are shown, one each."""
    times = [pts[i] for i in shown] if len(shown) < len(pts) else list(pts)
    if not times or None in pts or len(set(times)) < len(times):
        return False
    decoding = [time for time in dts if time is not None]
    if decoding != sorted(decoding):
        return False  # they start over
    # times that follow the order of storing are those of decoding where frames are shown in another
    return len(times) < 3 or not reorders or times != sorted(times)


def _table_by_time(
    parser: PacketParser,
    pts: Sequence[int],
    seeks: Sequence[int | None],
    shown: Sequence[int],
    discarded: set[int],
    simple: bool,
) -> FrameTable:
    ticks = np.array(sorted([pts[i] for i in shown]))
    starts = []
    for number in parser.starts:
        place, seek = pts[number], seeks[number]
        if seek is None:
            continue
        if number in discarded:  # frames that it leads to may be shown all the same
            later = [pts[i] for i in shown[bisect_left(shown, number) :] if pts[i] >= place]
            if not later:
                continue
            place = min(later)
        starts.append(Start(place, seek, pts[number]))
    starts.sort(key=lambda start: start.place)
    return FrameTable(ticks, ticks, tuple(starts), by_time=True, simple=simple)


def _table_by_number(
    parser: PacketParser, pts: Sequence[Any], dts: Sequence[Any], shown: Sequence[int]
) -> FrameTable | None:
    """The table of a stream without sound display times, of which the order of decoding is the order of display."""
    stamps, times = [dts[i] for i in shown], [pts[i] for i in shown]
    if None in stamps or parser.starts[0] == OPEN_START or any(b <= a for a, b in pairwise(stamps)):
        return None
    if None in times or any(b <= a for a, b in pairwise(times)):
        times = stamps
    starts = [Start(place, dts[i], dts[i]) for place, i in enumerate(shown) if parser.starts.get(i) == CLOSED_START]
    return FrameTable(np.array(times), np.arange(len(times)), tuple(starts), packed=parser.packed)


def _count_frames(path: str, local: str, index: int, decoding: Sequence[int] | None) -> FrameTable:
    """The table of a stream by decoding all of it; frames have the times `decoding` of packets, or else their own."""
    found = os.stat(local)
    times, gap = _decoded_times(path, local, index, found.st_size, found.st_mtime_ns)
    if not times:
        raise DecodeError(path, "no frame can be decoded")
    if decoding is not None:
        times = (*decoding[: len(times)], *((None,) * (len(times) - len(decoding))))
    breaks = sum(b is None or (a is not None and b <= a) for a, b in pairwise((None, *times)))
    return FrameTable(steady(times, gap), np.arange(len(times)), (), counted=True, breaks=breaks)


@lru_cache(COUNTED_FILES)
def _decoded_times(path: str, local: str, index: int, size: int, changed: int) -> tuple[tuple[int | None, ...], int]:
    """Times of all frames as they are decoded, and ticks between two; size and time of change stand for the file."""
    container, stream = open_stream(path, local, index)
    with container:
        frames = decode(
            stream, stored_packets(container, stream), FrameTable(np.empty(0), np.empty(0), (), counted=True)
        )
        times = tuple(frame.dts if frame.pts is None else frame.pts for frame in frames)
        return times, frame_ticks(stream)


def frame_ticks(stream: Any) -> int:
    """Ticks from one frame to the next, as the file's header says."""
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * stream.time_base))) if rate and stream.time_base else 1


def steady(times: Sequence[int | None], gap: int) -> np.ndarray:
    """Times that never fall, int64, from those of frames in the order in which they are shown.

    Where times start over, and where there are none, a frame follows the one before after `gap`.
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
