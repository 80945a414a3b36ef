"""Kinetics-400, -600 and -700: list files, or the official annotations and a folder of clips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from mgvideo.errors import UserError
from mgvideo.storage.paths import join

from .class_names import index_classes, suggest_class, unify_class_names
from .decoders import Decoder
from .inputs import State, are_unchanged, record_input, record_inputs
from .listing import keep_listing
from .lists import check_root, note_repeats, read_classes, video_list
from .sampling import Sampling
from .scan import Scan, scan_folder
from .tables import TableRow, is_header, read_lines, read_table
from .video import VideoDataset, VideoEntry

COLUMNS = ("label", "youtube_id", "time_start", "time_end")
SYNONYMS = {"validate": "val", "validation": "val"}  # names of splits in the official CSVs


@keep_listing
def kinetics(
    root: str,
    list_file: str,
    num_classes: int,
    classes_file: str = "classes.txt",
    split: str | None = None,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Build a dataset from a list file (see `lists.video_list`) or an official CSV, recognised by its header.

    For a CSV, clips may be anywhere under `root`, named `ID_START_END` (six digits each, as downloaded) or `ID`.
    Clips that do not exist are left out, counted in `notes` and listed in `missing`.

    Args:
        split: For a CSV with a column `split`: use the rows with this value (train, val, test, …) or an empty one.
            None: use all rows.

    Raises:
        UserError: A file cannot be read, a row or class is wrong, or no clip exists.
    """
    check_root(root)
    file = join(root, list_file)
    lines = read_lines(file)
    if not is_header(lines, COLUMNS):
        return video_list(root, list_file, num_classes, classes_file, decoder=decoder, flip=flip)
    rows = _read_rows(file, lines)
    classes, notes = unify_class_names(_class_origins(file, rows))
    names = read_classes(join(root, classes_file)) or sorted(set(classes.values()))
    if len(names) != num_classes:
        raise UserError(
            f"{file}: {len(names)} classes, not {num_classes}; name them, one a line, in {classes_file}, "
            "or set dataset.num_classes"
        )
    labels = index_classes(names, join(root, classes_file))
    scan = _scan_once(root)
    path_by_name = {os.path.splitext(os.path.basename(path))[0]: path for path in scan.videos}
    entries, missing = [], []
    for number, row in rows:
        name = classes[row["label"]]
        if name not in labels:
            raise UserError(f"{file}:{number}: class {name!r} is not in {classes_file}{suggest_class(name, names)}")
        if split is not None and _split(row) not in ("", SYNONYMS.get(split, split)):
            continue
        clip = _clip_name(row)
        path = path_by_name.get(clip) or path_by_name.get(row["youtube_id"])
        if path:
            entries.append(VideoEntry(path, labels[name]))
        else:
            missing.append(VideoEntry(f"{clip}.mp4", labels[name]))
    num_listed = len(entries) + len(missing)
    if not num_listed:
        splits = ", ".join(sorted({_split(row) for _, row in rows}))
        raise UserError(f"{file}: no clips of split={split}, only of {splits}; choose one of them, or null for all")
    skipped = scan.notes(root) if missing else []
    if not entries:
        hint = "".join(f"; {note}" for note in skipped)
        raise UserError(
            f"{file}: none of its {num_listed} clips is under {root}; expected, for example, {missing[0].path}{hint}"
        )
    notes += [f"{list_file}: {len(missing)} of {num_listed} clips are not under {root} and left out"] if missing else []
    notes += [*skipped, *note_repeats(list_file, entries)]
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip), notes, missing)


_latest_scan: list[tuple[str, Scan, dict[str, State]]] = []  # kept for the other split, and used once


def _scan_once(root: str) -> Scan:
    """Scan the folder `root`, or return the scan of the split before if nothing has changed since."""
    while _latest_scan:
        name, scan, inputs = _latest_scan.pop()
        if name == root and are_unchanged(inputs):
            break
    else:
        with record_inputs() as inputs:
            scan = scan_folder(root)
        _latest_scan.append((root, scan, inputs))
    for path in inputs:
        record_input(path, inputs[path])
    return scan


def _read_rows(file: str, lines: Sequence[str]) -> list[TableRow]:
    """Read the rows of an official CSV; raises UserError."""
    rows = list(read_table(file, lines, COLUMNS))
    for number, row in rows:
        try:
            complete = bool(row["label"] and row["youtube_id"] and _clip_name(row))
        except (KeyError, ValueError, OverflowError):
            complete = False
        if not complete:
            raise UserError(f"{file}:{number}: expected label,youtube_id,time_start,time_end, found {str(row)[:200]}")
    return rows


def _class_origins(file: str, rows: Iterable[TableRow]) -> dict[str, str]:
    """Return class name → the line where it first occurs, for errors."""
    origins: dict[str, str] = {}
    for number, row in rows:
        origins.setdefault(row["label"], f"{file}:{number}")
    return origins


def _split(row: dict[str, str]) -> str:
    name = (row.get("split") or "").strip().lower()
    return SYNONYMS.get(name, name)


def _clip_name(row: dict[str, str]) -> str:
    start, end = int(float(row["time_start"])), int(float(row["time_end"]))
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"
