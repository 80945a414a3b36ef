"""Test list files: accepted formats and one-line errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgvideo.datasets.lists import list_line, parse_line, video_list
from mgvideo.errors import UserError


def read_list_text(root: Path, text: str, **options: object) -> list[tuple[str, int]]:
    (root / "list.csv").write_text(text)
    dataset = video_list(str(root), "list.csv", **options)  # type: ignore[arg-type]
    return [(Path(dataset.path(i)).relative_to(root).as_posix(), int(dataset.labels[i])) for i in range(len(dataset))]


def test_path_ends_at_the_last_separator(tmp_path: Path) -> None:
    text = "a b/c d.mp4 3\nx,y.mp4,1\n\nt\tab.mp4\t0\r\nwide,  2\nü/視頻.mp4 2"
    expected = [("a b/c d.mp4", 3), ("x,y.mp4", 1), ("t\tab.mp4", 0), ("wide", 2), ("ü/視頻.mp4", 2)]
    assert read_list_text(tmp_path, text) == expected


def test_class_names_come_from_the_file_or_are_numbers(tmp_path: Path) -> None:
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
def test_bad_list_error_names_the_line(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_list_text(tmp_path, text, **options)


def test_byte_order_marks_and_line_ends_are_not_part_of_a_path(tmp_path: Path) -> None:
    text = "\ufeffa.mp4 0\r\nb\u2028c.mp4 1\r\n"
    assert read_list_text(tmp_path, text) == [("a.mp4", 0), ("b\u2028c.mp4", 1)]


def test_missing_folder_and_file_errors_name_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.root: no folder .*gone; set dataset\.root"):
        video_list(str(tmp_path / "gone"), "list.csv")
    with pytest.raises(UserError, match=r"list\.csv: cannot be read: No such file"):
        video_list(str(tmp_path), "list.csv")
    (tmp_path / "list.csv").write_bytes(b"a.mp4 0\n\xe9.mp4 0\n")
    with pytest.raises(UserError, match=r"list\.csv:2: is not a UTF-8 text file"):
        video_list(str(tmp_path), "list.csv")
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="2 names for 3 classes"):
        read_list_text(tmp_path, "a.mp4 0\n", num_classes=3)


@pytest.mark.parametrize(
    ("line", "path", "labels"),
    [
        ('"a b.mp4" 0', "a b.mp4", (0,)),  # as pandas quotes
        ('"a b.mp4" "0"', "a b.mp4", (0,)),
        ('"a, b.mp4",0', "a, b.mp4", (0,)),
        ('"a ""b"".mp4" 0', 'a "b".mp4', (0,)),
        ("'a b.mp4' 0", "a b.mp4", (0,)),
        ("'t hooft.mp4 0", "'t hooft.mp4", (0,)),
        ("'a b.mp4' '0'", "a b.mp4", (0,)),
        ("“a b.mp4” “0”", "a b.mp4", (0,)),
        ("‘a b.mp4’,0", "a b.mp4", (0,)),
        ("«a b.mp4» 0", "a b.mp4", (0,)),
        ("x.mp4;3", "x.mp4", (3,)),
        ("x.mp4|3", "x.mp4", (3,)),
        ("x.mp4 , 3,", "x.mp4", (3,)),
        ("x.mp4 3.0", "x.mp4", (3,)),
        ("./x.mp4 3", "x.mp4", (3,)),
        ("X.MTS 3", "X.MTS", (3,)),
        ("x y.mp4 z.mov 3", "x y.mp4 z.mov", (3,)),
        ("x.mp4 0;1", "x.mp4", (0, 1)),
        ("x.mp4 0,1", "x.mp4", (0, 1)),
        ("a folder/no extension 0;1", "a folder/no extension", (0, 1)),
        ('"clip 120" 3', "clip 120", (3,)),
        ("my.ts files/clip 3", "my.ts files/clip", (3,)),
        ("https://host/a.mp4?sign=a,b 3", "https://host/a.mp4?sign=a,b", (3,)),
    ],
)
def test_parse_line(line: str, path: str, labels: tuple[int, ...]) -> None:
    assert parse_line(line) == (path, labels)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("x.mp4 120 0", "several numbers, 120 0, follow the path; give the label alone"),
        ("x.mp4,120,0", "several numbers, 120,0, follow the path"),
        ("x.mp4 1 120 0", "several numbers, 1 120 0, follow the path"),
        ("frames/x 120 0", "several numbers follow the path; .* quote a path that ends in a number"),
        ("x.mp4 0,1", "several labels, 0;1, where the task has one"),
        ('"a b.mp4 0', "the quotes around the path are not closed"),
        ('"a" b.mp4 0', r"label 'b\.mp4 0' is not a number"),
        ('"a"b.mp4 0', "the quotes around the path are not closed, or text follows them"),
        ("'a b.mp4 0'", 'label "0\'" is not a number'),
        ("“a b.mp4 0", "the quotes around the path are not closed"),
        ('a b.mp4" 0', "the quotes around the path are not closed"),
        ("x.mp4,", "it has no label"),
        ("x.mp4", "it has no label"),
        ('"" 0', "the quotes around the path"),
        ("x.mp4 -1", "label -1 is not a whole number"),
        ("x.mp4 3.5", r"label 3\.5 is not a whole number"),
        ("x.mp4 1e3", "label 1e3 is not a whole number"),
        ("x.mp4 nan", "label nan is not a whole number"),
        ("x.mp4 99999999999", "label 99999999999 is not a whole number in 0 to 999999999"),
        ("x.mp4 " + "9" * 5000, "label 99999999999999999999 is not a whole number"),
        ("x.mp4 jump", "label 'jump' is not a number; a table of class names is read with dataset=folder"),
        ("x.mp4 0 train", "label '0 train' is not a number"),
        ("0 x.mp4", r"label 'x\.mp4' is not a number"),
        ('{"path": "x.mp4", "label": 0}', "is not a number"),
        (r"C:\videos\x.mp4 0", r"is a Windows path; write paths relative to dataset\.root"),
        (r"\\nas\videos\x.mp4 0", "is a Windows path"),
    ],
)
def test_ambiguous_line_error_names_the_line(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"list\.csv:3: .*{reason}"):
        read_list_text(tmp_path, f"a.mp4 0\n\n{line}\nb.mp4 0\n")


def test_multi_label_lists(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.mp4 0,2\nb.mp4 1;2\nc.mp4\t1\n")
    dataset = video_list(str(tmp_path), "list.csv", multi_label=True)
    assert [dataset.entry(i).label for i in range(3)] == [(0, 2), (1, 2), (1,)]


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nx.mp4,0\ny z.mp4,1",
        "Label;Path\n0;x.mp4\n1.0;y z.mp4",
        ",path,label\n0,x.mp4,0\n1,y z.mp4,1",  # pandas' index
        'path num_frames label\nx.mp4 120 0\n"y z.mp4" 99 1',
        "# made by hand\n# path label\nx.mp4 0\ny z.mp4 1",
        "sep=;\nx.mp4;0\ny z.mp4;1",
    ],
)
def test_headers_and_comments_are_skipped(tmp_path: Path, text: str) -> None:
    assert read_list_text(tmp_path, text) == [("x.mp4", 0), ("y z.mp4", 1)]
    (tmp_path / "list.csv").write_bytes(f"\ufeff{text}\n".replace("\n", "\r\n").encode("utf-16-le"))
    assert len(video_list(str(tmp_path), "list.csv")) == 2, "as Excel writes it"


def test_row_without_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"list\.csv:3: it has no path"):
        read_list_text(tmp_path, "label,path\n0,x.mp4\n1\n")


def test_path_may_start_with_a_hash(tmp_path: Path) -> None:
    assert read_list_text(tmp_path, "#20_Rhythm_clap.avi 1\n#no label, a comment\n# x.avi 1\n") == [
        ("#20_Rhythm_clap.avi", 1)
    ]


def test_row_numbers_at_line_starts_are_refused(tmp_path: Path) -> None:
    for text in ("0,x.mp4,3\n1,y.mp4,4\n", "7 x.mp4 3\n8 y.mp4 4\n"):
        with pytest.raises(UserError, match=r"list\.csv:1: each line starts with a row number.*index=False"):
            read_list_text(tmp_path, text)
    (tmp_path / "7 x.mp4").touch()
    assert read_list_text(tmp_path, text) == [("7 x.mp4", 3), ("8 y.mp4", 4)], "names of files that are there"


@pytest.mark.parametrize(
    ("written", "on_disk"),
    [
        (r"train\a b.mp4", "train/a b.mp4"),
        (r"train/a\ b.mp4", "train/a b.mp4"),
        ("train/a%20b.mp4", "train/a b.mp4"),
        ("caf\u00e9.mp4", "cafe\u0301.mp4"),
        ("cafe\u0301.mp4", "caf\u00e9.mp4"),
        ("r\u00e9sum\u00e9\\a.mp4", "re\u0301sume\u0301/a.mp4"),
        (r"odd\name.mp4", r"odd\name.mp4"),
        ("100%25.mp4", "100%25.mp4"),
    ],
)
def test_find_spelling_returns_the_spelling_on_disk(tmp_path: Path, written: str, on_disk: str) -> None:
    (tmp_path / on_disk).parent.mkdir(exist_ok=True)
    (tmp_path / on_disk).touch()
    assert read_list_text(tmp_path, f'"{written}" 0') == [(on_disk, 0)]


def test_find_spelling_keeps_missing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_list_text(tmp_path, "caf\u00e9%20x.mp4 0\na\\b.mp4 1") == [("caf\u00e9%20x.mp4", 0), ("a/b.mp4", 1)]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.mp4").touch()
    assert read_list_text(tmp_path, "~/x.mp4 0") == [("x.mp4", 0)]


def test_repeated_videos_are_noted(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 0\na.mp4 1\nb.mp4 0\nc.mp4 1\n")
    dataset = video_list(str(tmp_path), "list.csv")
    assert len(dataset) == 5
    assert dataset.notes == [
        "list.csv: listed more than once: a.mp4, b.mp4; under different labels: a.mp4; "
        "mgvideo prepare check names them all"
    ]
    (tmp_path / "classes.txt").write_text("jump\nJump\n")
    assert video_list(str(tmp_path), "list.csv").notes[1:] == ["classes.txt: names of several classes look alike: jump"]


def test_unexpanded_home_folder_error_explains_it() -> None:
    with pytest.raises(UserError, match=r"no folder ~/videos \(~ is not expanded\)"):
        video_list("~/videos", "list.csv")


@pytest.mark.parametrize(
    "path",
    [
        "a b.mp4",
        "clip 120",
        "# a.mp4",
        "#a.mp4",
        '"q".mp4',
        "a;b",
        "x.mp4 1",
        "'a' 1",
        "a,",
        "plain",
        "視頻 3.mp4",
        "a.mp4 b",
        "“q” a.mp4",
        'a"',
    ],
)
def test_list_line_round_trip(tmp_path: Path, path: str) -> None:
    assert read_list_text(tmp_path, list_line(path, 3)) == [(path, 3)]
