"""Kinetics-400, -600, -700: path-label lists, or the official annotations over a folder of clips."""

from __future__ import annotations

import csv
import os

from mgvideo.errors import UserError
from mgvideo.paths import join

from .decoders import Decoder
from .lists import check_root, find_videos, read_classes, read_lines, video_list
from .sampling import Sampling
from .video import Entry, VideoDataset

COLUMNS = {"label", "youtube_id", "time_start", "time_end"}
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
    """The videos of a list file (see `lists.video_list`) or of an official CSV, told apart by the CSV's header.

    For a CSV, clips are looked for anywhere under `root` as `ID_START_END` (six digits each, as the usual downloads
    name them) or `ID`. Clips that are not there are left out, counted in `notes` and kept in `missing`. Of its column
    `split` only `split` (train, val, test, …) and empty fields are taken; None: all. Raises UserError.
    """
    check_root(root)
    file = join(root, list_file)
    lines = read_lines(file)
    if not lines or not set(next(csv.reader(lines[:1]), [])) >= COLUMNS:
        return video_list(root, list_file, num_classes, classes_file, decoder=decoder, flip=flip)
    rows = list(csv.DictReader(lines))
    for number, row in enumerate(rows, start=2):
        try:
            named = bool(row["label"] and row["youtube_id"] and _clip_name(row))
        except (TypeError, ValueError, OverflowError):
            named = False
        if not named:
            raise UserError(f"{file}:{number}: expected label,youtube_id,time_start,time_end, found {row}")
    names = read_classes(join(root, classes_file)) or sorted({row["label"] for row in rows})
    if len(names) != num_classes:
        raise UserError(
            f"{file}: {len(names)} classes, not {num_classes}; name them, one a line, in {classes_file}, "
            "or set dataset.num_classes"
        )
    places = {name: place for place, name in enumerate(names)}
    found = {os.path.splitext(os.path.basename(path))[0]: path for path in find_videos(root)}
    entries, missing = [], []
    for number, row in enumerate(rows, start=2):
        if row["label"] not in places:
            raise UserError(f"{file}:{number}: class {row['label']!r} is not in {classes_file}")
        if split is not None and _split(row) not in ("", SYNONYMS.get(split, split)):
            continue
        path = found.get(_clip_name(row)) or found.get(row["youtube_id"])
        if path:
            entries.append(Entry(path, places[row["label"]]))
        else:
            missing.append(Entry(f"{_clip_name(row)}.mp4", places[row["label"]]))
    listed = len(entries) + len(missing)
    if not listed:
        splits = ", ".join(sorted({_split(row) for row in rows}))
        raise UserError(f"{file}: no clips of split={split}, but of {splits}; choose one of them, or null for all")
    if not entries:
        raise UserError(f"{file}: none of its {listed} clips is under {root}; expected, say, {missing[0].path}")
    notes = [f"{list_file}: {len(missing)} of {listed} clips are not under {root} and left out"] if missing else []
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip), notes, missing)


def _split(row: dict[str, str]) -> str:
    name = (row.get("split") or "").strip().lower()
    return SYNONYMS.get(name, name)


def _clip_name(row: dict[str, str]) -> str:
    start, end = int(float(row["time_start"])), int(float(row["time_end"]))
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"
