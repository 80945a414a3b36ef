"""Test VideoDataset: clip requests to uint8 clips."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from videos import read_number, write_video

from mgvideo.datasets.decoders import Decord, PyAV, Video
from mgvideo.datasets.lists import video_list
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

GRID = Grid(frames=4, size=32, strides=(2, 4), scales=(40, 56))


def clip_bytes(root: str, request: ClipRequest) -> bytes:
    return video_list(root, "list.csv")[request].clip.numpy().tobytes()


def test_clip_matches_the_request(root: Path) -> None:
    dataset = video_list(str(root), "list.csv", num_classes=3)
    sample = dataset[ClipRequest(index=4, grid=GRID, seed=7)]
    assert sample.clip.shape == (4, 32, 32, 3)
    assert sample.clip.dtype == torch.uint8
    assert sample.clip.is_contiguous()
    assert (sample.label.item(), sample.label.dtype, sample.index, sample.failures) == (1, torch.int64, 4, ())
    assert (len(dataset), dataset.class_names) == (6, ["walk", "run", "jump high"])


def test_the_same_request_gives_the_same_clip_in_any_process(root: Path) -> None:
    requests = [ClipRequest(index=i, grid=GRID, seed=100 + i) for i in range(3)]
    here = [clip_bytes(str(root), request) for request in requests]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_other_processes = pool.starmap(clip_bytes, [(str(root), request) for request in requests])
    assert here == in_other_processes
    assert len(set(here)) == 3
    assert clip_bytes(str(root), ClipRequest(index=0, grid=GRID, seed=101)) != here[0]


def test_views_are_spaced_from_the_first_frame_to_the_last(root: Path) -> None:
    dataset = video_list(str(root), "list.csv")
    grid = Grid(frames=4, size=48, strides=(2, 2), scales=(48, 48))
    views = [dataset[ClipRequest(0, grid, 0, View(k, 3, crops=3))].clip for k in range(3)]
    assert [view.shape for view in views] == [(3, 4, 48, 48, 3)] * 3
    narrow = [dataset[ClipRequest(0, grid, 0, View(0, clips, crops=1))].clip[0] for clips in (1, 3)]
    assert torch.equal(narrow[1], views[0][1]), "one crop is the middle one of three"
    assert not torch.equal(narrow[0], narrow[1]), "a single clip is the middle of the video, not its start"
    whole = Grid(frames=30, size=48, strides=(1, 1), scales=(48, 48))
    assert dataset[ClipRequest(0, whole, 0, View(0, 1, 1))].clip.shape == (1, 30, 48, 48, 3)


@pytest.fixture
def broken(root: Path, tmp_path: Path) -> Path:
    """Copy the dataset, truncate its second video and delete its third."""
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    video = tmp_path / "clips/video 1.mp4"
    video.write_bytes(video.read_bytes()[:500])
    (tmp_path / "clips/video 2.mp4").unlink()
    return tmp_path


@pytest.mark.parametrize("decoder", [Decord(), PyAV()])
def test_substitute_for_a_broken_video_depends_only_on_the_seed(broken: Path, decoder: Decord | PyAV) -> None:
    dataset = video_list(str(broken), "list.csv", decoder=decoder)
    samples = [dataset[ClipRequest(2, GRID, seed)] for seed in range(8)]
    assert {sample.failures[0].reason for sample in samples} == {"No such file or directory"}
    assert {sample.failures[0].index for sample in samples} == {2}
    assert all(sample.index not in (1, 2) and sample.label == sample.index % 3 for sample in samples)
    assert len({sample.index for sample in samples}) > 1
    again = dataset[ClipRequest(2, GRID, 3)]
    assert torch.equal(again.clip, samples[3].clip)
    assert (again.index, again.failures) == (samples[3].index, samples[3].failures)


def test_view_of_a_broken_video_is_black_and_reported(broken: Path) -> None:
    sample = video_list(str(broken), "list.csv")[ClipRequest(1, GRID, 0, View(0, 1, 3))]
    assert (sample.index, sample.label.item()) == (1, 1)
    assert sample.clip.shape == (3, 4, 32, 32, 3)
    assert not sample.clip.any()
    (failure,) = sample.failures
    assert failure.path.endswith("video 1.mp4")
    assert "moov" in failure.reason or "Invalid data" in failure.reason


def test_no_readable_video_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("gone.mp4 0\n")
    with pytest.raises(UserError, match=r"10 videos in a row cannot be read.*gone\.mp4: No such file"):
        video_list(str(tmp_path), "list.csv")[ClipRequest(0, GRID, 0)]


def test_flip_mirrors_half_of_the_clips_or_none(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=1)
    (tmp_path / "list.csv").write_text("a.mp4 0\n")
    grid = Grid(frames=1, size=48, strides=(1, 1), scales=(48, 48))
    clips = {}
    for flip in (True, False):
        dataset = video_list(str(tmp_path), "list.csv", flip=flip)
        clips[flip] = [dataset[ClipRequest(0, grid, seed)].clip for seed in range(32)]
    mirrored = [not torch.equal(a, b) for a, b in zip(clips[True], clips[False], strict=True)]
    assert 6 < sum(mirrored) < 26
    assert all(
        torch.equal(a.flip(2) if m else a, b) for a, b, m in zip(clips[True], clips[False], mirrored, strict=True)
    )


def test_multi_label_dataset(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    (tmp_path / "list.csv").write_text("clips/video 0.mp4 0;2\nclips/video 1.mp4 1\n")
    dataset = video_list(str(tmp_path), "list.csv", multi_label=True)
    label = dataset[ClipRequest(0, GRID, 0)].label
    assert label.dtype == torch.float32
    assert label.tolist() == [1, 0, 1]


def test_fingerprint_depends_on_the_list_and_not_the_root(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    before = video_list(str(root), "list.csv").fingerprint()
    assert video_list(str(tmp_path), "list.csv").fingerprint() == before
    (tmp_path / "list.csv").write_text((tmp_path / "list.csv").read_text().replace("0.mp4 0", "0.mp4 1"))
    assert video_list(str(tmp_path), "list.csv").fingerprint() != before


def test_numbers_survive_resizing(root: Path) -> None:
    with PyAV().open(str(root / "clips/video 0.mp4"), 32) as video:
        assert [read_number(frame) for frame in video.read([3, 17, 29])] == [3, 17, 29]


class CountingDecoder(PyAV):
    """Counts how often a video is opened."""

    opened = 0

    def open(self, path: str, short_side: int | None = None) -> Video:
        self.opened += 1
        return super().open(path, short_side)


@pytest.mark.parametrize("crop_area", [None, (0.08, 1.0)], ids=str)
@pytest.mark.parametrize("size", [16, 32])  # frames of 80 × 60 pixels are shrunk while decoding for the smaller
def test_repeated_clips_are_decoded_once_and_the_same_as_alone(root: Path, size: int, crop_area: tuple | None) -> None:
    decoder = CountingDecoder()
    dataset = video_list(str(root), "list.csv", decoder=decoder)
    dataset.sampling = replace(dataset.sampling, crop_area=crop_area)
    grid, seeds = Grid(frames=4, size=size, strides=(1, 4), scales=(size, size + 4)), tuple(range(20, 23))
    for index in range(4):
        requests = [ClipRequest(index, grid, seed, repeats=seeds) for seed in seeds]
        before = decoder.opened
        together = dataset.load_repeats(requests)
        assert decoder.opened == before + 1
        for request, sample in zip(requests, together, strict=True):
            alone = dataset[request]
            assert torch.equal(sample.clip, alone.clip)
            assert (sample.index, sample.label) == (alone.index, alone.label)
        assert not torch.equal(together[0].clip, together[1].clip)


def test_repeated_clips_of_a_broken_video_get_the_substitutes_that_they_get_alone(broken: Path) -> None:
    dataset = video_list(str(broken), "list.csv")
    requests = [ClipRequest(2, GRID, seed, repeats=(7, 8)) for seed in (7, 8)]
    for sample, request in zip(dataset.load_repeats(requests), requests, strict=True):
        alone = dataset[request]
        assert torch.equal(sample.clip, alone.clip)
        assert (sample.index, sample.failures) == (alone.index, alone.failures)
