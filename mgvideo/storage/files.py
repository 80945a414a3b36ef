"""Write files so that a killed process leaves no half-written one, and read the JSON lines of such processes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any

from mgvideo.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: even after a power failure it exists complete or not at all. Raises UserError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; the previous file is intact") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table in UTF-8 atomically; bytes of file names that are not UTF-8 stay as they are. Raises UserError."""
    text = StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes `path` at the end of the block; deleted after an exception.

    It is a hidden file in the same folder, with the same suffix, by which libraries choose a format. Raises OSError.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def parse_json_lines(lines: Iterable[str]) -> Iterator[Any]:
    """Yield the value of each line, except lines that are not JSON: a killed process leaves its last one unfinished."""
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)
