"""List files and folders: what is read, and one clear line for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from videos import write

from mgvideo.clips import ClipRequest, View
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.video import VideoDataset
from mgvideo.errors import UserError
from mgvideo.plan import Grid


def listed(root: Path, text: str, **options: object) -> list[tuple[str, int]]:
    (root / "list.csv").write_text(text)
    dataset = video_list(str(root), "list.csv", **options)  # type: ignore[arg-type]
    return [(Path(dataset.path(i)).relative_to(root).as_posix(), int(dataset.labels[i])) for i in range(len(dataset))]


def test_the_last_separator_counts(tmp_path: Path) -> None:
    text = "a b/c d.mp4 3\nx,y.mp4,1\n\nt\tab.mp4\t0\r\nwide,  2\nü/視頻.mp4 2"
    expected = [("a b/c d.mp4", 3), ("x,y.mp4", 1), ("t\tab.mp4", 0), ("wide", 2), ("ü/視頻.mp4", 2)]
    assert listed(tmp_path, text) == expected


def test_classes_are_named_by_their_file_or_counted(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 4\n")
    assert video_list(str(tmp_path), "list.csv").class_names == ["0", "1", "2", "3", "4"]
    assert len(video_list(str(tmp_path), "list.csv", num_classes=7).class_names) == 7
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert video_list(str(tmp_path), "list.csv").class_names == list("abcde")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"list\.csv: no videos in the list"),
        ("a.mp4 0\nb.mp4\n", {}, r"list\.csv:2: expected 'path label', found 'b\.mp4'"),
        ("a.mp4 zero\n", {}, r"list\.csv:1: expected 'path label'"),
        ("a.mp4 -1\n", {}, r"list\.csv:1: expected 'path label'"),
        ("5\n", {}, r"list\.csv:1: expected 'path label'"),
        ("a.mp4 0\nb.mp4 3\n", {"num_classes": 3}, r"list\.csv:2: label 3 is not in 0 to 2; see dataset\.num_classes"),
        ("a.mp4 0;1\n", {}, r"list\.csv:1: several labels, 0;1, where the task has one"),
        ("a.mp4 0;9\n", {"num_classes": 3, "multi_label": True}, r"label \(0, 9\) is not in 0 to 2"),
    ],
)
def test_a_bad_list_is_refused_with_its_line(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        listed(tmp_path, text, **options)


def test_marks_and_line_ends_of_other_programs_are_no_part_of_a_path(tmp_path: Path) -> None:
    text = "\ufeffa.mp4 0\r\nb\u2028c.mp4 1\r\n"
    assert listed(tmp_path, text) == [("a.mp4", 0), ("b\u2028c.mp4", 1)]


def test_missing_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: no folder .*gone; set dataset\.root"):
        video_list(str(tmp_path / "gone"), "list.csv")
    with pytest.raises(UserError, match=r"list\.csv: cannot be read: No such file"):
        video_list(str(tmp_path), "list.csv")
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="is not a UTF-8 text file"):
        video_list(str(tmp_path), "list.csv")
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 names for 3 classes"):
        listed(tmp_path, "a.mp4 0\n", num_classes=3)


def tree(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def paths(root: Path, split: str, **options: object) -> list[str]:
    dataset = video_folder(str(root), split, **options)  # type: ignore[arg-type]
    return [Path(dataset.path(i)).relative_to(root).as_posix() for i in range(len(dataset))]


def test_a_folder_per_class_in_train_and_val(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "train/run/a.mp4",
        "train/run/deep/b.AVI",
        "train/walk/c.webm",
        "train/walk/notes.txt",
        "val/run/d.mp4",
    )
    assert paths(tmp_path, "train") == ["train/run/a.mp4", "train/run/deep/b.AVI", "train/walk/c.webm"]
    assert paths(tmp_path, "val") == ["val/run/d.mp4"]
    assert video_folder(str(tmp_path), "val").class_names == ["run", "walk"]
    assert video_folder(str(tmp_path), "train").labels.tolist() == [0, 0, 1]


def test_a_folder_per_class_alone_is_split_alike_every_time(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{i}.mp4" for name in ("run", "walk") for i in range(10)), "rare/0.mp4")
    train, val = paths(tmp_path, "train"), paths(tmp_path, "val")
    assert (len(train), len(val)) == (17, 4)
    assert not set(train) & set(val)
    assert "rare/0.mp4" in train, "a class of one video is trained on"
    assert {path.split("/")[0] for path in val} == {"run", "walk"}
    assert paths(tmp_path, "val") == val
    assert paths(tmp_path, "val", seed=1) != val
    assert len(paths(tmp_path, "val", val_share=0.5)) == 10


def test_tables_name_classes_and_stretches(tmp_path: Path) -> None:
    write(tmp_path / "a b.mp4", frames=100, fps=25)
    (tmp_path / "train.csv").write_text('path,label,start,end\n"a b.mp4",run,1,2\na b.mp4,walk,,\n')
    (tmp_path / "val.jsonl").write_text('{"path": "a b.mp4", "label": "run", "start": 3.96}\n')
    train, val = (video_folder(str(tmp_path), split, flip=False) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["run", "walk"]
    grid = Grid(25, 60, (1, 1), (60, 60))
    first, last = ([crop(dataset, place, grid) for place in (0, -1)] for dataset in (train, val))
    with PyAV().open(str(tmp_path / "a b.mp4")) as video:
        frames = video.read([25, 49, 99])[:, :, 10:70]
    assert torch.equal(first[0], frames[0])
    assert torch.equal(first[1], frames[1])
    assert torch.equal(last[0], frames[2]), "the one frame that is left is repeated"
    assert torch.equal(last[1], frames[2])
    (tmp_path / "val.jsonl").write_text('{"path": "a b.mp4", "label": "run", "start": 4}\n')
    request = ClipRequest(0, grid, 0, View(0, 1, 1))
    (failure,) = video_folder(str(tmp_path), "val")[request].failures
    assert failure.reason == "ends before 4 s, where its stretch begins"


def crop(dataset: VideoDataset, place: int, grid: Grid) -> torch.Tensor:
    return dataset[ClipRequest(0, grid, 0, View(0, 1, 1))].clip[0, place]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.csv", "file,class\na.mp4,run\n", r"train\.csv:1: expected a header with path and label"),
        ("train.csv", "path,label\na.mp4,\n", r"train\.csv:2: expected a path and a label"),
        ("train.csv", "path,label,start,end\na.mp4,run,2,1\n", r"train\.csv:2: expected 0 <= start < end"),
        ("train.csv", "path,label,start\na.mp4,run,soon\n", r"train\.csv:2: start and end must be seconds"),
        ("train.jsonl", '{"path": "a.mp4", "label": "run"}\nrun\n', r"train\.jsonl:2: is not JSON"),
        ("train.jsonl", "[1]\n", r"train\.jsonl:1: expected a path and a label"),
        ("train.csv", "path,label\n", r"no videos for train"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        video_folder(str(tmp_path), "train")


def test_an_unusable_folder_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: no folder"):
        video_folder(str(tmp_path / "gone"), "train")
    with pytest.raises(UserError, match=r"no videos for train; expected a folder of videos \(\.avi"):
        video_folder(str(tmp_path), "train")
    with pytest.raises(UserError, match="val_share must lie between 0 and 1"):
        video_folder(str(tmp_path), "train", val_share=1.5)
    tree(tmp_path, "train/run/a.mp4")
    with pytest.raises(UserError, match="has train videos but none for val"):
        video_folder(str(tmp_path), "val")
