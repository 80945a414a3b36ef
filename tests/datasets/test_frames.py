"""Folders of images are videos in every kind of list, and never where a folder also has videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from videos import numbered_frame, read_number, write_video

from mgvideo.datasets.check import check
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.frames import FrameFolders
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.ssv2 import ssv2
from mgvideo.datasets.video import VideoDataset
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

DECODER = FrameFolders(10, PyAV())
FRAMES = "original_vido_id video_id frame_id path labels\n"


def write_frames(folder: Path, count: int = 9) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(numbered_frame(number, 60, 60)).save(folder / f"{number:05d}.png")


def shown(dataset: VideoDataset, index: int) -> list[int]:
    """Return the numbers that the middle clip of three frames shows."""
    sample = dataset[ClipRequest(index, Grid(3, 60, (1, 1), (60, 60)), 0, View(0, 1, 1))]
    assert not sample.failures
    return [read_number(frame) for frame in sample.clip[0]]


def test_class_folders_of_frame_folders(tmp_path: Path) -> None:
    for name in ("run/a", "run/b", "walk/deep/c", "walk/d"):
        write_frames(tmp_path / name)
    write_video(tmp_path / "sit/e.mp4", frames=9, width=60)
    write_video(tmp_path / "sit/f.mp4", frames=9, width=60)
    write_frames(tmp_path / "sit/e")  # the frames of e.mp4, extracted
    dataset = video_folder(str(tmp_path), "train", decoder=DECODER)
    paths = [dataset.entry(i).path for i in range(len(dataset))]
    assert {path.partition("/")[0] for path in paths} == {"run", "walk", "sit"}
    assert "sit/e" not in paths
    assert all(shown(dataset, i) == [3, 4, 5] for i in range(len(dataset)))
    assert any("skipped files without a video extension: 9 .png" in note for note in dataset.notes)


def test_spans_count_seconds_at_the_given_rate(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", 30)
    (tmp_path / "train.csv").write_text("path,label,start,end\na,x,1.0,1.3\na,y,2,\n")
    dataset = video_folder(str(tmp_path), "train", decoder=DECODER)
    assert shown(dataset, 0) == [10, 11, 12]


@pytest.mark.parametrize(
    "text",
    ["a/v1 9 0\nb 9 1\n", "a/v1 0\nb 1\n", f'{FRAMES}x 0 0 a/v1/00000.png "0"\nx 0 1 a/v1/1.png ""\ny 1 0 b/0.png 1\n'],
    ids=["mmaction", "plain", "pyslowfast"],
)
def test_lists_of_frame_folders(tmp_path: Path, text: str) -> None:
    write_frames(tmp_path / "a/v1")
    write_frames(tmp_path / "b")
    (tmp_path / "list.csv").write_text(text)
    dataset = video_list(str(tmp_path), "list.csv", decoder=DECODER)
    assert [dataset.entry(i).path for i in range(2)] == ["a/v1", "b"]
    assert dataset.labels.tolist() == [0, 1]
    assert shown(dataset, 0) == shown(dataset, 1) == [3, 4, 5]
    (tmp_path / "train.csv").write_text(text)
    if text.startswith(FRAMES):
        assert video_folder(str(tmp_path), "train", decoder=DECODER).class_names == ["0", "1"]


def test_counts_after_paths_are_refused_unless_they_are_frame_folders(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a/v1 9 0\n")
    with pytest.raises(UserError, match=r"list\.csv:1: .*several numbers follow the path"):
        video_list(str(tmp_path), "list.csv", decoder=DECODER)
    (tmp_path / "list.csv").write_text(f'{FRAMES}x 0 0 a/v1/0.png ""\n')
    with pytest.raises(UserError, match=r"list\.csv:2: the frames of x have no label"):
        video_list(str(tmp_path), "list.csv", decoder=DECODER)


def test_annotations_that_name_videos_read_frames_in_their_place(tmp_path: Path) -> None:
    write_frames(tmp_path / "20bn-something-something-v2/7")
    (tmp_path / "something-something-v2-labels.json").write_text(json.dumps({"Doing nothing": "0"}))
    (tmp_path / "train.json").write_text('[{"id": "7", "template": "Doing nothing"}]')
    dataset = ssv2(str(tmp_path), "train.json", segments=False, decoder=DECODER)
    assert shown(dataset, 0) == [3, 4, 5]
    assert check([dataset.path(0)], processes=1, decoder=DECODER) == []
    write_frames(tmp_path / "k/harp/abc_000010_000020")
    (tmp_path / "k/train.csv").write_text("label,youtube_id,time_start,time_end,split\nharp,abc,10,20,train\n")
    assert shown(kinetics(str(tmp_path / "k"), "train.csv", 1, decoder=DECODER), 0) == [3, 4, 5]


def test_an_empty_folder_is_a_bad_video(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "list.csv").write_text("a 0\n")
    dataset = video_list(str(tmp_path), "list.csv", decoder=DECODER)
    sample = dataset[ClipRequest(0, Grid(3, 60, (1, 1), (60, 60)), 0, View(0, 1, 1))]
    assert sample.failures[0].reason == "no images in the folder"
