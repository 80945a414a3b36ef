"""The bad videos of a run: bad_videos.csv names each once, with how often it could not be read."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from mgvideo.errors import UserError
from mgvideo.loading.requests import DecodeFailure
from mgvideo.storage.files import write_atomic


@dataclass
class BadVideo:
    """A video that could not be read; its fields are the columns of bad_videos.csv."""

    part: str  # of the dataset: train, or val for validation and the test
    index: int  # in that part
    path: str
    reason: str  # of the first failure
    count: int  # failures up to now: one per clip in training, one per evaluation
    step: int  # of the first failure, or of the log line after it


COLUMNS = tuple(field.name for field in fields(BadVideo))


class BadVideos:
    """The bad videos up to the current step, and their file. A checkpoint holds them, so that a resume is exact."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._videos: dict[tuple[str, int, str], BadVideo] = {}
        self._is_written = True

    def read(self, step: int) -> None:
        """Read the file of an earlier run, without videos that failed first after `step` and without damaged lines."""
        if not self.path.exists():
            return
        text = self.path.read_bytes().decode(errors="surrogateescape").replace("\0", "")
        self._videos = {}
        for row in csv.reader(StringIO(text, newline="")):
            if len(row) == len(COLUMNS) and all(row[i].isdecimal() for i in (1, 4, 5)) and int(row[5]) <= step:
                self._insert(BadVideo(row[0], int(row[1]), row[2], row[3], int(row[4]), int(row[5])))
        self._is_written = False
        self.write()

    def add(self, step: int, part: str, failures: Iterable[DecodeFailure]) -> list[BadVideo]:
        """Count failures, and add videos to the file that it lacks. Returns those that failed for the first time."""
        new = []
        for failure in failures:
            self._is_written = False
            known = self._videos.get((part, failure.index, failure.path))
            if known is not None:
                known.count += 1
            else:
                new.append(self._insert(BadVideo(part, failure.index, failure.path, failure.reason, 1, step)))
        if new:
            self._append(new)
        return new

    def _append(self, videos: Sequence[BadVideo]) -> None:
        """Append new videos to the file: with many bad videos, to rewrite it for each would take hours.

        The counts of the others are written later, by `write`. `read` ignores a line that a killed run left unfinished.
        """
        if len(videos) == len(self._videos):
            self.write()
            return
        text = StringIO(newline="")
        csv.writer(text).writerows(astuple(video) for video in videos)
        try:
            with open(self.path, "ab") as file:
                file.write(text.getvalue().encode(errors="surrogateescape"))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error

    def of_part(self, part: str) -> tuple[BadVideo, ...]:
        """Return the bad videos of a part of the dataset."""
        return tuple(video for video in self._videos.values() if video.part == part)

    def state(self) -> list[tuple[Any, ...]]:
        """Return plain values for a checkpoint."""
        return [astuple(video) for video in self._videos.values()]

    def load(self, state: Iterable[Sequence[Any]]) -> None:
        """Restore the videos of a checkpoint, and write the file."""
        self._videos = {}
        for values in state:
            self._insert(BadVideo(*values))
        self._is_written = not (self._videos or self.path.exists())
        self.write()

    def write(self) -> None:
        """Write the file, unless it is up to date."""
        if self._is_written:
            return
        text = StringIO(newline="")
        csv.writer(text).writerows([COLUMNS, *self.state()])
        write_atomic(self.path, text.getvalue().encode(errors="surrogateescape"))
        self._is_written = True

    def _insert(self, video: BadVideo) -> BadVideo:
        return self._videos.setdefault((video.part, video.index, video.path), video)
