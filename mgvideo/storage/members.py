"""Files inside uncompressed tar archives, as paths `ARCHIVE@OFFSET+BYTES/NAME`: a range of the archive's bytes.

The path says all that is needed to read the file, so archives are read at random, locally and at URLs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_MEMBER = re.compile(r"(.+?\.tar)@(\d+)\+(\d+)/(.+)", re.DOTALL)
_FFMPEG_URL = re.compile(r"subfile,,start,(\d+),end,\d+,,:file:(.+)", re.DOTALL)


class Member(NamedTuple):
    """A file inside an archive: the path or URL of the archive, first byte and number of bytes, name."""

    archive: str
    offset: int
    size: int
    name: str

    @property
    def path(self) -> str:
        """The path that stands for this file."""
        return f"{self.archive}@{self.offset}+{self.size}/{self.name}"

    def ffmpeg_url(self) -> str:
        """Return what FFmpeg opens in place of a file name: a protocol of its own for a range of a local file."""
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:file:{self.archive}"


def parse_member(path: str) -> Member | None:
    """Return the member that a path stands for, or None if it is an ordinary path."""
    match = _MEMBER.fullmatch(path) if ".tar@" in path else None
    return Member(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def file_on_disk(local: str) -> str:
    """Return the file that holds what a path or a result of `paths.local_copy` stands for: the archive of a member."""
    return place_on_disk(local)[0]


def place_on_disk(local: str) -> tuple[str, int]:
    """Return that file, and the position of the first byte in it."""
    match = _FFMPEG_URL.fullmatch(local) if local.startswith("subfile,") else None
    if match:
        return match[2], int(match[1])
    member = parse_member(local)
    return (member.archive, member.offset) if member else (local, 0)
