"""Copies of videos with labels and heat maps drawn in."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from videos import write_rotated

from mgvideo.cli.overlay import HeatMaps, annotate_video, blend_heat, choose_output_paths, render_label
from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.errors import UserError

TIMES = [0, 1, 2, 4, 5, 9, 10, 11, 12, 20]


def write_grey(path: Path, height: int = 75, width: int = 101) -> Path:
    """Write a grey video of odd size with uneven timestamps."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.codec_context.time_base = Fraction(1, 25)
        for time in TIMES:
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 128, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def timestamps(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [round(float(frame.time), 3) for frame in container.decode(video=0)]


def test_size_and_timestamps_are_kept_and_only_the_label_is_drawn(tmp_path: Path) -> None:
    source, target = write_grey(tmp_path / "grey.mp4"), tmp_path / "drawn.mp4"
    annotate_video(str(source), target, ["0.93 juggling", "0.02 cartwheeling"])
    assert timestamps(target) == timestamps(source) == [time / 25 for time in TIMES]
    with PyAV().open(str(target)) as video:
        assert (video.height, video.width, video.frames) == (75, 101, len(TIMES))
        frames = video.read(range(video.frames)).int()
    with av.open(str(target)) as container:
        assert next(container.decode(video=0)).colorspace == 6, "the colour space is tagged for players"
    h, w = render_label(["0.93 juggling", "0.02 cartwheeling"], 75, 101).shape[:2]
    assert (frames[:, :h, :w].amax((1, 2, 3)) > 200).all(), "text is light in every frame"
    assert (frames[:, :h, :w].amin((1, 2, 3)) < 80).all(), "its background is dark"
    assert (frames[:, h + 3 :] - 128).abs().max() < 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.mp4", "grey.mp4"]


def test_a_rotated_video_is_written_upright(tmp_path: Path) -> None:
    source, target = write_rotated(tmp_path / "turned.mp4", frames=5), tmp_path / "drawn.mp4"
    annotate_video(str(source), target, ["x"])
    with PyAV().open(str(source)) as video, PyAV().open(str(target)) as drawn:
        assert not video.orientation.upright
        assert drawn.orientation.upright
        assert (drawn.height, drawn.width) == (video.height, video.width)
        below = slice(video.height // 2, None)
        off = drawn.read([3]).int()[:, below] - video.read([3]).int()[:, below]
    assert off.abs().float().mean() < 6


def test_heat_is_drawn_at_the_position_and_time_of_the_map(tmp_path: Path) -> None:
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 1, 1, 1] = 1
    source, target = write_grey(tmp_path / "grey.mp4"), tmp_path / "drawn.mp4"
    annotate_video(str(source), target, ["x"], HeatMaps(maps, [0], 10, 10))
    with PyAV().open(str(target)) as video:
        frames = video.read(range(video.frames)).float()
    changed = (frames - 128).abs().sum(-1)
    assert changed[-1, 60:, 85:].mean() > 60
    assert changed[-1, 40:, :30].mean() < 12
    assert changed[0, 60:, 85:].mean() < 12


def test_heat_is_interpolated_within_a_window_and_not_across_windows() -> None:
    maps = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(2, 2, 1, 1)
    heat = HeatMaps(maps, [0, 4], 8, 12)  # the windows overlap; each is used for half of the frames
    values = [heat.map_at(number).item() for number in range(12)]
    assert values[:2] == [0, 0]
    assert values[2:6] == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert values[6:] == [0.5] * 6


def test_the_frame_stays_visible_where_the_heat_is_1() -> None:
    dark, light = (blend_heat(np.full((8, 8, 3), value, np.uint8), torch.ones(2, 2)) for value in (0, 255))
    assert (light > dark).all()


def test_labels_fit_into_the_frame() -> None:
    for height, width in [(16, 16), (48, 64), (240, 320), (1080, 1920)]:
        patch = render_label(["0.99 a very long name of a class indeed"] * 5, height, width)
        assert patch.shape[0] <= height
        assert patch.shape[1] <= width
    small, large = (render_label([name], 240, 320).shape for name in ("0.99 a very long name of a class", "0.99 run"))
    assert small[0] <= large[0]


def test_outputs_do_not_overwrite_each_other_or_the_videos(tmp_path: Path) -> None:
    videos = {"a/x.avi": "x.avi", "b/x.mp4": "x.mp4", "c/sub/y.webm": "sub/y.webm"}
    targets = choose_output_paths(videos, tmp_path / "out")
    assert list(targets.values()) == [tmp_path / "out" / name for name in ("x.mp4", "x_2.mp4", "sub/y.mp4")]
    assert (tmp_path / "out/sub").is_dir()
    (tmp_path / "out/x.mp4").touch()
    with pytest.raises(UserError, match="is one of the videos"):
        choose_output_paths({str(tmp_path / "out/x.mp4"): "x.mp4"}, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write out="):
        choose_output_paths(videos, tmp_path / "file")


def test_an_unreadable_file_leaves_no_output(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").touch()
    with pytest.raises(DecodeError, match="empty file"):
        annotate_video(str(tmp_path / "bad.mp4"), tmp_path / "out.mp4", ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.mp4"]


def write_repeated_times(path: Path) -> Path:
    """Write a video whose last frames share one timestamp, as in resumed recordings."""
    with av.open(str(write_grey(path.with_suffix(".mp4"), 48, 64))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                packet.pts = min(packet.pts, packet.time_base.denominator // 25 * 3)
                packet.dts = min(packet.dts, packet.pts)
                target.mux(packet)
    return path


def test_frames_with_repeated_timestamps_are_kept(tmp_path: Path) -> None:
    source, target = write_repeated_times(tmp_path / "source.mkv"), tmp_path / "drawn.mp4"
    annotate_video(str(source), target, ["x"])
    with PyAV().open(str(source)) as video, PyAV().open(str(target)) as drawn:
        assert drawn.frames == video.frames


def test_errors_name_the_unreadable_source_or_the_unwritable_target(tmp_path: Path) -> None:
    source = write_grey(tmp_path / "grey.mp4")
    with pytest.raises(OSError, match="No such file"):
        annotate_video(str(source), tmp_path / "gone/drawn.mp4", ["x"])
    (tmp_path / "drawn.mp4").mkdir()
    with pytest.raises(IsADirectoryError):
        annotate_video(str(source), tmp_path / "drawn.mp4", ["x"])
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DecodeError, match=r"text\.mp4: Invalid data"):
        annotate_video(str(tmp_path / "text.mp4"), tmp_path / "gone/drawn.mp4", ["x"])
