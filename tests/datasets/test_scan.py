"""Test scanning folders: find all videos, skip files of other programs, count skipped files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgvideo.datasets.scan import VIDEO_SUFFIXES, is_leftover, scan_folder
from mgvideo.errors import UserError


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


LEFTOVERS = [
    *("__MACOSX", ".AppleDouble", "._a.mp4", ".DS_Store", ".Spotlight-V100", ".fseventsd", ".Trashes", "Icon\r"),
    *("@eaDir", "@Recycle", "#recycle", "#snapshot", "@tmp", ".@__thumb", "@SynoResource"),
    *("$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini", "FOUND.000", "~$list.csv"),
    *("lost+found", ".Trash-1000", ".nfs0001", ".ipynb_checkpoints", ".git", ".cache", "__pycache__", ".snapshot"),
]
NAMES = [
    "macosx",
    "found",
    "recycle",
    "#20_Rhythm_clap.avi",
    "@home",
    "system volume",
    "$100",
    "thumbs.mp4",
    "a.b",
    "_x",
]


@pytest.mark.parametrize("name", LEFTOVERS)
def test_files_of_other_programs_are_leftovers(name: str) -> None:
    assert is_leftover(name)
    assert is_leftover(name.swapcase())
    assert is_leftover("RECYCLER")


@pytest.mark.parametrize("name", NAMES)
def test_similar_names_of_users_are_not_leftovers(name: str) -> None:
    assert not is_leftover(name)


def test_leftovers_are_skipped_and_noted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "._a.mp4", "deep/b.mov", "deep/._b.mov", "deep/.hidden.mp4", "Thumbs.db", ".DS_Store")
    for folder in ("__MACOSX", "@eaDir/a.mp4", "deep/@eaDir", ".AppleDouble", "deep/.ipynb_checkpoints", "lost+found"):
        touch(tmp_path, f"{folder}/x.mp4")
    scan = scan_folder(str(tmp_path))
    assert scan.videos == ["a.mp4", "deep/b.mov"]
    assert not scan.skipped
    assert scan.leftovers == {
        **{"__MACOSX": 1, "@eaDir": 2, ".AppleDouble": 1, ".ipynb_checkpoints": 1, "lost+found": 1},
        **{"._*": 2, "hidden files": 1},
    }
    (note,) = scan.notes("here")
    assert note.startswith("here: skipped files of other programs: .AppleDouble, ._* (2 times), ")


def test_unreadable_leftover_folder_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "lost+found/x.mp4")
    (tmp_path / "lost+found").chmod(0)
    try:
        assert scan_folder(str(tmp_path)).videos == ["a.mp4"]
    finally:
        (tmp_path / "lost+found").chmod(0o755)


def test_every_video_extension_is_recognised_in_any_case(tmp_path: Path) -> None:
    names = [f"{i}{suffix.upper() if i % 2 else suffix}" for i, suffix in enumerate(sorted(VIDEO_SUFFIXES))]
    touch(tmp_path, *names)
    scan = scan_folder(str(tmp_path))
    assert sorted(scan.videos) == sorted(names)
    assert not scan.notes("here")
    common = "mts m2ts 3gp ogv mpg mpeg vob flv wmv asf m4v mov webm mkv ts divx mxf ivf gif avi mp4 f4v rmvb y4m"
    assert {f".{name}" for name in common.split()} <= VIDEO_SUFFIXES


def test_skipped_files_are_counted_by_extension(tmp_path: Path) -> None:
    touch(tmp_path, "train.csv", "classes.txt", "run/a.mp4", "run/b.xyz", "run/c.XYZ", "run/d.jpg", "run/README")
    scan = scan_folder(str(tmp_path))
    assert scan.skipped == {".xyz": 2, ".jpg": 1, "without extension": 1}, "annotations at the top are expected"
    (note,) = scan.notes("here")
    assert note == ("here: skipped files without a video extension: 2 .xyz, 1 .jpg, 1 without extension")
    touch(tmp_path, *(f"run/x.{name}" for name in "abcdef"))
    assert scan_folder(str(tmp_path)).extensions().endswith(", and 4 more")


def test_symbolic_links_are_followed_without_cycles(tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/a.mp4", "root/b.mp4")
    (tmp_path / "root/there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/circle").symlink_to(tmp_path / "root")
    assert scan_folder(str(tmp_path / "root")).videos == ["b.mp4", "there/a.mp4"]


def test_nested_pyramid_is_skipped_unless_it_is_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "levels/layout.json", "levels/rows.jsonl", "levels/short64/run/a.mp4.mp4")
    scan = scan_folder(str(tmp_path))
    assert scan.videos == ["run/a.mp4"]
    assert scan.leftovers == {"levels, a pyramid": 1}
    assert scan_folder(str(tmp_path / "levels")).videos == ["short64/run/a.mp4.mp4"]


def test_unreadable_folder_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: this folder cannot be listed: No such file"):
        scan_folder(str(tmp_path / "gone"))
    with pytest.raises(UserError, match="the files of a URL cannot be listed"):
        scan_folder("https://host/videos")
