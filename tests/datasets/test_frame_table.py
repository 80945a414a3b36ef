"""Test frame tables: the displayed frames in display order for every kind of storage."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fields import BITS, FIELD, NUMBERS, write_fields
from test_decoders import DECODERS, NAMES
from videos import numbered_frame, read_number, write_video

from mgvideo.datasets.decoders import DecodeError, Decoder, PyAV
from mgvideo.datasets.pyav import PyAVVideo

each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)


def shown(video: Any, indices: Sequence[int], bits: int = BITS) -> list[int]:
    return [read_number(frame, bits) for frame in video.read(indices)]


@each_decoder
@pytest.mark.parametrize("name", NUMBERS)
def test_every_frame_of_typical_files_is_read(name: str, decoder: Decoder) -> None:
    numbers = NUMBERS[name]
    with decoder.open(str(FIELD / name)) as video:
        assert video.frames == len(numbers)
        assert shown(video, range(video.frames)) == numbers
        order = random.Random(0).sample(range(video.frames), video.frames)
        singles = [number for index in order for number in shown(video, [index])]
        assert singles == [numbers[index] for index in order]
        assert (np.diff(video.times) >= 0).all()
    for seed in range(4):
        indices = sorted(random.Random(seed).sample(range(len(numbers)), 8))
        with decoder.open(str(FIELD / name)) as video:
            assert shown(video, indices) == [numbers[index] for index in indices]


def test_frames_do_not_depend_on_the_reading_order() -> None:
    for name in NUMBERS:
        with PyAV().open(str(FIELD / name)) as video:
            frames = video.read(range(video.frames))
            for index in random.Random(1).sample(range(video.frames), 12):
                assert torch.equal(video.read([index])[0], frames[index]), (name, index)


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mp4", ".h264"])
def test_two_packets_can_be_fields_of_one_frame(tmp_path: Path, suffix: str) -> None:
    with PyAV().open(str(write_fields(tmp_path / f"fields{suffix}", 20))) as video:
        assert video.frames == 20
        assert shown(video, range(20), 8) == list(range(20))
        assert shown(video, [13], 8) == [13]


# (seconds, first frame of `src_g30.mp4`) of each entry of an edit list; None: an empty edit
EDITS = {
    "cut at both ends": [(1.0, 33)],
    "twice the same": [(0.6, 10), (0.6, 10)],
    "backwards": [(0.6, 70), (0.6, 20)],
    "delayed": [(0.4, None), (1.2, 40)],
    "with a gap": [(0.4, 5), (0.4, None), (0.4, 65)],
}


def edited(path: Path, edits: Sequence[tuple[float, int | None]]) -> Path:
    """Write `src_g30.mp4` with another edit list."""
    content = bytearray((FIELD / "src_g30.mp4").read_bytes())
    with av.open(str(FIELD / "src_g30.mp4")) as source:
        stream = source.streams.video[0]
        packet = next(source.demux(stream))
        gap, delay = packet.duration, packet.pts - packet.dts
    entries = [(round(1000 * s), -1 if first is None else delay + gap * first, 1, 0) for s, first in edits]
    body = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">iihh", *entry) for entry in entries)
    box = struct.pack(">I4sI4s", 16 + len(body), b"edts", 8 + len(body), b"elst") + body
    start = content.index(b"edts") - 4
    size = int.from_bytes(content[start : start + 4], "big")
    content[start : start + size] = box
    assert content.index(b"mdat") < content.index(b"moov"), "else frames would move"
    for name in (b"moov", b"trak"):
        place = content.index(name) - 4
        content[place : place + 4] = struct.pack(
            ">I", int.from_bytes(content[place : place + 4], "big") + len(box) - size
        )
    path.write_bytes(content)
    return path


def decoded(path: Path) -> list[int]:
    """Decode a whole file with FFmpeg; returns the numbers of its frames."""
    with av.open(str(path)) as container:
        return [read_number(frame.to_ndarray(format="rgb24"), BITS) for frame in container.decode(video=0)]


@each_decoder
@pytest.mark.parametrize("name", EDITS)
def test_edit_lists_select_the_displayed_frames(tmp_path: Path, name: str, decoder: Decoder) -> None:
    path = edited(tmp_path / "edited.mp4", EDITS[name])
    numbers = decoded(path)
    firsts = [first for _, first in EDITS[name] if first is not None]
    assert numbers[0] == firsts[0]
    assert len(numbers) >= 25 * sum(s for s, first in EDITS[name] if first is not None)
    with decoder.open(str(path)) as video:
        assert shown(video, range(video.frames)) == numbers
        for index in random.Random(0).sample(range(video.frames), 10):
            assert shown(video, [index]) == [numbers[index]]


@each_decoder
def test_times_of_a_resumed_recording_are_reset(tmp_path: Path, decoder: Decoder) -> None:
    for suffix, options in ((".ts", {}), (".mkv", {}), (".mkv", {"cluster_time_limit": "200"})):
        parts = [
            write_video(tmp_path / f"{n}{suffix}", n, options={"g": "10", "bf": "2"}, picture=later(n))
            for n in (30, 40)
        ]
        joined = tmp_path / f"joined{suffix}"
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        numbers = [*range(30, 60), *range(40, 80)]
        with decoder.open(str(joined)) as video:
            assert shown(video, range(video.frames), 8) == numbers, options
            assert shown(video, [35], 8) == [numbers[35]]
            assert video.times[-1] == pytest.approx(70 / 25, abs=0.01), "the second part follows the first"


def later(first: int) -> Any:
    return lambda number, height, width: numbered_frame(first + number, height, width)


def write_streams(path: Path, *streams: Iterator[Any], sizes: Sequence[tuple[int, int]], codecs: Sequence[str]) -> Path:
    """Write several video streams, each of numbered frames."""
    with av.open(str(path), "w") as container:
        outputs: list[Any] = []
        for codec, (height, width) in zip(codecs, sizes, strict=True):
            outputs.append(container.add_stream(codec, rate=25))
            outputs[-1].height, outputs[-1].width = height, width
            outputs[-1].pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for output, numbers in zip(outputs, streams, strict=True):
            for number in numbers:
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, output.height, output.width), format="rgb24")
                container.mux(output.encode(frame))
            container.mux(output.encode())
    return path


@each_decoder
@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".avi"])
def test_cover_picture_is_not_read(tmp_path: Path, suffix: str, decoder: Decoder) -> None:
    streams = iter([255]), iter(range(20))
    path = write_streams(
        tmp_path / f"cover{suffix}", *streams, sizes=[(240, 320), (60, 80)], codecs=["mjpeg", "libx264"]
    )
    with decoder.open(str(path)) as video:
        assert (video.height, video.width, video.frames) == (60, 80, 20)
        assert shown(video, range(20), 8) == list(range(20))


@each_decoder
def test_every_decoder_reads_the_larger_of_two_streams(tmp_path: Path, decoder: Decoder) -> None:
    streams = iter(range(20)), iter(range(100, 120))
    path = write_streams(tmp_path / "two.avi", *streams, sizes=[(60, 80), (120, 160)], codecs=["libx264"] * 2)
    with decoder.open(str(path)) as video:
        assert (video.height, video.width) == (120, 160)
        assert shown(video, [3, 17], 8) == [103, 117]


def test_lost_packets_lose_only_their_own_frames(tmp_path: Path) -> None:
    content = write_video(tmp_path / "whole.ts", 60, options={"g": "15", "bf": "2"}).read_bytes()
    middle = len(content) // 188 // 2
    path = tmp_path / "lost.ts"
    path.write_bytes(content[: 188 * middle] + content[188 * (middle + 3) :])
    with PyAV().open(str(path)) as video:
        frames = video.read(range(video.frames))
        assert 56 <= video.frames <= 60
        assert [read_number(frame) for frame in frames[:15]] == list(range(15))
        assert [read_number(frame) for frame in frames[-15:]] == list(range(45, 60))
        for index in random.Random(0).sample(range(video.frames), 12):
            assert torch.equal(video.read([index])[0], frames[index])


def test_frames_before_the_first_keyframe_are_left_out(tmp_path: Path) -> None:
    content = write_video(tmp_path / "whole.ts", 60, options={"g": "20", "bf": "2", "sc_threshold": "0"}).read_bytes()
    tables, rest = content[: 188 * 3], content[188 * (len(content) // 188 // 6) :]
    path = tmp_path / "tuned_in.ts"
    path.write_bytes(tables + rest)
    with PyAV().open(str(path)) as video:
        assert shown(video, range(video.frames), 8) == list(range(20, 60))


def test_ordinary_files_have_tables_by_time() -> None:
    """Other tables are slower: decoding starts farther away or at the beginning."""
    by_time = {
        "src_g30.mp4",
        "vfr.mp4",
        "two_same.mp4",
        "fragmented.mp4",
        "recorder_live.webm",
        "cut_g30.mp4",
        "mp4v_b.mkv",
    }
    for name in by_time | {"intra_refresh.mp4", "vp8.webm"}:
        with PyAV().open(str(FIELD / name)) as video:
            assert isinstance(video, PyAVVideo)
            assert video.table.by_time, name
    for name in ("h264_b.avi", "xvid_packed.avi"):
        with PyAV().open(str(FIELD / name)) as video:
            assert not video.table.counted, name
            assert len(video.table.starts) > 1, "decoding may start at several places"


def test_file_without_displayed_frames_raises_decode_error(tmp_path: Path) -> None:
    with pytest.raises(DecodeError, match=r"nothing\.mp4: no frame"):
        PyAV().open(str(edited(tmp_path / "nothing.mp4", [(1.0, None)])))
