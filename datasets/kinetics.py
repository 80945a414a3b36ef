"""Kinetics-400, -600, -700: path-label lists, or the official annotations over a folder of clips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from mgvideo.errors import UserError
from mgvideo.storage.paths import join

from .class_names import index_classes, suggest_class, unify_class_names
from .decoders import Decoder
from .lists import check_root, note_repeats, read_classes, video_list
from .sampling import Sampling
from .scan import scan_folder
from .tables import TableRow, is_header, read_lines, read_table
from .video import VideoDataset, VideoEntry

COLUMNS = ("label", "youtube_id", "time_start", "time_end")
SYNONYMS = {"validate": "val", "validation": "val"}  # of splits, in the official CSVs


def kinetics(
    root: str,
    list_file: str,
    num_classes: int,
    classes_file: str = "classes.txt",
    split: str | None = None,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """The videos of a list file (see `lists.video_list`) or of an official CSV, which is known by its header.

    For a CSV, clips are searched for anywhere under `root` as `ID_START_END` (six digits each, as the usual downloads
    name them) or `ID`. Clips that are not there are left out, counted in `notes` and kept in `missing`. Of its column
    `split` only `split` (train, val, test, …) and empty fields are taken; None: all. Raises UserError.
    """
    check_root(root)
    file = join(root, list_file)
    lines = read_lines(file)
    if not is_header(lines, COLUMNS):
        return video_list(root, list_file, num_classes, classes_file, decoder=decoder, flip=flip)
    rows = _read_rows(file, lines)
    classes, notes = unify_class_names(_places(file, rows))
    names = read_classes(join(root, classes_file)) or sorted(set(classes.values()))
    if len(names) != num_classes:
        raise UserError(
            f"{file}: {len(names)} classes, not {num_classes}; name them, one a line, in {classes_file}, "
            "or set dataset.num_classes"
        )
    labels = index_classes(names, join(root, classes_file))
    scan = scan_folder(root)
    found = {os.path.splitext(os.path.basename(path))[0]: path for path in scan.videos}
    entries, missing = [], []
    for number, row in rows:
        name = classes[row["label"]]
        if name not in labels:
            raise UserError(f"{file}:{number}: class {name!r} is not in {classes_file}{suggest_class(name, names)}")
        if split is not None and _split(row) not in ("", SYNONYMS.get(split, split)):
            continue
        clip = _clip_name(row)
        path = found.get(clip) or found.get(row["youtube_id"])
        if path:
            entries.append(VideoEntry(path, labels[name]))
        else:
            missing.append(VideoEntry(f"{clip}.mp4", labels[name]))
    listed = len(entries) + len(missing)
    if not listed:
        splits = ", ".join(sorted({_split(row) for _, row in rows}))
        raise UserError(f"{file}: no clips of split={split}, but of {splits}; choose one of them, or null for all")
    passed = scan.notes(root) if missing else []
    if not entries:
        hint = "".join(f"; {note}" for note in passed)
        raise UserError(f"{file}: none of its {listed} clips is under {root}; expected, say, {missing[0].path}{hint}")
    notes += [f"{list_file}: {len(missing)} of {listed} clips are not under {root} and left out"] if missing else []
    notes += [*passed, *note_repeats(list_file, entries)]
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip), notes, missing)


def _read_rows(file: str, lines: Sequence[str]) -> list[TableRow]:
    """The rows of an official CSV; raises UserError."""
    rows = list(read_table(file, lines, COLUMNS))
    for number, row in rows:
        try:
            complete = bool(row["label"] and row["youtube_id"] and _clip_name(row))
        except (KeyError, ValueError, OverflowError):
            complete = False
        if not complete:
            raise UserError(f"{file}:{number}: expected label,youtube_id,time_start,time_end, found {str(row)[:200]}")
    return rows


def _places(file: str, rows: Iterable[TableRow]) -> dict[str, str]:
    """Where each class is first named."""
    places: dict[str, str] = {}
    for number, row in rows:
        places.setdefault(row["label"], f"{file}:{number}")
    return places


def _split(row: dict[str, str]) -> str:
    name = (row.get("split") or "").strip().lower()
    return SYNONYMS.get(name, name)


def _clip_name(row: dict[str, str]) -> str:
    start, end = int(float(row["time_start"])), int(float(row["time_end"]))
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"
