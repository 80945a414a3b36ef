"""Datasets from list files, as Kinetics is usually kept: one `path label` a line."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

from mgvideo.errors import UserError
from mgvideo.paths import exists, is_remote, join, plain, read_bytes

from .decoders import Decoder
from .sampling import Sampling
from .video import Entry, VideoDataset

SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}


def video_list(
    root: str,
    list_file: str,
    num_classes: int | None = None,
    classes_file: str = "classes.txt",
    multi_label: bool = False,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """The videos of a list file; paths in it, and the file itself, are relative to `root`, or absolute, or URLs.

    A line is `path label`, separated by spaces, a tab or a comma; the last separator counts, so that paths may hold
    spaces. Several labels are joined by `;`. Class names are the lines of `classes_file`, if it is there. Without
    `num_classes` the names count them, or else the highest label.
    """
    check_root(root)
    file = join(root, list_file)
    entries = read_list(file, multi_label)
    names = read_classes(join(root, classes_file))
    classes = num_classes or len(names) or 1 + max(max(_labels(entry)) for _, entry in entries)
    for number, entry in entries:
        if not 0 <= min(_labels(entry)) <= max(_labels(entry)) < classes:
            raise UserError(
                f"{file}:{number}: label {entry.label} is not in 0 to {classes - 1}; see dataset.num_classes"
            )
    if names and len(names) != classes:
        raise UserError(f"{classes_file} in {root}: {len(names)} names for {classes} classes; see dataset.num_classes")
    names = names or [str(i) for i in range(classes)]
    return VideoDataset(root, [entry for _, entry in entries], names, decoder, Sampling(flip=flip))


def read_list(file: str, multi_label: bool) -> list[tuple[int, Entry]]:
    """Line numbers, from 1, and entries of a list file; raises UserError."""
    entries = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(.*[^\s,])[\s,]+(\d+(?:;\d+)*)\s*", line)
        if not match:
            raise UserError(f"{file}:{number}: expected 'path label', found {line.strip()[:80]!r}")
        labels = tuple(int(label) for label in match[2].split(";"))
        if len(labels) > 1 and not multi_label:
            raise UserError(f"{file}:{number}: several labels, {match[2]}, where the task has one a video")
        entries.append((number, Entry(match[1], labels if multi_label else labels[0])))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    return entries


def check_root(root: str) -> None:
    """Raise UserError where a dataset's folder is missing; whether a remote one is there, its files will tell."""
    if not is_remote(root) and not os.path.isdir(plain(root)):
        raise UserError(f"dataset.root: no folder {root}; set dataset.root to where the videos are")


def find_videos(root: str, top: str = "") -> list[str]:
    """Paths under `root`, relative to it, of the video files in its folder `top`, at any depth, sorted.

    Raises UserError where a folder cannot be looked into, or the root is a URL: not every server lists what it has.
    """
    if is_remote(root):
        raise UserError(f"{root}: the files of a URL cannot be looked for; name them in a list file (docs/datasets)")
    root = plain(root)
    found, seen = [], set()
    for folder, folders, names in os.walk(os.path.join(root, top), onerror=_refuse, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(place)
        found += [os.path.join(folder, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(os.path.relpath(path, root) for path in found)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be looked into: {error.strerror}") from error


def read_lines(file: str) -> list[str]:
    """Lines of a text file; raises UserError."""
    try:
        text = read_bytes(file).decode("utf-8-sig")  # some programs begin a table with a byte order mark
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: is not a UTF-8 text file") from None
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]


def read_classes(file: str) -> list[str]:
    """Class names, one a line, in the order of their labels; none where there is no such file."""
    return [line.strip() for line in read_lines(file) if line.strip()] if exists(file) else []


def _labels(entry: Entry) -> Sequence[int]:
    return (entry.label,) if isinstance(entry.label, int) else entry.label
