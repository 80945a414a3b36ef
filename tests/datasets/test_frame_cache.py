"""Test the frame cache: same pixels, decoded once, within the size limit."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from fields import FIELD
from training import KNOBS

from mgvideo.datasets.decoders import DecodeError, PyAV
from mgvideo.datasets.frame_cache import FrameCache
from mgvideo.datasets.motion import motion
from mgvideo.datasets.videofile import Video
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

GRID = Grid(4, 24, (1, 3), (28, 40))


class Counting(PyAV):
    """A PyAV decoder that records the files that it opens."""

    opened = 0

    def open(self, path: str, short_side: int | None = None) -> Video:
        self.opened += 1
        return super().open(path, short_side)


def test_clips_are_the_same_and_each_file_is_decoded_once(tmp_path: Path, motion_root: str) -> None:
    plain, counting = motion(motion_root, KNOBS, "train", PyAV()), Counting()
    cached = motion(motion_root, KNOBS, "train", FrameCache(str(tmp_path / "cached"), counting, 1))
    requests = [ClipRequest(i % 3, GRID, seed) for i, seed in enumerate(range(12))]
    requests += [ClipRequest(i, GRID, 0, View(1, 2, 3)) for i in range(3)]
    for request in requests:
        ours, theirs = cached[request], plain[request]
        assert ours.clip.equal(theirs.clip)
        assert ours.label.equal(theirs.label)
    assert counting.opened == 3


def test_times_are_cached(tmp_path: Path) -> None:
    cache, path = FrameCache(str(tmp_path), PyAV(), 1), str(FIELD / "vfr.mp4")
    with PyAV().open(path) as video:
        times = video.times
    for _ in range(2):
        with cache.open(path) as cached:
            assert np.array_equal(cached.times, times)
            assert cached.read([3]).shape == (1, 72, 192, 3)


def test_replaced_file_is_decoded_again(tmp_path: Path, motion_root: str) -> None:
    dataset, counting = motion(motion_root, KNOBS, "train", PyAV()), Counting()
    cache, video = FrameCache(str(tmp_path / "cached"), counting, 1), tmp_path / "video.mp4"
    frames = []
    for index in range(2):
        shutil.copyfile(dataset.path(index), video)
        os.utime(video, (index, index))
        with cache.open(str(video)) as opened:
            frames.append(opened.read(np.arange(4)))
    assert counting.opened == 2
    assert not frames[0].equal(frames[1])


def test_videos_that_do_not_fit_are_decoded_each_time(tmp_path: Path, motion_root: str) -> None:
    counting = Counting()
    one = KNOBS.frames * KNOBS.height * KNOBS.width * 3
    dataset = motion(motion_root, KNOBS, "train", FrameCache(str(tmp_path / "cached"), counting, 1.5 * one / 2**30))
    plain = motion(motion_root, KNOBS, "train", PyAV())
    for _ in range(2):
        for index in (0, 1):
            request = ClipRequest(index, GRID, 5)
            assert dataset[request].clip.equal(plain[request].clip)
    assert counting.opened == 3, "the first once, the second twice"
    assert sum(path.stat().st_size for path in (tmp_path / "cached").iterdir()) < 1.5 * one


def test_bad_files_and_folders_raise_errors(tmp_path: Path) -> None:
    cache = FrameCache(str(tmp_path / "cached"), PyAV(), 1)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(DecodeError, match=name):
            cache.open(str(tmp_path / name))
    assert not list((tmp_path / "cached").iterdir())
    with pytest.raises(UserError, match=r"dataset\.frame_cache"):
        FrameCache(str(tmp_path / "text.mp4" / "cached"), PyAV(), 1)


def test_incomplete_cache_files_are_decoded_again(tmp_path: Path, motion_root: str) -> None:
    dataset, counting = motion(motion_root, KNOBS, "train", PyAV()), Counting()
    cache = FrameCache(str(tmp_path / "cached"), counting, 1)
    frames = []
    for length in (None, 1000, 7, 0):
        for cached in (tmp_path / "cached").iterdir():
            os.truncate(cached, length or 0)
        with cache.open(dataset.path(0)) as video:
            frames.append(video.read(np.arange(4)))
    assert counting.opened == 4
    assert all(each.equal(frames[0]) for each in frames)


def test_unfinished_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    for name, age in (("tmpold", 7200), ("tmpnew", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    FrameCache(str(tmp_path), PyAV(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["tmpnew"], "which another process may be writing"
