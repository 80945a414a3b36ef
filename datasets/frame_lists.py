"""Frame lists in PySlowFast's format: a line `original_vido_id video_id frame_id path labels` for each frame."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mgvideo.errors import UserError

COLUMNS = ["original_vido_id", "video_id", "frame_id", "path", "labels"]


class FrameRow(NamedTuple):
    """A line of a frame list."""

    line: int
    video: str
    frame: int
    path: str
    labels: tuple[int, ...]


def is_frame_list(lines: Sequence[str]) -> bool:
    """Return whether lines start with the header of a frame list."""
    return bool(lines) and lines[0].split() == COLUMNS


def read_frame_list(file: str, lines: Sequence[str], classes: int | None = None) -> Iterator[FrameRow]:
    """Yield the rows of a frame list, whose labels are below `classes`; raises UserError."""
    rows = csv.reader(lines[1:], delimiter=" ", strict=True)
    for number in range(2, len(lines) + 1):
        row: list[str] = []
        try:
            row = next(rows)
            if rows.line_num != number - 1:  # quotes that close in a later line
                raise ValueError
            if not row:
                continue
            labels = tuple(_label(part, classes) for part in row[4].split(",") if part)
            yield FrameRow(number, row[0], int(row[2]), row[3], labels)
        except (IndexError, ValueError, csv.Error):
            line = repr(lines[number - 1][:80])
            raise UserError(f"{file}:{number}: expected 'id video frame path \"label,label\"', found {line}") from None


def frame_list_videos(file: str, lines: Sequence[str]) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yield the line, the folder and the labels of each video of a frame list; raises UserError."""
    rows: dict[str, tuple[FrameRow, set[int]]] = {}
    for row in read_frame_list(file, lines):
        rows.setdefault(row.video, (row, set()))[1].update(row.labels)
    for first, labels in rows.values():
        if not labels or not os.path.dirname(first.path):
            what = "label" if not labels else "folder"
            raise UserError(f"{file}:{first.line}: the frames of {first.video} have no {what}")
        yield first.line, os.path.dirname(first.path), tuple(sorted(labels))


def _label(text: str, classes: int | None) -> int:
    """Parse a label; raises ValueError if it is not a class."""
    label = int(text)
    if label < 0 or (classes is not None and label >= classes):
        raise ValueError(text)
    return label
