"""The kept listing of a dataset equals a fresh one, notices every change, and is shared by processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from videos import write_video

from mgvideo.datasets import listing
from mgvideo.datasets.charades import charades
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.scan import Scan, scan_folder
from mgvideo.datasets.ssv2 import ssv2
from mgvideo.datasets.ucf_hmdb import hmdb51, ucf101
from mgvideo.datasets.video import VideoDataset, VideoEntry
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid

GRID = Grid(frames=4, size=60, strides=(2, 2), scales=(60, 60))
KINETICS = "label,youtube_id,time_start,time_end,split\nrun,aaa,0,10,train\nwalk,gone,5,15,train\nwalk,bbb,1,11,\n"
FRAMES = "original_vido_id video_id frame_id path labels\n"
LABELS = json.dumps({"Doing a thing": "0", "Doing nothing": "1"})
# files by path, and how to build the dataset under a root
CASES: dict[str, tuple[dict[str, str], Callable[..., VideoDataset], dict[str, Any]]] = {
    "kinetics": (
        {"train.csv": KINETICS, "c/aaa_000000_000010.mp4": "", "c/d/bbb.mkv": ""},
        kinetics,
        {"list_file": "train.csv", "num_classes": 2},
    ),
    "list": (
        {"list.csv": "a.mp4 0;2\nb\\c.mp4 1\nb\\c.mp4 1\n", "b/c.mp4": ""},
        video_list,
        {"list_file": "list.csv", "multi_label": True},
    ),
    "frame list": (
        {"list.csv": f'{FRAMES}A 0 0 A/0.png "3"\nA 0 1 A/1.png "3"\n'},
        video_list,
        {"list_file": "list.csv"},
    ),
    "folder": (
        dict.fromkeys(
            ("train/run/a.mp4", "train/run/\udce9.mp4", "train/walk/c.mp4", "val/run/d.mp4", "val/x/e.txt"), ""
        ),
        video_folder,
        {"split": "train"},
    ),
    "table": (
        {"train.csv": "path,label,start,end\na.mp4,x,1.5,2\nb.mp4,y,,\n", "val.csv": "path,label\nc,x\n"},
        video_folder,
        {"split": "train"},
    ),
    "charades": (
        {"train.csv": "id,actions\nAAAAA,c092 0.50 1.00;c147 0.00 4.00\nBBBBB,\n"},
        charades,
        {"annotations": "train.csv"},
    ),
    "charades frames": (
        {"train.csv": f'{FRAMES}A 0 0 A/0.png "3,5"\nA 0 1 A/1.png ""\n'},
        charades,
        {"annotations": "train.csv"},
    ),
    "ssv2": (
        {"l.json": LABELS, "train.json": '[{"id": 3, "template": "Doing nothing"}]'},
        ssv2,
        {"annotations": "train.json", "labels": "l.json"},
    ),
    "ucf101": (
        {"ucfTrainTestlist/classInd.txt": "1 A\n2 B\n", "ucfTrainTestlist/trainlist01.txt": "A/v.avi 1\nB/w.avi 2\n"},
        ucf101,
        {"split": "train"},
    ),
    "hmdb51": ({"testTrainMulti_7030_splits/wave_test_split1.txt": "a.avi 1\nb.avi 2\n"}, hmdb51, {"split": "train"}),
}


@pytest.fixture(autouse=True)
def keep_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "MIN_VIDEOS", 1)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def describe(dataset: VideoDataset) -> Any:
    """Return everything that a dataset takes from its lists."""
    entries = [dataset.entry(index) for index in range(len(dataset))]
    labels = [dataset.label(index, (0.75, 0.8) if dataset.timed_labels else None) for index in range(len(dataset))]
    settings = (dataset.root, dataset.class_names, dataset.sampling, dataset.notes, dataset.missing, dataset.frames_fps)
    decoder = (type(dataset.decoder), getattr(dataset.decoder, "fps", None))
    return entries, torch.stack(labels).tolist(), settings, decoder, dataset.fingerprint(), dataset.labels.tolist()


@pytest.mark.parametrize("name", CASES)
def test_a_kept_listing_equals_a_fresh_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, build, arguments = CASES[name]
    root = tmp_path / "data"
    write_files(root, files)
    with monkeypatch.context() as patch:
        patch.setattr(listing, "MIN_VIDEOS", 1000)
        fresh = build(str(root), **arguments, decoder=PyAV())
    assert not (root / ".mgvideo").exists(), "small datasets keep no listing"
    expected = describe(fresh)
    assert describe(build(str(root), **arguments, decoder=PyAV())) == expected
    (kept,) = (root / ".mgvideo").iterdir()
    identity = kept.stat().st_ino
    again = build(str(root), **arguments, decoder=PyAV())
    assert kept.stat().st_ino == identity, "read, not written anew"
    assert type(again) is type(fresh)
    assert describe(again) == describe(pickle.loads(pickle.dumps(again))) == expected


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with class folders, whose listing is kept."""
    write_files(tmp_path / "data", {f"{name}/{i}.mp4": "" for name in ("run", "walk") for i in range(3)})
    return tmp_path / "data"


def names(root: Path) -> list[str]:
    splits = [video_folder(str(root), split, decoder=PyAV()) for split in ("train", "val")]
    return sorted(split.entry(i).path for split in splits for i in range(len(split)))


def test_every_change_of_a_folder_or_list_is_noticed(root: Path) -> None:
    assert len(names(root)) == len(names(root)) == 6
    (root / "run/3.mp4").touch()
    assert "run/3.mp4" in names(root)
    (root / "run/3.mp4").unlink()
    assert "run/3.mp4" not in names(root)
    write_files(root, {"sit/deep/0.mp4": "", "sit/1.mp4": ""})
    assert names(root)[3:5] == ["sit/1.mp4", "sit/deep/0.mp4"]
    shutil.rmtree(root / "sit")
    os.rename(root / "run", root / "ran")
    assert names(root)[:3] == ["ran/0.mp4", "ran/1.mp4", "ran/2.mp4"]


def test_a_changed_list_of_the_same_size_is_noticed_at_once(tmp_path: Path) -> None:
    for number in range(20):
        write_files(tmp_path, {"list.csv": f"{number % 10}.mp4 0\n"})
        dataset = video_list(str(tmp_path), "list.csv", decoder=PyAV())
        assert dataset.entry(0).path == f"{number % 10}.mp4"
    write_files(tmp_path, {"classes.txt": "one\ntwo\n"})
    assert video_list(str(tmp_path), "list.csv", decoder=PyAV()).class_names == ["one", "two"]


def test_both_splits_are_listed_by_one_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"train.csv": KINETICS, "val.csv": KINETICS, "aaa_000000_000010.mp4": "", "bbb.mp4": ""})
    scans = []

    def scan(root: str) -> Scan:
        scans.append(root)
        return scan_folder(root)

    monkeypatch.setattr("mgvideo.datasets.kinetics.scan_folder", scan)
    for _ in range(2):  # the second time, both listings are read
        for split in ("train", "val"):
            dataset = kinetics(str(tmp_path), f"{split}.csv", 2, decoder=PyAV())
            assert len(dataset) == 2
            assert dataset.arrays.path is not None
    assert len(scans) == 1


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_listing_is_made_anew(root: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = names(root)
    for file in (root / ".mgvideo").iterdir():
        content = bytearray(file.read_bytes())
        content[-70] ^= 1
        damaged = {"cut": content[:-64], "flip": content, "empty": b"", "other": b"text" * 100}[damage]
        file.write_bytes(damaged)
    assert names(root) == expected
    assert "it is made anew" in caplog.text
    caplog.clear()
    assert names(root) == expected
    assert not caplog.text


def test_a_read_only_dataset_is_listed_in_the_cache(root: Path, tmp_path: Path) -> None:
    (root / ".mgvideo").touch()  # as if the folder could not be made
    expected = names(root)
    assert len(list((tmp_path / "cache/mgvideo/listings").iterdir())) == 2
    assert names(root) == expected
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/mgvideo").touch()
    assert names(root) == expected, "neither place can be written"


def test_workers_share_the_lists_of_any_dataset(tmp_path: Path) -> None:
    entries = [VideoEntry(f"{i}.mp4", i % 5) for i in range(20_000)]
    dataset = VideoDataset(str(tmp_path), entries, list("abcde"), PyAV())
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    assert copy.entry(12_345) == entries[12_345]
    assert copy.fingerprint() == dataset.fingerprint()
    file = dataset.arrays.path
    assert file is not None
    assert os.path.exists(file)
    del dataset
    assert not os.path.exists(file), "temporary"
    assert copy.path(3) == str(tmp_path / "3.mp4"), "still mapped"


def test_workers_of_a_running_job_keep_its_listing(tmp_path: Path) -> None:
    """Another job that notices a change replaces the listing; workers of the first job start later."""
    write_video(tmp_path / "0.mp4", frames=8)
    write_files(tmp_path, {"list.csv": "0.mp4 0\n"})
    running = video_list(str(tmp_path), "list.csv", decoder=PyAV())
    write_files(tmp_path, {"list.csv": "gone.mp4 0\n"})
    assert video_list(str(tmp_path), "list.csv", decoder=PyAV()).entry(0).path == "gone.mp4"
    worker = pickle.loads(pickle.dumps(running))
    assert not worker[ClipRequest(0, GRID, 0)].failures
