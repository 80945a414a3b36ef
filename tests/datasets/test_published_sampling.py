"""Test the published sampling protocol: the frames and crops of PySlowFast, read from a dataset."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from videos import numbered_frame, read_number, write_video

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.frames import FrameFolders
from mgvideo.datasets.sampling import Sampling, draw_clip, scaled_crops
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.datasets.videofile import Box, Video, frame_rate
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("data/sampling.json").read_text())
PUBLISHED = Sampling(flip=False, protocol="published", target_fps=30, antialias=False)


@dataclass
class Pictures(Video):
    """A video of given frames, uint8 `[frames, h, w, 3]`, with display times; it is its own decoder."""

    pictures: Tensor
    times: np.ndarray
    path = "pictures"

    def __post_init__(self) -> None:
        self.frames, self.height, self.width = self.pictures.shape[:3]

    def open(self, path: str, short_side: int | None = None) -> Video:
        return self

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        return box.crop(self.pictures[torch.from_numpy(indices)])


def counting(frames: int, fps: float) -> Pictures:
    """Frames of 2 × 2 pixels that show their number as a colour."""
    numbers = torch.stack([torch.arange(frames) // 256, torch.arange(frames) % 256, torch.zeros(frames)], -1)
    return Pictures(numbers.to(torch.uint8)[:, None, None].expand(-1, 2, 2, -1), np.arange(frames + 1) / fps)


def dataset(decoder: Any, sampling: Sampling = PUBLISHED, **entry: Any) -> VideoDataset:
    return VideoDataset("", [VideoEntry(entry.pop("path", "video"), 0, **entry)], ["class"], decoder, sampling)


def numbers(videos: VideoDataset, grid: Grid, seed: int = 0, view: View | None = None) -> list[int]:
    clip = videos[ClipRequest(0, grid, seed, view)].clip
    pixels = clip.reshape(-1, *clip.shape[-4:])[0, :, 0, 0].long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def grid_of(frames: int, stride: int, size: int = 2) -> Grid:
    return Grid(frames, size, (stride, stride), (size, size))


@pytest.mark.parametrize("case", GOLDEN["temporal"], ids=lambda c: f"{c['frames_in_video']}@{c['fps']}")
def test_test_clips_have_the_frames_of_the_reference(case: dict[str, Any]) -> None:
    videos = dataset(counting(case["frames_in_video"], case["fps"]), replace(PUBLISHED, target_fps=case["target_fps"]))
    grid, clips = grid_of(case["num_frames"], case["frame_stride"]), case["num_clips"]
    assert [numbers(videos, grid, view=View(k, clips, 1)) for k in range(clips)] == case["indices"]


@pytest.mark.parametrize(("rate", "suffix"), [("24000/1001", "mp4"), ("15", "mkv"), ("30", "mkv"), ("60", "mp4")])
def test_real_files_have_the_frames_of_the_reference(tmp_path: Path, rate: str, suffix: str) -> None:
    """The times that a container rounds give the exact rate."""
    fps = Fraction(rate)
    path = write_video(tmp_path / f"a.{suffix}", 200, 16, 64, times=lambda i: round(i * 90_000 / fps), fps=90_000)
    with PyAV().open(str(path)) as video:
        assert video.rate == pytest.approx(float(fps), rel=1e-12)
        start = max(200 - 32 * fps / 30, 0) * Fraction(3, 10)
        expected = [int(start + i * (32 * fps / 30 - 1) / 7) for i in range(8)]
        frames = video.read(expected)
    assert [read_number(frame) for frame in frames] == expected
    clip = dataset(PyAV(), path=str(path))[ClipRequest(0, grid_of(8, 4, 16), 0, View(3, 10, 1))].clip
    assert torch.equal(clip[0], frames[:, :, 24:40])


def test_training_clips_start_anywhere_and_keep_their_duration() -> None:
    videos = dataset(counting(240, 60))
    clips = [numbers(videos, Grid(8, 2, (2, 4), (2, 2)), seed) for seed in range(1500)]
    spans = {clip[-1] - clip[0] for clip in clips}
    assert {span // 10 for span in spans} == {(stride * 8 * 2 - 1) // 10 for stride in (2, 3, 4)}, spans
    assert {clip[0] for clip in clips} > set(range(175)), "of 240 frames, the longest clip spans 64"
    assert max(clip[-1] for clip in clips) in (238, 239)


def test_uneven_frames_are_chosen_by_their_times() -> None:
    """Every second frame of the first half is missing."""
    seconds = np.concatenate([np.arange(0, 100, 2), np.arange(100, 201)]) / 25
    video = counting(len(seconds) - 1, 25)
    video.times = seconds
    assert video.rate is None
    shown = [
        numbers(dataset(video, replace(PUBLISHED, target_fps=25)), grid_of(9, 4), view=View(k, 2, 1)) for k in (0, 1)
    ]
    for clip, start in zip(shown, (0, 82), strict=True):
        gaps = np.diff(seconds[clip])
        assert abs(seconds[clip][0] * 25 - start) <= 2
        assert np.all(np.abs(gaps - 4 / 25) <= 2.1 / 25), gaps
    regular = replace(PUBLISHED, protocol="regular", target_fps=25)
    assert numbers(dataset(video, regular), grid_of(4, 8), view=View(0, 2, 1)) == [0, 4, 8, 12]


def test_regular_protocol_counts_frames_at_the_target_rate() -> None:
    regular = replace(PUBLISHED, protocol="regular")
    views = [View(0, 2, 1), View(1, 2, 1)]
    assert [numbers(dataset(counting(100, 60), regular), grid_of(4, 3), view=view) for view in views] == [
        [0, 6, 12, 18],
        [81, 87, 93, 99],
    ]
    assert numbers(dataset(counting(100, 20), regular), grid_of(4, 2), view=views[0]) == [0, 1, 2, 4]
    assert numbers(
        dataset(counting(100, 60), replace(regular, target_fps=None)), grid_of(4, 3), view=View(0, 1, 1)
    ) == [
        45,
        48,
        51,
        54,
    ]


def test_folders_of_frames_are_counted(tmp_path: Path) -> None:
    """As in PySlowFast, whatever its target rate: whole strides, test clip k of K at k / (K - 1)."""
    for i in range(30):
        Image.fromarray(numbered_frame(i, 16, 16)).save(tmp_path / f"{i:03d}.png")
    for sampling, expected in ((PUBLISHED, [21, 23, 25, 27, 29]), (replace(PUBLISHED, target_fps=None), None)):
        clip = dataset(FrameFolders(24), sampling, path=str(tmp_path))[
            ClipRequest(0, grid_of(5, 2, 16), 0, View(9, 10, 1))
        ].clip[0]
        assert [read_number(frame) for frame in clip] == (expected or [21, 23, 25, 27, 29])


def test_spans_are_sampled_at_the_target_rate() -> None:
    video = counting(600, 60)
    videos = dataset(video, span=(2.0, 4.0))
    assert numbers(videos, grid_of(4, 5), view=View(0, 2, 1)) == [120, 133, 146, 159]
    assert numbers(videos, grid_of(4, 5), view=View(1, 2, 1)) == [160, 173, 186, 199]


@pytest.mark.parametrize(("exact", "times"), [(True, np.arange(301)), (False, np.round(np.arange(301) * 1000 / 29.97))])
def test_rate_is_exact_despite_rounding(exact: bool, times: np.ndarray) -> None:
    if exact:
        for fps in (Fraction(24000, 1001), Fraction(30000, 1001), Fraction(25), Fraction(60), Fraction(25, 2)):
            assert frame_rate(times / float(fps)) == pytest.approx(float(fps), rel=1e-12)
        assert frame_rate(np.zeros(4)) is None
        assert frame_rate(np.cumsum(np.where(times % 100 < 50, 1, 3)) / 30) is None
    else:
        assert frame_rate(times / 1000) == pytest.approx(30000 / 1001, rel=1e-12)


def noise(height: int, width: int, frames: int = 2) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8))


def scaled(frames: Tensor, size: list[int]) -> Tensor:
    """Resize whole frames as the reference does: float, bilinear, without antialiasing."""
    return interpolate(frames.permute(0, 3, 1, 2).float(), size, mode="bilinear").permute(0, 2, 3, 1)


@pytest.mark.parametrize("case", GOLDEN["spatial"], ids=lambda c: f"{c['height']}x{c['width']}-{c['size']}")
def test_test_crops_have_the_pixels_of_the_reference(case: dict[str, Any]) -> None:
    """Where a crop does not need the whole frame, less of it is resized; the pixels differ by rounding."""
    size, frames = case["size"], noise(case["height"], case["width"])
    grid, videos = grid_of(2, 1, size), dataset(Pictures(frames, np.arange(3.0) / 30))
    expected = [scaled(frames, case["resized"])[:, y : y + size, x : x + size] for y, x in case["offsets"]]
    clips = videos[ClipRequest(0, grid, 0, View(0, 1, 3))].clip
    assert (clips - torch.stack(expected)).abs().max() < 1.5
    (centre,) = videos[ClipRequest(0, grid, 0, View(0, 1, 1))].clip
    assert (centre - expected[1]).abs().max() < 1.5


@pytest.mark.parametrize(("height", "width"), [(64, 85), (86, 64), (70, 70)])
def test_training_crops_have_the_pixels_of_the_scaled_frame(height: int, width: int) -> None:
    """A crop starts at a pixel of the frame, in a frame scaled by 2 at every second pixel, and no more is resized."""
    frames, short = noise(height, width), min(height, width)
    whole = scaled(frames, [2 * height, 2 * width])
    grid, corners = Grid(2, 96, (1, 1), (2 * short, 2 * short)), set()
    for seed in range(40):
        request = ClipRequest(0, grid, seed)
        box = scaled_crops(request, draw_clip(request, PUBLISHED), height, width).box
        clip = dataset(Pictures(frames, np.arange(3.0) / 30))[request].clip
        assert clip.is_contiguous()
        expected = whole[:, 2 * box.top :, 2 * box.left :][:, :96, :96]
        assert (clip - expected)[:, 1:, 1:].abs().max() < 1.5, "the first row and column have no neighbour"
        assert max(box.height, box.width) <= 96 // 2 + 1
        corners.add((box.top, box.left))
    tops, lefts = zip(*corners, strict=True)
    assert max(min(tops), min(lefts)) < 3
    assert min(max(tops) - height, max(lefts) - width) > -53


def test_every_short_side_gives_a_whole_crop() -> None:
    videos = dataset(Pictures(noise(97, 131, 1), np.arange(2.0) / 30))
    for side in range(97, 131, 3):
        for seed in range(5):
            clip = videos[ClipRequest(0, Grid(1, 96, (1, 1), (side, side)), seed)].clip
            assert clip.shape == (1, 96, 96, 3)
        clip = videos[ClipRequest(0, Grid(1, 96, (1, 1), (side, side)), 0, View(0, 1, 3))].clip
        assert clip.shape == (3, 1, 96, 96, 3)
