"""Datasets from list files with one `path label` a line, the usual format for Kinetics."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import unquote

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.storage.paths import exists, is_remote, join, strip_file_scheme

from .class_names import look_alike_key, normalize_class_name
from .decoders import Decoder
from .frame_lists import frame_list_videos, is_frame_list
from .frames import frame_folder
from .inputs import record_input
from .listing import keep_listing
from .sampling import Sampling
from .scan import VIDEO_SUFFIXES
from .tables import is_header, is_remark, read_lines, read_table, strip_quotes
from .video import VideoDataset, VideoEntry

COLUMNS = ("path", "label")  # required columns of a list with a header
_SEPARATOR = r"[\s,;|]+"
_LABEL = re.compile(r"(\d{1,9})(?:\.0*)?")  # pandas writes whole numbers as 3.0 where a column has gaps
# "a b.mp4" 0, where "" inside the quotes is a quote → path, separator, labels
_QUOTED = re.compile(rf'"((?:[^"]|"")+)"(?:({_SEPARATOR})(.*))?')
_QUOTE_CHARACTERS = "\"'`“”„‘’‚«»"
# 'a b.mp4' 0 or „a b.mp4“ 0 → path with its quotes, separator, labels
_QUOTED_BY_OTHER_MARKS = re.compile(
    rf"([^\w\s][^{_QUOTE_CHARACTERS}]+[{_QUOTE_CHARACTERS}])({_SEPARATOR})([{_QUOTE_CHARACTERS}]?\d.*)"
)
# a b.mp4 0 → path up to the last video extension, separator, labels
_SUFFIXED = re.compile(
    rf"(.*\.(?:{'|'.join(re.escape(suffix[1:]) for suffix in VIDEO_SUFFIXES)}))({_SEPARATOR})([^/\\]*)", re.IGNORECASE
)
# a/b 0, or a/b ; 0 (groups 4 to 6), without a video extension → path, last separator, label
_LAST_SEPARATOR = re.compile(r"(.*[^\s,|])([\s,|]+)(\S+)|(.*[^\s;])(\s*;\s*)(\S+)")
# a/b 300 0 → folder of images, after which MMAction's lists give the number of frames, and label
_COUNTED = re.compile(rf"(.*\S){_SEPARATOR}\d+{_SEPARATOR}(\d{{1,9}})")
# a path that may be spelled differently on disk: with \, %20, ~ or C:
_UNUSUAL_PATH = re.compile(r"\\|%[0-9A-Fa-f]{2}|^~|^[A-Za-z]:")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")


@keep_listing
def video_list(
    root: str,
    list_file: str,
    num_classes: int | None = None,
    classes_file: str = "classes.txt",
    multi_label: bool = False,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Build a dataset from a list file; see `parse_line` for the format of a line.

    Paths in the list, `list_file` and `classes_file` are relative to `root`, or absolute, or URLs.

    Args:
        num_classes: Default: the number of class names, or the highest label plus one if there are no names.
        classes_file: A file with one class name a line. It may be missing.

    Raises:
        UserError: A file or the folder `root` cannot be read, a line cannot be parsed, or labels or class names do not
            match `num_classes`.
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
    """Return line numbers (from 1) and entries of a list file with paths relative to `root`; raises UserError."""
    entries = []
    for number, path, labels in _list_lines(file, root):
        if len(labels) > 1 and not multi_label:
            text = ";".join(map(str, labels))
            raise UserError(f"{file}:{number}: several labels, {text}, where the task has one a video")
        try:
            path = find_spelling(root, path)
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from None
        entries.append((number, VideoEntry(path, labels if multi_label else labels[0])))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    _refuse_row_numbers(file, root, entries)
    return entries


def _list_lines(file: str, root: str) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yield line numbers, paths and labels of a list file with or without a header, or of a frame list."""
    lines = read_lines(file)
    if is_frame_list(lines):
        yield from frame_list_videos(file, lines)
        return
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
            match = _COUNTED.fullmatch(line.strip())
            if match and _is_frame_folder(root, match[1]):
                yield number, _path(match[1]), (int(match[2]),)
            elif not line.lstrip().startswith("#"):
                text = repr(line.strip()[:80])
                raise UserError(f"{file}:{number}: expected 'path label', found {text}: {error}") from None


def _is_frame_folder(root: str, path: str) -> bool:
    file = join(root, path)
    record_input(os.path.dirname(file))
    return frame_folder(file) is not None


def parse_line(line: str) -> tuple[str, tuple[int, ...]]:
    """Split a line `path label` at spaces, a tab, a comma, a semicolon or a bar; returns the path and the labels.

    A path may contain spaces and separators: it ends with the last video extension, or at the last separator if it has
    no such extension. It may be in quotes. A path that ends with a number and no extension must be in quotes. Several
    labels are joined by `;`. After a space or tab they may also be joined by `,`.

    Raises:
        ValueError: The line cannot be parsed; the message says why.
    """
    text = line.strip()
    path, _, label = text.rpartition(" ")
    if (
        label.isdecimal()
        and len(label) < 10
        and os.path.splitext(path)[1].lower() in VIDEO_SUFFIXES
        and text[0] not in _QUOTE_CHARACTERS
    ):
        return _path(path), (int(label),)  # fast path for most lines
    match = _QUOTED.fullmatch(text)
    if match:
        return _path(match[1].replace('""', '"')), _parse_labels(match[3] or "", match[2] or "")
    if text.startswith('"'):
        raise ValueError("the quotes around the path are not closed, or text follows them")
    match = _QUOTED_BY_OTHER_MARKS.fullmatch(text)
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
    """Return an unquoted path. Raises ValueError if it starts or ends with half a pair of quotes."""
    if text[0] in "“”„‘‚«" or text[-1] in '"“”„‘‚«»':
        raise ValueError("the quotes around the path are not closed, or text follows them")
    return _path(text)


def _path(text: str) -> str:
    """Strip spaces and leading `./`; raises ValueError if nothing is left."""
    text = text.strip()
    while text.startswith("./"):
        text = text[2:].lstrip("/")
    if not text:
        raise ValueError("it has no path")
    return text


def _parse_labels(text: str, separator: str = "") -> tuple[int, ...]:
    """Parse the labels after the path and the separator of a line; raises ValueError."""
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
    """Return the line of a list file that `parse_line` reads as this path and label, quoted if necessary."""
    line = f"{path} {label}"
    with suppress(ValueError):
        if parse_line(line) == (path, (label,)) and not path.startswith("#"):
            return line
    return '"{}" {}'.format(path.replace('"', '""'), label)


def find_spelling(root: str, path: str) -> str:
    """Return the spelling of a path that exists on disk, for lists written by another machine or program.

    Tries Windows separators, shell escapes, percent escapes, `~`, and composed and decomposed accents (NFC, NFD). If no
    spelling exists, returns the path with slashes for backslashes.

    Raises:
        ValueError: The path has a drive letter or is on a Windows share.
    """
    if not _UNUSUAL_PATH.search(path) and len({unicodedata.normalize(form, path) for form in ("NFC", "NFD")}) == 1:
        return path  # nearly all paths; saves the disk access
    if is_remote(join(root, path)):
        return path.replace("\\", "/")
    record_input(os.path.dirname(join(root, path)))
    if os.path.lexists(join(root, path)):
        return path
    if _WINDOWS_PATH.match(path):
        raise ValueError(f"{path} is a Windows path; write paths relative to dataset.root")
    slashes = path.replace("\\ ", " ").replace("\\", "/")
    unescaped = re.sub(r"\\(.)", r"\1", path)
    record_input(os.path.dirname(join(root, slashes)))
    for spelling in (slashes, unescaped, unquote(path), unquote(slashes), os.path.expanduser(path)):
        for form in (spelling, unicodedata.normalize("NFC", spelling), unicodedata.normalize("NFD", spelling)):
            if os.path.lexists(join(root, form)):
                return form
    return slashes


def _refuse_row_numbers(file: str, root: str, entries: Sequence[tuple[int, VideoEntry]]) -> None:
    """Raise UserError if a table without a header starts each line with a row number."""
    matches = [re.match(rf"(\d{{1,9}}){_SEPARATOR}.", entry.path) for _, entry in entries]
    numbers = [int(match[1]) for match in matches if match]
    consecutive = bool(numbers) and numbers == list(range(numbers[0], numbers[0] + len(entries)))
    number, entry = entries[0]
    if len(entries) > 1 and consecutive and not exists(join(root, entry.path)):
        raise UserError(
            f"{file}:{number}: each line starts with a row number: write the table without row numbers "
            "(pandas: index=False)"
        )


def note_repeats(name: str, entries: Sequence[VideoEntry]) -> list[str]:
    """Return notes on videos that the list `name` has more than once; different spans of a video are not repeats."""
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
    """Raise UserError if a dataset's folder is missing. A URL is not checked: reading its files fails instead."""
    if not is_remote(root) and not os.path.isdir(strip_file_scheme(root)):
        home = " (~ is not expanded)" if root.startswith("~") else ""
        raise UserError(f"dataset.root: no folder {root}{home}; set dataset.root to where the videos are")


def read_classes(file: str) -> list[str]:
    """Read class names, one a line, in the order of their labels; returns [] if the file is missing."""
    record_input(file)
    return [name for line in read_lines(file) if (name := normalize_class_name(line))] if exists(file) else []


def _labels(entry: VideoEntry) -> Sequence[int]:
    return (entry.label,) if isinstance(entry.label, int) else entry.label
