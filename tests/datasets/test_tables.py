"""Test reading text files: encodings, delimiters, quotes, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mgvideo.datasets.tables import is_header, read_json_object, read_lines, read_records, read_table
from mgvideo.errors import UserError

TEXT = "path,label\na.mp4,jump\nü.mp4,walk\n"


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8 crlf", "utf-8 cr", "utf-16 crlf"],
)
def test_read_lines_accepts_encodings_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    name, _, ends = encoding.partition(" ")
    text = TEXT.replace("\n", {"crlf": "\r\n", "cr": "\r"}.get(ends, "\n"))
    (tmp_path / "a.csv").write_bytes(text.encode(name))
    assert read_lines(str(tmp_path / "a.csv")) == TEXT.splitlines()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\n\xe9\n", r"a\.csv:3: is not a UTF-8 text file; save it as UTF-8"),
        (b"a\nb\0c\n", r"a\.csv:2: holds a NUL byte"),
        (b"PK\x03\x04xyz", r"a\.csv: is an Excel workbook or a zip archive, not text; save the table as CSV"),
        (b"\x1f\x8bxyz", r"a\.csv: is a gzip archive, not text"),
    ],
)
def test_binary_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_lines(str(tmp_path / "a.csv"))


def rows(text: str, **options: Any) -> list[tuple[int, dict[str, str]]]:
    return [tuple(row) for row in read_table("a.csv", text.split("\n"), ("path", "label"), **options)]  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        'path,label\n"a, b.mp4",jump',
        'path;label\n"a, b.mp4";jump',
        "path;label\na, b.mp4;jump",
        "path\tlabel\na, b.mp4\tjump",
        "path|label\na, b.mp4|jump",
        'path label\n"a, b.mp4" jump',
        'label, path\njump, "a, b.mp4"',
        ' Path , LABEL ,,\n"a, b.mp4" , jump ,,',
        "sep=;\npath;label\na, b.mp4;jump",
        '# made by hand\n\npath,label\n# a comment\n\n"a, b.mp4",jump\n\n',
        'index,path,label\n0,"a, b.mp4",jump',
    ],
)
def test_read_table_accepts_delimiters_quotes_and_headers_of_many_programs(text: str) -> None:
    ((_, row),) = rows(text)
    assert {name: row[name] for name in ("path", "label")} == {"path": "a, b.mp4", "label": "jump"}


def test_rows_have_line_numbers_and_may_end_early() -> None:
    assert rows('path,label,start\n\na.mp4,jump\n# x\n"it ""s"".mp4",walk,3') == [
        (3, {"path": "a.mp4", "label": "jump"}),
        (5, {"path": 'it "s".mp4', "label": "walk", "start": "3"}),
    ]


BROKEN = "quotes are not closed, or text follows the closing ones"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('path,label\na.mp4,"jump\nb.mp4,walk', rf"a\.csv:2: {BROKEN}: 'a.mp4,\"jump'"),
        ('path,label\na.mp4,"jump\nb.mp4,walk"\n', rf"a\.csv:2: {BROKEN}"),
        ('path,label\na.mp4,x\n"b" c.mp4,jump', rf"a\.csv:3: {BROKEN}"),
        ("path,label\na.mp4," + '"' + "x" * 200_000, rf"a\.csv:2: {BROKEN}"),
        ("path,label\n" + "x" * 200_000 + ",jump", rf"a\.csv:2: {BROKEN}"),
        ('path,label\na.mp4,"x' + "\nb.mp4,walk" * 20_000, rf"a\.csv:2: {BROKEN}"),
        ("path,label\na.mp4,b,jump", r"a\.csv:2: 3 fields where the header has 2: 'a\.mp4,b,jump'; put text"),
        ("path,label,label\na.mp4,b,jump", r"a\.csv:1: the header has two columns label"),
        ("path,label,start,start\na.mp4,b,1,2", r"a\.csv:1: the header has two columns start"),
        ("file,class\na.mp4,b", r"a\.csv:1: expected a header with path and label, found 'file,class'"),
        ("", r"a\.csv:1: expected a header with path and label, found ''|a\.csv:2"),
    ],
)
def test_broken_table_error_names_the_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows(text)


def test_free_text_with_line_ends_and_stray_quotes_loses_no_row() -> None:
    header = "path,text,label"
    exact = ("path", "label")
    table = f'{header}\na,"one\ntwo, ""three""",x\nb,"said" he,y\nc,z,z'
    assert rows(table, exact=exact) == [
        (2, {"path": "a", "text": 'one\ntwo, "three"', "label": "x"}),
        (4, {"path": "b", "text": "said he", "label": "y"}),
        (5, {"path": "c", "text": "z", "label": "z"}),
    ]
    for text in (f'{header}\na,"open,x\nb,"text",y', f'{header}\na,b,"x\nc,d,y"', f'{header}\na,"open,x\nb,c,y'):
        with pytest.raises(UserError, match=r"a\.csv:2: quotes"):
            rows(text, exact=exact)


def test_header_is_recognised_by_its_columns() -> None:
    assert is_header(["", "# x", "PATH;Label"], ("path", "label"))
    assert not is_header(["a.mp4 0"], ("path", "label"))
    assert not is_header([], ("path", "label"))


def records(folder: Path, text: str) -> list[tuple[str, Any]]:
    (folder / "a.json").write_text(text)
    return [(place.removeprefix(f"{folder}/"), item) for place, item in read_records(str(folder / "a.json"))]


def test_read_records_accepts_one_value_a_line_or_one_list(tmp_path: Path) -> None:
    assert records(tmp_path, '{"a": 1}\n\n{"a": 2}\n') == [("a.json:1", {"a": 1}), ("a.json:3", {"a": 2})]
    text = '\n[\n  {"a": 1},\n  {\n    "a": [2]\n  }, 3\n]\n'
    assert records(tmp_path, text) == [
        ("a.json:3: item 1", {"a": 1}),
        ("a.json:4: item 2", {"a": [2]}),
        ("a.json:6: item 3", 3),
    ]
    assert records(tmp_path, "[]") == records(tmp_path, " [ ] ") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": ', r"a\.json:2: is not JSON: .*; expected an object a line, or one list of objects"),
        ('{"a": 1}\n{"a": 1, "b": 2, "a": 3}', r"a\.json:2: an object has a key twice: a, b, a"),
        ('[{"a": 1},\n{"a": 1, "a": 3}]', r"a\.json:2: item 2: an object has a key twice: a, a"),
        ('{\n"a": 1\n}', r"a\.json:1: is not JSON: '{'"),
        ('[{"a": 1},\n{"a" 2}]', r"a\.json:2: item 2 is not JSON"),
        ('[{"a": 1}\n{"a": 2}]', r"a\.json:2: is not JSON: expected , or \] after item 1"),
        ("[1, 2", r"a\.json:1: is not JSON: expected , or \] after item 2"),
        ("[1] 2", r"a\.json:1: is not JSON: expected , or \] after item 1"),
        ("[" * 100_000, r"a\.json:1: item 1 is not JSON"),
    ],
)
def test_broken_json_error_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        records(tmp_path, text)


def test_read_json_object_refuses_other_values(tmp_path: Path) -> None:
    for text, message in (
        ("[1]", "expected a JSON object"),
        ('{"a":\n x}', r":2: is not JSON"),
        ("[" * 100_000, "JSON"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_json_object(str(tmp_path / "a.json"))
