"""Read text files written by people and spreadsheets: lines, tables with a header, JSON records."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from mgvideo.errors import UserError
from mgvideo.storage.paths import is_remote, read_bytes

from .inputs import record_input

DELIMITERS = ",\t;| "
MAX_RECORD_LINES = 50  # longest record of a table with free text in some columns
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, because it starts with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY_FORMATS = {b"PK\x03\x04": "an Excel workbook or a zip archive", b"\x1f\x8b": "a gzip archive"}


_QUOTES = ('""', "''", "``", "“”", "„“", "‘’", "‚‘", "«»")  # pairs in programs, word processors and languages


class TableRow(NamedTuple):
    """A row of a table: the number of its first line, from 1, and its fields by lower-case column name."""

    line: int
    fields: dict[str, str]


def strip_quotes(text: str) -> str:
    """Remove all pairs of quotes, of any kind, that enclose the whole text."""
    inner = text[1:-1].strip()
    is_quoted = len(text) > 2 and text[0] + text[-1] in _QUOTES and not {text[0], text[-1]} & set(inner)
    return strip_quotes(inner) if is_quoted and inner else text


def read_text(file: str) -> str:
    """Read a text file in UTF-8, UTF-16 or UTF-32; raises UserError."""
    try:
        if not is_remote(file):
            record_input(file)
        data = read_bytes(file)
        record_input(file, content=data)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    kind = next((kind for start, kind in _BINARY_FORMATS.items() if data.startswith(start)), None)
    if kind:
        raise UserError(f"{file}: is {kind}, not text; save the table as CSV in UTF-8")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None) or _guess_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{number}: is not a UTF-8 text file; save it as UTF-8") from None
    if "\0" in text:
        number = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}:{number}: holds a NUL byte: the file is damaged or not text")
    return text.lstrip("\ufeff")  # a second byte order mark


def _guess_encoding(data: bytes) -> str:
    """Guess UTF-8 or UTF-16 for a file without a byte order mark: in UTF-16, every other byte of ASCII text is zero."""
    even, odd = data[:1024:2], data[1:1024:2]
    if len(data) % 2 == 0 and 2 * odd.count(0) > len(odd) and not even.count(0):
        return "utf-16-le"
    return "utf-16-be" if len(data) % 2 == 0 and 2 * even.count(0) > len(even) and not odd.count(0) else "utf-8"


def read_lines(file: str) -> list[str]:
    """Read the lines of a text file without line ends (`\\n`, `\\r\\n` or `\\r`); raises UserError."""
    return [line.rstrip("\n") for line in io.StringIO(read_text(file), newline=None)]


def delimiter_of(header: str, required: Sequence[str]) -> str | None:
    """Return the delimiter that splits `header` into the required columns, in any order and case, or None."""
    for delimiter in DELIMITERS:
        with suppress(csv.Error):
            if set(_columns(header, delimiter)) >= set(required):
                return delimiter
    return None


def _columns(header: str, delimiter: str) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader([header], **_dialect(delimiter)), [])]


def _dialect(delimiter: str) -> dict[str, Any]:
    return {"delimiter": delimiter, "skipinitialspace": True, "strict": True}


def is_header(lines: Sequence[str], required: Sequence[str]) -> bool:
    """Return whether the first line that is neither empty nor a comment is a header with the required columns."""
    start = _header_index(lines)
    return start < len(lines) and delimiter_of(lines[start], required) is not None


def _header_index(lines: Sequence[str]) -> int:
    """Return the index of the first line that is neither empty nor a comment."""
    return next((i for i, line in enumerate(lines) if line.strip() and not is_remark(line)), len(lines))


def is_remark(line: str) -> bool:
    """Return whether a line is a comment or Excel's delimiter line (`sep=;`).

    A comment is `#` alone or followed by a space, because a file name may start with `#`.
    """
    text = line.strip()
    return (text[:1] == "#" and not text[1:2].strip()) or (len(text) == 5 and text.lower().startswith("sep="))


def read_table(
    file: str, lines: Sequence[str], required: Sequence[str], exact: Sequence[str] | None = None
) -> Iterator[TableRow]:
    """Yield the rows of a table with a header.

    Commas, tabs, semicolons, bars or spaces separate the fields, which may be quoted. Fields are stripped of spaces. If
    a row ends early, its last fields are missing from `TableRow.fields`.

    Args:
        exact: The columns that are not free text. If given, the other columns may contain line ends and unbalanced
            quotes. If None, each row is one line.

    Raises:
        UserError: The header lacks a required column or repeats one, quotes are not closed, or a row has more fields
            than the header.
    """
    start = _header_index(lines)
    header = lines[start] if start < len(lines) else ""
    delimiter = delimiter_of(header, required)
    if delimiter is None:
        expected = " and ".join(required)
        raise UserError(f"{file}:{start + 1}: expected a header with {expected}, found {header.strip()[:80]!r}")
    columns = _columns(header, delimiter)
    repeated = next((name for name in columns if name and columns.count(name) > 1), None)
    if repeated:
        raise UserError(f"{file}:{start + 1}: the header has two columns {repeated}")
    end = start + 1
    while end < len(lines):
        start = end
        if not lines[start].strip() or is_remark(lines[start]):
            end += 1
            continue
        fields, end = _record(file, lines, start, delimiter, len(columns), exact is not None)
        row = {name: value.strip() for name, value in zip(columns, fields, strict=False) if name}
        if any("\n" in row.get(name, "") for name in exact or ()):
            raise UserError(f"{file}:{start + 1}: quotes that are opened here are closed in line {end}")
        yield TableRow(start + 1, row)


def _record(
    file: str, lines: Sequence[str], start: int, delimiter: str, columns: int, free_text: bool
) -> tuple[list[str], int]:
    """Parse the record that starts at line `start`; returns its fields and the index of the line after it."""
    for end in range(start + 1, min(start + (MAX_RECORD_LINES if free_text else 1), len(lines)) + 1):
        fields = _parse(lines[start:end], delimiter)
        if fields is not None:
            break
    else:
        end, line = start + 1, repr(lines[start].strip()[:80])
        fields = _parse(lines[start:end], delimiter, strict=False) if free_text else None
        if fields is None or len(fields) != columns:
            raise UserError(f"{file}:{start + 1}: quotes are not closed, or text follows the closing ones: {line}")
    while len(fields) > columns and not fields[-1].strip():
        fields.pop()
    if len(fields) > columns:
        raise UserError(
            f"{file}:{start + 1}: {len(fields)} fields where the header has {columns}: {lines[start].strip()[:80]!r}; "
            "put text that holds a delimiter into double quotes"
        )
    return fields, end


def _parse(lines: Sequence[str], delimiter: str, strict: bool = True) -> list[str] | None:
    """Parse one record; returns None if its quotes are not closed or text other than spaces follows closing quotes."""
    options = {**_dialect(delimiter), "strict": strict}
    with suppress(csv.Error):
        return next(csv.reader([f"{line}\n" for line in lines], **options))
    trimmed = [re.sub(rf'" +(?={re.escape(delimiter)}|$)', '"', line) for line in lines]
    with suppress(csv.Error):
        return next(csv.reader([f"{line}\n" for line in trimmed], **options))
    return None


class _RepeatedKeyError(Exception):
    """Raised for a JSON object with a repeated key, of which Python would keep only the last."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) < len(pairs):
        raise _RepeatedKeyError(f"an object has a key twice: {', '.join(key for key, _ in pairs)}")
    return items


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_records(file: str) -> Iterator[tuple[str, Any]]:
    """Yield the JSON values of a file with their places (`file:3`): one value a line, or one list of them.

    Raises UserError.
    """
    text = read_text(file)
    if text.lstrip().startswith("["):
        yield from _items(file, text)
        return
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            try:
                value = _DECODER.decode(line)
            except _RepeatedKeyError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            except (ValueError, RecursionError):
                text = repr(line.strip()[:80])
                raise UserError(
                    f"{file}:{number}: is not JSON: {text}; expected an object a line, or one list of objects"
                ) from None
            yield f"{file}:{number}", value


def _items(file: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of a JSON list with their places (`file:3: item 2`)."""
    space = re.compile(r"\s*")
    position, line, number = text.index("["), 1 + text.count("\n", 0, text.index("[")), 0
    while text[position : position + 1] in ("[", ","):
        start = space.match(text, position + 1).end()  # type: ignore[union-attr]
        line += text.count("\n", position, start)
        if text[start : start + 1] == "]":
            position = start
            break
        number += 1
        try:
            item, end = _DECODER.raw_decode(text, start)
        except _RepeatedKeyError as error:
            raise UserError(f"{file}:{line}: item {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise UserError(f"{file}:{line}: item {number} is not JSON: {text[start : start + 80]!r}") from None
        yield f"{file}:{line}: item {number}", item
        position = space.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", start, position)
    if text[position:].strip() != "]":
        raise UserError(f"{file}:{line}: is not JSON: expected , or ] after item {number}")


def read_json_object(file: str) -> dict[str, Any]:
    """Read a JSON file that holds one object; raises UserError."""
    try:
        content = _DECODER.decode(read_text(file))
    except _RepeatedKeyError as error:
        raise UserError(f"{file}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: is not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file}: JSON numbers are too long or nesting is too deep") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content
