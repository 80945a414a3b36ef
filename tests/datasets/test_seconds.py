"""Test seconds in tables and labels: they are a player's times at every frame rate."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fields import BITS, FIELD, NUMBERS
from test_decoders import DECODERS, NAMES
from videos import numbered_frame, read_number

from mgvideo.datasets.charades import charades
from mgvideo.datasets.decoders import Decoder, PyAV
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.frame_cache import FrameCache
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

# of tables, and the first and last frame that they name
STRETCHES = [
    ("vfr.mp4", 0, 2, 0, 19),
    ("vfr.mp4", 2, 4, 20, 99),
    ("vfr.mp4", 0.55, 1.05, 5, 10),
    ("src_g30.mp4", 0.28, 1.16, 7, 28),
    ("src_g30.mp4", 3.96, 4, 99, 99),
    ("cut_g30.mp4", 0, 1, 13, 37),
    ("h264_b.avi", 1, 2, 25, 49),
    ("xvid_small.avi", 1.2, 2.4, 28, 57),
    ("cat.ts", 2.2, 3, 55, 74),
]


def numbers(root: Path, path: Path, start: float, end: float, decoder: Decoder, frames: int) -> list[int]:
    """Read a clip of a span, listed in a table with one line; returns the numbers that its frames show."""
    for name in ("train", "val"):
        (root / f"{name}.csv").write_text(f"path,label,start,end\n{path},a,{start},{end}\n{path},b,{start},{end}\n")
    dataset = video_folder(str(root), "train", decoder=decoder)
    sample = dataset[ClipRequest(0, Grid(frames, 72, (1, 1), (72, 72)), 0, View(0, 1, 3))]
    assert not sample.failures
    left, middle, right = sample.clip  # the frame's 192 columns, some twice
    return [read_number(frame, BITS) for frame in torch.cat([left[:, :, :60], middle[:, :, :60], right], 2)]


@pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)
@pytest.mark.parametrize(("name", "start", "end", "first", "last"), STRETCHES)
def test_span_has_the_frames_displayed_in_it(
    tmp_path: Path, decoder: Decoder, name: str, start: float, end: float, first: int, last: int
) -> None:
    shown = numbers(tmp_path, FIELD / name, start, end, decoder, last - first + 2)
    assert shown == [*range(first, last + 1), last], "where it is too short its last frame is repeated"


def test_span_near_the_end_of_a_recording_is_read(tmp_path: Path) -> None:
    """The header, written by a browser, gives 30 frames a second; the file has 26."""
    with PyAV().open(str(FIELD / "recorder_live.webm")) as video:
        late = float(video.times[-1]) - 0.2
    assert late > 100 / 30
    shown = numbers(tmp_path, FIELD / "recorder_live.webm", late, late + 1, PyAV(), 3)
    assert all(number in NUMBERS["recorder_live.webm"][-8:] for number in shown)


@pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)
def test_pyramid_levels_and_cached_frames_keep_their_times(tmp_path: Path, decoder: Decoder) -> None:
    names = [
        "vfr.mp4",
        "cut_g30.mp4",
        "h264_b.avi",
        "cat.ts",
        "dup.mkv",
        "recorder_live.webm",
        "two_same.mp4",
        "vp8.webm",
    ]
    folder = str(tmp_path / "pyramid")
    rows = encode_pyramid(folder, str(FIELD), names, PyramidLayout((36,), 36), processes=1)
    assert [row.failure for row in rows] == [""] * len(names)
    pyramid, cache = Pyramid(folder, str(FIELD), decoder), FrameCache(str(tmp_path / "cached"), decoder, 1)
    for name in names:
        path = str(FIELD / name)
        with PyAV().open(path) as video, pyramid.open(path, 36) as level, cache.open(path) as cached:
            assert level.path != path
            assert level.times == pytest.approx(video.times, abs=0.002), name
            assert np.array_equal(cached.times, video.times)
            shown = [read_number(frame, BITS) for frame in level.read(range(level.frames))]
        assert shown == NUMBERS[name]


def write_with_sound(path: Path, delay: float, frames: int = 20) -> Path:
    """Write a video that begins `delay` seconds after its sound."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 80, 60, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound: Any = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(32):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = 16000, 1024 * number, Fraction(1, 16000)
            container.mux(sound.encode(samples))
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, 60, 80), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (delay + number / 10)), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_seconds_count_from_the_start_of_the_audio(tmp_path: Path, suffix: str) -> None:
    for delay in (0.0, 0.7):
        with PyAV().open(str(write_with_sound(tmp_path / f"a{suffix}", delay))) as video:
            # encoder priming before time 0 is not played, except in MPEG-TS
            assert video.times[0] == pytest.approx(delay, abs=0.08 if suffix == ".ts" else 0.002)
            assert video.times[-1] - video.times[0] == pytest.approx(2, abs=0.002)


def test_charades_actions_match_the_seconds_of_a_clip(tmp_path: Path) -> None:
    (tmp_path / "Charades_v1_480").mkdir()
    (tmp_path / "Charades_v1_480/A.mp4").symlink_to(FIELD / "vfr.mp4")
    # the first half of the video's duration has a fifth of its frames
    (tmp_path / "train.csv").write_text("id,actions\nA,c001 0.0 1.95;c002 2.0 4.0\n")
    dataset = charades(str(tmp_path), "train.csv", decoder=PyAV())
    labels = {}
    for seed in range(40):
        request = ClipRequest(0, Grid(4, 64, (2, 2), (72, 72)), seed)
        sample = dataset[request]
        labels[seed] = tuple(sample.label.nonzero().flatten().tolist())
    assert set(labels.values()) >= {(1,), (2,)}
    counts = [list(labels.values()).count(label) for label in ((1,), (2,))]
    assert counts[1] > counts[0], "most starts are in the second half of the time"
