"""Write real videos for the tests. Every frame shows its number."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

needs_decord = pytest.mark.skipif(find_spec("decord") is None, reason="decord has no build for this CPU")
DECORD = pytest.param("decord", marks=needs_decord)
BITS = 8


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """Draw a frame `[height, width, 3]`, uint8: eight columns, dark or light as the bits of `number`.

    It gets lighter from top to bottom.
    """
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    columns = np.array(bits)[np.arange(width) * BITS // width]
    rows = np.linspace(0, 60, height)[:, None]
    return np.stack([40 + 130 * columns + rows, 60 + 110 * columns + rows / 2, 60 + 90 * columns + rows], -1).astype(
        np.uint8
    )


def read_number(frame: Any, bits: int = BITS) -> int:
    """Read the number that a frame `[h, w, 3]` of any size shows."""
    picture = np.asarray(frame).astype(float).mean((0, 2))
    middles = (np.arange(bits) + 0.5) * len(picture) / bits
    return int(sum(1 << bit for bit, x in enumerate(middles.astype(int)) if picture[x] > 120))


def write_video(
    path: Path,
    frames: int = 40,
    height: int = 60,
    width: int = 80,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Callable[[int], int] = lambda number: number,
    fps: int = 25,
    colours: dict[str, int] | None = None,
    picture: Callable[[int, int, int], np.ndarray] = numbered_frame,
) -> Path:
    """Write a video of frames `picture(number, height, width)`.

    `times` returns the display time of a frame in units of 1 / fps. `colours` are the `colorspace`, `color_range`,
    `color_primaries` and `color_trc` of the stored frames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, fps)
        for field, value in (colours or {}).items():
            setattr(stream.codec_context, field, value)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            if colours:
                space, span = colours.get("colorspace"), colours.get("color_range")
                frame = frame.reformat(format=pix_fmt, dst_colorspace=space, dst_color_range=span)
            frame.pts, frame.time_base = times(number), Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
        # As root, this encoder gives the calling thread real-time priority, which starves all other processes.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return path


def write_rotated(path: Path, **options: Any) -> Path:
    """Write a video of numbered frames whose metadata rotate it by 90 degrees."""
    with (
        av.open(str(write_video(path.with_suffix(".upright.mp4"), **options))) as source,
        av.open(str(path), "w") as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return path


# unusual but valid videos: arguments of `write_video`
FILES: dict[str, dict[str, Any]] = {
    "plain": {"options": {"g": "12"}},
    "b-frames": {"options": {"g": "250", "bf": "3", "b_strategy": "0"}},
    "open gop": {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"}},
    "all keyframes": {"options": {"g": "1"}},
    "no b-frames": {"options": {"g": "8", "bf": "0", "tune": "fastdecode"}},
    "variable frame rate": {"times": lambda i: i + 2 * (i // 7) + (i > 20) * 13},
    "late start": {"times": lambda i: i + 37},
    "odd size": {"height": 61, "width": 83, "pix_fmt": "yuv444p"},
    "4:4:4": {"pix_fmt": "yuv444p"},
    "10 bit": {"pix_fmt": "yuv420p10le"},
    "one frame": {"frames": 1},
    "mpeg-4": {"codec": "mpeg4", "options": {"g": "10", "qscale": "2", "flags": "qscale"}},
    "avi.avi": {"codec": "mpeg4", "options": {"g": "10"}},
    "h.265": {"codec": "libx265", "options": {"g": "12", "x265-params": "log-level=none"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "2", "flags": "qscale"}},
    "h264.avi": {"options": {"g": "12", "bf": "3", "b_strategy": "0"}},
    "msmpeg4.avi": {"codec": "msmpeg4", "options": {"g": "12", "qscale": "2", "flags": "qscale"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "raw.h264": {"options": {"g": "12", "bf": "3", "b_strategy": "0"}},
    "vp8.ivf": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "200k"}},
    "mpeg-2.mpg": {"codec": "mpeg2video", "options": {"g": "12", "bf": "2", "qscale": "2", "flags": "qscale"}},
    "mpeg-1.m1v": {"codec": "mpeg1video", "options": {"g": "12", "bf": "2", "qscale": "2", "flags": "qscale"}},
    "refresh.mkv": {"options": {"x264-params": "intra-refresh=1:keyint=10:bframes=0"}},
    "interlaced.ts": {"options": {"g": "12", "x264-params": "tff=1"}},
    "stream.ts": {"options": {"bf": "3", "g": "250"}},
    "av1": {"codec": "libsvtav1", "options": {"preset": "12", "g": "10", "svtav1-params": "lp=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mkv.mkv": {"options": {"g": "12"}},
    "large": {"height": 202, "width": 310},
    "spaces and ünïcode 視頻": {},
}


def write_odd_files(folder: Path) -> dict[str, Path]:
    """Write the videos of `FILES` into a folder; return their paths by name."""
    names = {name: name if "." in name and name != "h.265" else f"{name}.mp4" for name in FILES}
    return {name: write_video(folder / names[name], **options) for name, options in FILES.items()}


def create_bad_files(folder: Path) -> dict[str, Path]:
    """Create paths without a readable video in a folder; return them by name."""
    whole = write_video(folder / "whole.mp4", options={"g": "12"}).read_bytes()
    paths = {name: folder / f"{name}.mp4" for name in ("empty", "text", "truncated", "no moov", "audio only", "loop")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("not a video\n" * 100)
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["no moov"].write_bytes(whole[: whole.index(b"moov") - 4])
    with av.open(str(paths["audio only"]), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    paths["loop"].symlink_to(paths["loop"])
    paths |= {name: folder / f"{name}.mp4" for name in ("missing", "directory", "pipe")}
    paths["directory"].mkdir()
    os.mkfifo(paths["pipe"])
    return paths
