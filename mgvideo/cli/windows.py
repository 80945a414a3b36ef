"""Sliding windows over videos: which seconds each covers, by the times at which a player shows the frames."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import floor

from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.datasets.videofile import TIME_ROUNDING_S

from .predictor import Predictor, Span


def cut_into_windows(first: float, end: float, length: float, step: float) -> list[Span]:
    """Return the windows of a video that is shown from second `first` to second `end`.

    Windows start every `step` seconds and are `length` seconds long. If the last of them ends before the video does,
    one more window ends with the video. A video that is shorter than a window is one window.
    """
    count = floor((end - first - length + TIME_ROUNDING_S) / step) + 1
    if count < 1:
        return [(first, end)]
    windows = [(first + k * step, first + k * step + length) for k in range(count)]
    next_start = first + count * step
    if windows[-1][1] < end - TIME_ROUNDING_S and next_start < end - TIME_ROUNDING_S:
        windows.append((end - length, end))
    return windows


def find_windows(
    predictor: Predictor, paths: Sequence[str], length: float, step: float
) -> tuple[dict[str, list[Span]], dict[str, str]]:
    """Return the windows of each video, by path; and by path the reason why a video cannot be read.

    Prints a note for each video in which a clip is longer than a window.
    """
    windows: dict[str, list[Span]] = {}
    reasons: dict[str, str] = {}
    grid = predictor.views.grid
    clip_frames = 1 if predictor.samples_segments else (grid.frames - 1) * grid.strides[0] + 1
    for path in paths:
        try:
            with PyAV().open(path) as video:
                first, end = float(video.times[0]), float(video.times[-1])
                clip_s = clip_frames * (end - first) / video.frames
        except DecodeError as error:
            reasons[path] = error.reason
            continue
        windows[path] = cut_into_windows(first, end, length, step)
        if clip_s > length + TIME_ROUNDING_S:
            print(
                f"note: {path}: a clip lasts {clip_s:.2f} s, longer than window={length:g}, so it repeats a frame; "
                f"set window={clip_s:.2f} or more, or a smaller base.frame_stride",
                file=sys.stderr,
            )
    return windows, reasons
