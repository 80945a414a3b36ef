"""One's own videos: a folder per class, or a table of paths and labels."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgvideo.errors import UserError
from mgvideo.paths import exists, is_remote, join, plain

from .decoders import Decoder
from .lists import SUFFIXES, check_root, find_videos, read_lines
from .sampling import Sampling
from .video import Entry, VideoDataset


def video_folder(
    root: str,
    split: str,
    val_share: float = 0.2,
    seed: int = 0,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """The `train` or `val` videos under `root`, kept in one of three ways.

    Tables `train` and `val`, `.csv` with a header or `.jsonl`: `path`, `label` (a name) and optionally `start` and
    `end` in seconds. Folders `train/CLASS/` and `val/CLASS/`. Or folders `CLASS/` alone, of each of which `val_share`
    is held out for `val`, chosen by the paths and `seed`. Raises UserError.
    """
    check_root(root)
    root = plain(root)
    splits = {name: rows for name in ("train", "val") if (rows := _table(root, name)) is not None}
    if not splits and is_remote(root):
        raise UserError(f"{root}: the folders of a URL cannot be looked through; give tables train.csv and val.csv")
    splits = splits or {name: _tree(Path(root), name) for name in ("train", "val") if (Path(root) / name).is_dir()}
    splits = splits or _held_out(_tree(Path(root), ""), val_share, seed)
    if split not in splits:
        raise UserError(f"{root}: has {' and '.join(splits)} videos but none for {split}")
    if not splits[split]:
        raise UserError(
            f"{root}: no videos for {split}; expected a folder of videos ({', '.join(sorted(SUFFIXES))}) per class"
        )
    names = sorted({name for rows in splits.values() for _, name, _ in rows})
    places = {name: place for place, name in enumerate(names)}
    entries = [Entry(path, places[name], span) for path, name, span in splits[split]]
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip))


Row = tuple[str, str, tuple[float, float]]  # path under the root, class name, seconds from and to


def _tree(root: Path, top: str) -> list[Row]:
    """The videos of the class folders in `root / top`, at any depth."""
    rows = []
    for folder in sorted(path for path in (root / top).iterdir() if path.is_dir() and not path.name.startswith(".")):
        rows += [
            (path, folder.name, (0.0, math.inf)) for path in find_videos(str(root), os.path.join(top, folder.name))
        ]
    return rows


def _held_out(rows: list[Row], val_share: float, seed: int) -> dict[str, list[Row]]:
    """Split each class alike; a video keeps its side of the split when others join, as far as shares allow."""
    if not 0 < val_share < 1:
        raise UserError(f"dataset: val_share must lie between 0 and 1, not {val_share}")
    splits: dict[str, list[Row]] = {"train": [], "val": []}
    for name in sorted({name for _, name, _ in rows}):
        group = sorted((row for row in rows if row[1] == name), key=lambda row: _hash(f"{seed}:{row[0]}"))
        held = min(math.ceil(val_share * len(group)), len(group) - 1)
        splits["val"] += sorted(group[:held])
        splits["train"] += sorted(group[held:])
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _table(root: str, split: str) -> list[Row] | None:
    """Rows of `split.csv` or `split.jsonl`, if there is one; raises UserError."""
    for suffix, read in ((".csv", _read_csv), (".jsonl", _read_jsonl)):
        file = join(root, f"{split}{suffix}")
        if exists(file):
            return [_row(f"{file}:{number}", fields) for number, fields in read(file)]
    return None


def _read_csv(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(read_lines(file), skipinitialspace=True)
    if not {"path", "label"} <= set(reader.fieldnames or ()):
        raise UserError(f"{file}:1: expected a header with path and label, and start and end if wanted")
    for fields in reader:
        yield reader.line_num, fields


def _read_jsonl(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                raise UserError(f"{file}:{number}: is not JSON: {line[:80]!r}") from None
            yield number, fields


def _row(place: str, fields: Any) -> Row:
    path, label = (fields.get(key) if isinstance(fields, dict) else None for key in ("path", "label"))
    if path in (None, "") or label in (None, ""):
        raise UserError(f"{place}: expected a path and a label, found {fields}")
    try:
        start, end = float(fields.get("start") or 0), float(fields.get("end") or math.inf)
    except (TypeError, ValueError):
        raise UserError(f"{place}: start and end must be seconds, found {fields}") from None
    if not 0 <= start < end:
        raise UserError(f"{place}: expected 0 <= start < end in seconds, found {start:g} and {end:g}")
    return str(path), str(label), (start, end)
