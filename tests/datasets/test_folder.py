"""Test custom datasets from folders and tables: accepted layouts and one-line errors."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from videos import numbered_frame, read_number, write_video

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.folder import split_of, video_folder
from mgvideo.datasets.video import VideoDataset
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid


def tree(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def paths(root: Path, split: str, **options: object) -> list[str]:
    dataset = video_folder(str(root), split, **options)  # type: ignore[arg-type]
    return [Path(dataset.path(i)).relative_to(root).as_posix() for i in range(len(dataset))]


def test_class_folders_in_train_and_val(tmp_path: Path) -> None:
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


def test_holding_out_is_deterministic(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{i}.mp4" for name in ("run", "walk") for i in range(10)), "rare/0.mp4")
    train, val = paths(tmp_path, "train"), paths(tmp_path, "val")
    assert (len(train), len(val)) == (17, 4)
    assert not set(train) & set(val)
    assert "rare/0.mp4" in train, "a class of one video is trained on"
    assert {path.split("/")[0] for path in val} == {"run", "walk"}
    assert paths(tmp_path, "val") == val
    assert paths(tmp_path, "val", seed=1) != val
    assert len(paths(tmp_path, "val", val_share=0.5)) == 10


def test_tables_with_classes_and_spans(tmp_path: Path) -> None:
    write_video(tmp_path / "a b.mp4", frames=100, fps=25)
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
    assert failure.reason == "ends before 4 s, where its span starts"


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
        ("train.jsonl", "[1]\n", r"train\.jsonl:1: item 1: expected a path and a label"),
        ("train.csv", "path,label\n", r"no videos for train"),
    ],
)
def test_bad_table_error_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        video_folder(str(tmp_path), "train")


def test_unusable_folder_error_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: no folder"):
        video_folder(str(tmp_path / "gone"), "train")
    with pytest.raises(UserError, match=r"no videos for train; expected a folder of videos \(\.mp4, .*\) per class"):
        video_folder(str(tmp_path), "train")
    with pytest.raises(UserError, match="val_share must lie between 0 and 1"):
        video_folder(str(tmp_path), "train", val_share=1.5)
    tree(tmp_path, "train/run/a.mp4")
    with pytest.raises(UserError, match="has train videos but none for val"):
        video_folder(str(tmp_path), "val")


def both(root: Path, **options: Any) -> tuple[VideoDataset, VideoDataset]:
    return tuple(video_folder(str(root), split, **options) for split in ("train", "val"))  # type: ignore[return-value]


def test_files_of_other_programs_are_skipped(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{i}.mp4" for name in ("run", "walk") for i in range(5)), "run/@eaDir/0.mp4/t.mp4")
    tree(
        tmp_path, "__MACOSX/run/._0.mp4", "@eaDir/x.mp4", "run/._0.mp4", "walk/.AppleDouble/0.mp4", ".Trash-1000/x.mp4"
    )
    tree(tmp_path, "walk/.ipynb_checkpoints/0-checkpoint.mp4", "$RECYCLE.BIN/x.mp4", "lost+found/x.mp4", "._train.csv")
    train, val = both(tmp_path)
    assert train.class_names == val.class_names == ["run", "walk"]
    assert (len(train), len(val)) == (8, 2)
    (note,) = train.notes
    assert "skipped files of other programs: " in note
    assert "__MACOSX" in note


def test_all_video_extensions_are_read_and_skipped_files_noted(tmp_path: Path) -> None:
    for name, (kind, codec) in {
        "a.MTS": ("mpegts", "libx264"),
        "b.m2ts": ("mpegts", "libx264"),
        "c.3gp": ("3gp", "libx264"),
        "d.ogv": ("ogg", "libvpx"),
        "e.VOB": ("vob", "mpeg2video"),
        "f.flv": ("flv", "flv"),
        "g.mxf": ("mxf", "mpeg2video"),
        "h.gif": ("gif", "gif"),
    }.items():
        (tmp_path / name[0]).mkdir()
        with av.open(str(tmp_path / name[0] / name), "w", format=kind) as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "rgb8" if codec == "gif" else "yuv420p"
            for number in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number, 64, 64), format="rgb24")))
            container.mux(stream.encode())
    tree(tmp_path, "exotic/a.xyz", "exotic/b.xyz", "empty/readme", "a.mp4", "h/thumb.jpg")
    dataset = video_folder(str(tmp_path), "train", flip=False, decoder=PyAV())
    assert dataset.class_names == list("abcdefgh")
    grid = Grid(6, 64, (1, 1), (64, 64))
    for index in range(8):
        clip = dataset[ClipRequest(index, grid, 0)].clip
        assert [read_number(frame) for frame in clip] == list(range(6))
    notes = "\n".join(dataset.notes)
    assert "not read, because in no class folder: a.mp4" in notes
    assert "folders without videos, not counted as classes: empty (1 without extension), exotic (2 .xyz)" in notes
    assert "skipped files without a video extension: 2 .xyz, 1 without extension, 1 .jpg" in notes


@pytest.mark.parametrize(
    ("paths", "listed_files"),
    [
        (["run/a.xyz"], "run (1 .xyz)"),
        (["a.mp4", "b.mp4"], "not read, because in no class folder: a.mp4, b.mp4"),
        (["train/a.mp4", "val/b.mp4"], "train: not read, because in no class folder: train/a.mp4"),
        (["train/run/a.xyz", "val/run/b.mp4"], "expected a folder of videos per class in train; .*run (1 .xyz)"),
    ],
)
def test_no_videos_error_names_the_files(tmp_path: Path, paths: list[str], listed_files: str) -> None:
    tree(tmp_path, *paths)
    with pytest.raises(
        UserError,
        match=f"no videos for train; .*{listed_files.replace('(', chr(92) + '(').replace(')', chr(92) + ')')}",
    ):
        video_folder(str(tmp_path), "train")


def test_one_video_a_class_cannot_be_held_out(tmp_path: Path) -> None:
    tree(tmp_path, "run/a.mp4", "walk/b.mp4", "sit/c.mp4")
    assert len(video_folder(str(tmp_path), "train")) == 3
    message = r"no videos for val; each class has one video and none to hold out \(run, sit, walk\): add videos"
    with pytest.raises(UserError, match=message):
        video_folder(str(tmp_path), "val")
    tree(tmp_path, "run/d.mp4")
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (3, 1)
    assert val.notes == [f"{tmp_path}: classes without videos for val: sit, walk"] == train.notes
    tree(tmp_path, "walk/e.mp4", "sit/f.mp4")
    train, val = both(tmp_path)
    assert (len(train), len(val), train.notes) == (3, 3, [])
    assert sorted(val.labels) == sorted(train.labels) == [0, 1, 2], "two videos: one on each side"


def test_spellings_of_a_folder_are_one_class(tmp_path: Path) -> None:
    tree(tmp_path, "train/cafe\u0301/a.mp4", "train/jump /b.mp4", "val/caf\u00e9/c.mp4", "val/jump/d.mp4")
    train, val = both(tmp_path)
    assert train.class_names == ["caf\u00e9", "jump"]
    assert train.labels.tolist() == val.labels.tolist() == [0, 1]
    assert all("read as one class" in note for note in train.notes)
    tree(tmp_path, "val/Jump/e.mp4")
    with pytest.raises(UserError, match=r"Jump: class 'Jump' looks like 'jump' of .*/train/jump : use one name"):
        video_folder(str(tmp_path), "train")


def test_held_out_videos_do_not_depend_on_unicode_form(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"café/é{i}.mp4") for i in range(10)]
        tree(tmp_path / form, *names)
    composed, decomposed = (
        [unicodedata.normalize("NFC", path) for path in paths(tmp_path / form, "val")] for form in ("NFC", "NFD")
    )
    assert composed == decomposed


def test_spellings_of_a_class_are_held_out_together(tmp_path: Path) -> None:
    tree(
        tmp_path,
        *(f"jump/{i}.mp4" for i in range(5)),
        *(f"jump /{i}.mp4" for i in range(5)),
        "walk/a.mp4",
        "walk/b.mp4",
    )
    train, val = both(tmp_path)
    assert (len(train), len(val)) == (9, 3)
    assert train.class_names == ["jump", "walk"]


def test_non_utf8_folder_name_is_a_class(tmp_path: Path) -> None:
    tree(tmp_path, "caf\udce9/a.mp4", "run/b.mp4")
    assert video_folder(str(tmp_path), "train").class_names == ["caf\\xe9", "run"]


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Val"), ("TRAINING", "validation"), ("train_set", "Valid"), ("train", "test"), ("Train videos", "eval")],
)
def test_usual_names_of_splits_are_recognised(tmp_path: Path, train: str, val: str) -> None:
    tree(tmp_path, f"{train}/run/a.mp4", f"{train}/walk/b.mp4", f"{val}/run/c.mp4", f"{val}/walk/d.mp4")
    datasets = both(tmp_path)
    assert [dataset.class_names for dataset in datasets] == [["run", "walk"]] * 2
    assert paths(tmp_path, "train") == [f"{train}/run/a.mp4", f"{train}/walk/b.mp4"]
    assert paths(tmp_path, "val") == [f"{val}/run/c.mp4", f"{val}/walk/d.mp4"]
    notes = [f"{tmp_path}: test is used for validation"] if val == "test" else []
    assert datasets[0].notes == notes


def test_split_of() -> None:
    assert [split_of(name) for name in ("Train", "valid", "VALIDATION", "test-set", "train ", "eval")] == [
        *("train", "val", "val", "test", "train", "val")
    ]
    assert not any(map(split_of, ("trains", "training horses", "tests", "value", "values", "val 2", "evaluate poses")))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "Train", "val"), "Train and train are both train videos: keep one of them"),
        (("val", "valid", "train"), "val and valid are both val videos"),
        (
            ("train", "bus", "car"),
            r"split folders \(train\) beside class folders \(bus, car\): move the classes into train/",
        ),
        (("train_256", "val_256"), "train_256 and val_256 look like split folders"),
        (("01 Train", "02 Test", "x"), "01 Train and 02 Test look like split folders"),
        (("kinetics-train", "kinetics-validation"), "rename them to train and val"),
        (("test", "jump"), r"split folders \(test\) beside class folders \(jump\)"),
        (
            ("run/train", "run/val", "walk/train"),
            "run: holds train and val, split folders, where a class folder is expected",
        ),
        (
            ("data/Train/run", "data/Test/run"),
            "data: holds Test and Train, split folders, .*: set dataset.root to it",
        ),
    ],
)
def test_ambiguous_folders_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    tree(tmp_path, *(f"{folder}/x/a.mp4" for folder in folders))
    with pytest.raises(UserError, match=message):
        video_folder(str(tmp_path), "train")


def test_videos_outside_split_folders_are_noted(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "train/run/a.mp4",
        "train/sit/b.mp4",
        "val/run/b.mp4",
        "val/sit/b.mp4",
        "annotations/a.xml",
        "train.json",
    )
    assert video_folder(str(tmp_path), "train").notes == []
    tree(tmp_path, "raw/x.mp4", "test/run/y.mp4", "z.mp4")
    assert video_folder(str(tmp_path), "train").notes == [
        f"{tmp_path}: test is not read",
        f"{tmp_path}: not read, because outside the split folders: raw, z.mp4",
    ]


def test_pyramid_beside_classes_is_not_a_class(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{name}/{i}.mp4" for name in ("run", "walk") for i in range(2)))
    tree(tmp_path, "levels/layout.json", "levels/rows.jsonl", "levels/short64/run/0.mp4.mp4")
    dataset = video_folder(str(tmp_path), "train")
    assert dataset.class_names == ["run", "walk"]
    assert any("levels, a pyramid" in note for note in dataset.notes)


def test_single_class_is_noted(tmp_path: Path) -> None:
    tree(tmp_path, "videos/run/a.mp4", "videos/run/b.mp4", "videos/walk/c.mp4", "videos/walk/d.mp4")
    (note,) = video_folder(str(tmp_path), "train").notes
    assert "only one class, videos: is dataset.root the folder that holds a folder per class?" in note


# tables


def table(root: Path, text: str, name: str = "train.csv") -> tuple[list[str], list[str]]:
    """Write a table and return the paths and classes that are read from it."""
    (root / name).write_text(text)
    dataset = video_folder(str(root), "train")
    classes = [dataset.class_names[label] for label in dataset.labels]
    return [dataset.entry(i).path for i in range(len(dataset))], classes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Train.csv", 'path,label\n"a, b.mp4",jump\nc.mp4, walk \n'),
        ("train.tsv", "path\tlabel\na, b.mp4\tjump\nc.mp4\twalk\n"),
        ("training.csv", "label;path\njump;a, b.mp4\nwalk;c.mp4\n"),
        ("train.jsonl", '{"path": "a, b.mp4", "label": "jump"}\n{"path": "c.mp4", "label": "walk\\u00a0"}\n'),
        ("train.jsonl", '[{"path": "a, b.mp4", "label": "jump"},\n {"path": "c.mp4", "label": "walk"}]'),
        ("train.json", '[{"path": "a, b.mp4", "label": "jump"},\n {"path": "c.mp4", "label": "walk"}]'),
    ],
)
def test_tables_written_by_many_programs(tmp_path: Path, name: str, text: str) -> None:
    assert table(tmp_path, text, name) == (["a, b.mp4", "c.mp4"], ["jump", "walk"])


def test_numbers_are_class_names_with_one_spelling(tmp_path: Path) -> None:
    assert table(tmp_path, "path,label\na.mp4,3.0\nb.mp4,3\n")[1] == ["3", "3"]
    (tmp_path / "train.csv").unlink()
    rows = ({"path": f"{label}.mp4", "label": label} for label in (3, 3.0, "3"))
    assert table(tmp_path, "\n".join(map(json.dumps, rows)), "train.jsonl")[1] == ["3", "3", "3"]


def test_seconds_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("path;label;start;end\na.mp4;run;1,5;2,25\na.mp4;run;;2.5\n")
    dataset = video_folder(str(tmp_path), "train")
    assert [dataset.entry(i).span for i in range(2)] == [(1.5, 2.25), (0, 2.5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.csv", 'path,label\na.mp4,"run\nb.mp4,walk\n', r"train\.csv:2: quotes are not closed"),
        ("train.csv", 'path,label\na.mp4,"run\nb.mp4,walk"\n', r"train\.csv:2: quotes are not closed"),
        ("train.csv", 'path,label\na.mp4,"' + "x" * 200_000, r"train\.csv:2: quotes are not closed"),
        ("train.csv", "path,label\na.mp4,run\na, b.mp4,run\n", r"train\.csv:3: 3 fields where the header has 2"),
        ("train.csv", "path,label\na.mp4,\"('x', 'y')\"\n", r"train\.csv:2: expected one label, a name, found"),
        ("train.csv", "path,label\na.mp4,nan\n", r"train\.csv:2: expected one label, a name, found 'nan'"),
        ("train.csv", "path,label\na.mp4,\"['x', 'y']\"\n", r"train\.csv:2: expected one label, a name, found"),
        ("train.csv", "path,label\na.mp4,run\nb.mp4,walk\nc.mp4,run;walk\n", r"train\.csv:4: 'run;walk' joins several"),
        ("train.csv", "path,label,start\na.mp4,run,nan\n", r"train\.csv:2: expected 0 <= start < end"),
        ("train.csv", "path,label,end\na.mp4,run,0\n", r"train\.csv:2: expected 0 <= start < end"),
        (
            "train.csv",
            "path,label,start\na.mp4,run,00:01:12\n",
            r"train\.csv:2: start and end must be seconds, found '00",
        ),
        ("train.csv", "path,label\nC:\\a.mp4,run\n", r"train\.csv:2: .* is a Windows path"),
        ("train.csv", "a.mp4 0\n", r"train\.csv:1: expected a header with path and label, found 'a\.mp4 0'"),
        ("train.csv", "path,label\n\u200b.mp4, \u200b\n", r"train\.csv:2: the class name .* is empty"),
        (
            "train.jsonl",
            '{"path": "a.mp4", "label": ["x", "y"]}',
            r"train\.jsonl:1: expected one label, a name, found \['x",
        ),
        ("train.jsonl", '{"path": "a.mp4", "label": {"x": 1}}', r"train\.jsonl:1: expected one label"),
        ("train.jsonl", '{"path": "a.mp4", "label": true}', r"train\.jsonl:1: expected one label, a name, found True"),
        ("train.jsonl", '{"path": "a.mp4", "label": 1.5}', r"train\.jsonl:1: expected one label"),
        ("train.jsonl", '{"path": ["a.mp4"], "label": "x"}', r"train\.jsonl:1: the path must be text, found \['a"),
        ("train.jsonl", '{"path": "\\ud800.mp4", "label": "x"}', r"train\.jsonl:1: the path .* can name a file"),
        ("train.jsonl", '{"path": "a.mp4", "label": "x", "end": 0}', r"train\.jsonl:1: expected 0 <= start < end"),
        (
            "train.jsonl",
            '{"path": "a.mp4", "label": "x", "end": true}',
            r"train\.jsonl:1: start and end must be seconds",
        ),
        ("train.jsonl", '{"a.mp4": "x"}', r"train\.jsonl:1: expected a path and a label"),
        (
            "train.jsonl",
            '{\n"a.mp4": "x"}',
            r"train\.jsonl:1: is not JSON: '{'; expected an object a line, or one list",
        ),
        (
            "train.json",
            '[{"path": "a.mp4",\n"label": "x"},\n{"path": "b.mp4"}]',
            r"train\.json:3: item 2: expected a path",
        ),
    ],
)
def test_ambiguous_table_error_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        table(tmp_path, text, name)


def test_two_tables_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train.csv", "val.csv", "train.jsonl"):
        (tmp_path / name).write_text("path,label\na.mp4,run\n")
    with pytest.raises(UserError, match=r"train\.csv and train\.jsonl are both train videos: keep one of them"):
        video_folder(str(tmp_path), "train")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "val.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"no videos for val; val\.csv lists none"):
        video_folder(str(tmp_path), "val")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(UserError, match=r"has train videos but none for val; add val\.csv beside a table"):
        video_folder(str(tmp_path), "val")


def test_shared_videos_and_missing_classes_are_noted(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("path,label\na.mp4,run\nb.mp4,walk\nb.mp4,run\n")
    (tmp_path / "val.csv").write_text("path,label\na.mp4,run\nc.mp4,sit\n")
    train, val = both(tmp_path)
    assert train.class_names == ["run", "sit", "walk"]
    shared = [
        f"{tmp_path}: classes without videos for train: sit",
        f"{tmp_path}: classes without videos for val: walk",
        f"{tmp_path}: videos both in train and in val: a.mp4",
    ]
    assert val.notes == shared
    assert train.notes[:3] == shared
    assert "train: listed more than once: b.mp4; under different labels: b.mp4" in train.notes[3]
