"""Datasets from list files, as Kinetics is usually kept: one `path label` a line."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import unquote

from mgvideo.errors import UserError
from mgvideo.storage.paths import exists, is_remote, join, strip_file_scheme

from .class_names import look_alike_key, normalize_class_name
from .decoders import Decoder
from .sampling import Sampling
from .scan import VIDEO_SUFFIXES, shorten
from .tables import is_header, is_remark, read_lines, read_table, strip_quotes
from .video import VideoDataset, VideoEntry

COLUMNS = ("path", "label")  # of a list with a header
_SEPARATOR = r"[\s,;|]+"
_LABEL = re.compile(r"(\d{1,9})(?:\.0*)?")  # pandas writes whole numbers as 3.0 where a column has gaps
_QUOTED = re.compile(rf'"((?:[^"]|"")+)"(?:({_SEPARATOR})(.*))?')
_MARKS = "\"'`“”„‘’‚«»"  # what quotes are made of
_OTHERWISE_QUOTED = re.compile(rf"([^\w\s][^{_MARKS}]+[{_MARKS}])({_SEPARATOR})([{_MARKS}]?\d.*)")
_SUFFIXED = re.compile(
    rf"(.*\.(?:{'|'.join(re.escape(suffix[1:]) for suffix in VIDEO_SUFFIXES)}))({_SEPARATOR})([^/\\]*)", re.IGNORECASE
)
_LAST_SEPARATOR = re.compile(r"(.*[^\s,|])([\s,|]+)(\S+)|(.*[^\s;])(\s*;\s*)(\S+)")
_ODD = re.compile(r"\\|%[0-9A-Fa-f]{2}|^~|^[A-Za-z]:")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


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

    See `parse_line` for a line. Class names are the lines of `classes_file`, if it exists. Without `num_classes` the
    names count them, or else the highest label. Raises UserError.
    """
    check_root(root)
    file = join(root, list_file)
    entries = read_list(file, multi_label, root)
    names = read_classes(join(root, classes_file))
    classes = num_classes or len(names) or 1 + max(max(_labels(entry)) for _, entry in entries)
    for number, entry in entries:
        if max(_labels(entry)) >= classes:
            raise UserError(
                f"{file}:{number}: label {entry.label} is not in 0 to {classes - 1}; see dataset.num_classes"
            )
    if names and len(names) != classes:
        raise UserError(f"{classes_file} in {root}: {len(names)} names for {classes} classes; see dataset.num_classes")
    notes = note_repeats(list_file, [entry for _, entry in entries])
    alike = [name for name, count in Counter(map(look_alike_key, names)).items() if count > 1]
    notes += [f"{classes_file}: names of several classes look alike: {shorten(alike)}"] if alike else []
    names = names or [str(i) for i in range(classes)]
    return VideoDataset(root, [entry for _, entry in entries], names, decoder, Sampling(flip=flip), notes)


def read_list(file: str, multi_label: bool, root: str = "") -> list[tuple[int, VideoEntry]]:
    """Line numbers, from 1, and entries of a list file whose paths are relative to `root`; raises UserError."""
    entries = []
    for number, path, labels in _list_lines(file):
        if len(labels) > 1 and not multi_label:
            found = ";".join(map(str, labels))
            raise UserError(f"{file}:{number}: several labels, {found}, where the task has one a video")
        try:
            path = find_spelling(root, path)
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from None
        entries.append((number, VideoEntry(path, labels if multi_label else labels[0])))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    _refuse_row_numbers(file, root, entries)
    return entries


def _list_lines(file: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Line numbers, paths and labels of a list file, with a header or without one."""
    lines = read_lines(file)
    if is_header(lines, COLUMNS):
        for number, fields in read_table(file, lines, COLUMNS):
            try:
                yield number, _path(strip_quotes(fields.get("path", ""))), _parse_labels(fields.get("label", ""))
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from None
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip() or is_remark(line):
            continue
        try:
            yield number, *parse_line(line)
        except ValueError as error:
            if not line.lstrip().startswith("#"):
                found = repr(line.strip()[:80])
                raise UserError(f"{file}:{number}: expected 'path label', found {found}: {error}") from None


def parse_line(line: str) -> tuple[str, tuple[int, ...]]:
    """Path and labels of a line `path label`, separated by spaces, a tab, a comma, a semicolon or a bar.

    A path may hold spaces and separators: it ends with the last extension of a video, else at the last separator. It
    may be in quotes, and must be where it ends with a number and no extension. Several labels are joined by `;`, or by
    `,` behind a space or tab.

    Raises:
        ValueError: what is wrong with the line.
    """
    text = line.strip()
    path, _, label = text.rpartition(" ")
    if (
        label.isdecimal()
        and len(label) < 10
        and os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES
        and text[0] not in _MARKS
    ):
        return _path(path), (int(label),)  # most lines, without the search below
    match = _QUOTED.fullmatch(text)
    if match:
        return _path(match[1].replace('""', '"')), _parse_labels(match[3] or "", match[2] or "")
    if text.startswith('"'):
        raise ValueError("the quotes around the path are not closed, or text follows them")
    match = _OTHERWISE_QUOTED.fullmatch(text)
    if match and strip_quotes(match[1]) != match[1]:
        return _path(strip_quotes(match[1])), _parse_labels(match[3], match[2])
    match = _SUFFIXED.fullmatch(text)
    if match:
        return _open_path(match[1]), _parse_labels(match[3], match[2])
    match = _LAST_SEPARATOR.fullmatch(text)
    if not match:
        raise ValueError("it has no label")
    path, _, label = filter(None, match.groups())
    if re.search(r"[\s,;|]-?\d+(?:\.\d+)?$", path):
        raise ValueError(
            "several numbers follow the path; give the label alone, and quote a path that ends in a number"
        )
    return _open_path(path), _parse_labels(label)


def _open_path(text: str) -> str:
    """A path without quotes around it. Raises ValueError where it begins or ends with one of a pair."""
    if text[0] in "“”„‘‚«" or text[-1] in '"“”„‘‚«»':
        raise ValueError("the quotes around the path are not closed, or text follows them")
    return _path(text)


def _path(text: str) -> str:
    text = text.strip()
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    if not text:
        raise ValueError("it has no path")
    return text


def _parse_labels(text: str, separator: str = "") -> tuple[int, ...]:
    """The labels in the rest of a line that follows the path and a separator. Raises ValueError."""
    text = strip_quotes(text.strip(" \t,;|"))
    parts = [strip_quotes(part.strip()) for part in re.split("[;,]", text)]
    matches = [_LABEL.fullmatch(part) for part in parts]
    if all(matches) and not ("," in text and "," in separator):
        return tuple(int(match[1]) for match in matches if match)
    if not text:
        raise ValueError("it has no label")
    if re.fullmatch(r"-?[\d.]+(?:[\s,;|]+-?[\d.]+)+", text):
        raise ValueError(
            f"several numbers, {text}, follow the path; give the label alone (a count of frames is not used)"
        )
    if re.fullmatch(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?|nan", text, re.IGNORECASE):
        raise ValueError(f"label {text[:20]} is not a whole number in 0 to 999999999")
    raise ValueError(f"label {text[:40]!r} is not a number; a table of class names is read with dataset=folder")


def list_line(path: str, label: int) -> str:
    """The line of a list file that `parse_line` reads as this path and label."""
    line = f"{path} {label}"
    with suppress(ValueError):
        if parse_line(line) == (path, (label,)) and not path.startswith("#"):
            return line
    return '"{}" {}'.format(path.replace('"', '""'), label)


def find_spelling(root: str, path: str) -> str:
    """The path as it is spelled on disk, where a list from another machine or program spells it otherwise.

    Tries backslashes of Windows and of shells, percent escapes, `~`, and letters with accents as one character or two.
    A path that fits no file keeps its spelling, with slashes for backslashes.

    Raises:
        ValueError: a path with a drive letter, or on a Windows share.
    """
    if not _ODD.search(path) and len({unicodedata.normalize(form, path) for form in ("NFC", "NFD")}) == 1:
        return path  # nearly all, and without a look at the disk
    if is_remote(join(root, path)):
        return path.replace("\\", "/")
    if os.path.lexists(join(root, path)):
        return path
    if _WINDOWS.match(path):
        raise ValueError(f"{path} is a path of Windows; write paths relative to dataset.root")
    slashes = path.replace("\\ ", " ").replace("\\", "/")
    unescaped = re.sub(r"\\(.)", r"\1", path)
    for spelling in (slashes, unescaped, unquote(path), unquote(slashes), os.path.expanduser(path)):
        for form in (spelling, unicodedata.normalize("NFC", spelling), unicodedata.normalize("NFD", spelling)):
            if os.path.lexists(join(root, form)):
                return form
    return slashes


def _refuse_row_numbers(file: str, root: str, entries: Sequence[tuple[int, VideoEntry]]) -> None:
    """Raise UserError where a table without a header was written with the index of its rows."""
    matches = [re.match(rf"(\d{{1,9}}){_SEPARATOR}.", entry.path) for _, entry in entries]
    numbers = [int(match[1]) for match in matches if match]
    counted = len(entries) > 1 and numbers == list(range(numbers[0], numbers[0] + len(entries))) if numbers else False
    number, entry = entries[0]
    if counted and not exists(join(root, entry.path)):
        raise UserError(
            f"{file}:{number}: each line begins with the number of its row: write the table without them "
            "(pandas: index=False)"
        )


def note_repeats(name: str, entries: Sequence[VideoEntry]) -> list[str]:
    """Notes on videos that the list `name` has more than once; stretches of one video are as many videos."""
    if len({entry.path for entry in entries}) == len(entries):
        return []
    labels: dict[tuple[str, tuple[float, float]], list[int | tuple[int, ...]]] = {}
    for entry in entries:
        labels.setdefault((entry.path, entry.span), []).append(entry.label)
    repeated = {key[0]: group for key, group in labels.items() if len(group) > 1}
    if not repeated:
        return []
    conflicts = [path for path, group in repeated.items() if len(set(group)) > 1]
    differ = f"; under different labels: {shorten(conflicts)}" if conflicts else ""
    return [f"{name}: listed more than once: {shorten(repeated)}{differ}; mgvideo prepare check names them all"]


def check_root(root: str) -> None:
    """Raise UserError where a dataset's folder is missing; a missing remote one shows when its files are read."""
    if not is_remote(root) and not os.path.isdir(strip_file_scheme(root)):
        home = " (nothing replaces the ~)" if root.startswith("~") else ""
        raise UserError(f"dataset.root: no folder {root}{home}; set dataset.root to where the videos are")


def read_classes(file: str) -> list[str]:
    """Class names, one a line, in the order of their labels; none where there is no such file."""
    return [name for line in read_lines(file) if (name := normalize_class_name(line))] if exists(file) else []


def _labels(entry: VideoEntry) -> Sequence[int]:
    return (entry.label,) if isinstance(entry.label, int) else entry.label
