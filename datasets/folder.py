"""Custom datasets: a folder per class, or a table of paths and labels."""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.storage.paths import exists, is_remote, join, strip_file_scheme

from .class_names import normalize_class_name, unify_class_names
from .decoders import Decoder
from .frame_lists import frame_list_videos, is_frame_list
from .inputs import record_input
from .listing import keep_listing
from .lists import check_root, find_spelling, note_repeats
from .sampling import Sampling
from .scan import COMMON_SUFFIXES, is_leftover, scan_folder
from .tables import read_lines, read_records, read_table, strip_quotes
from .video import VideoDataset, VideoEntry

# .json counts as a table only if there are no split folders
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_SPLIT = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:at(?:e|ion))?)?|eval(?:uation)?)|(?P<test>test(?:ing)?))"
    r"(?:[ _-]?(?:set|split|data|videos|clips))?",
    re.IGNORECASE,
)
_SPLIT_WORD = re.compile(r"(?<![a-z])(train(?:ing)?|(val(?:id(?:ation)?)?|eval|test(?:ing)?))(?![a-z])")
_NO_LABEL = re.compile(r"\[.*\]|{.*}|\(['\"].*\)|nan", re.IGNORECASE)  # lists and missing values, as pandas writes them


class LabelledVideo(NamedTuple):
    """A video and the name of its class, from a table or a folder."""

    path: str  # relative to the root
    label: str
    origin: str  # for errors: the line of the table or the folder that names the class
    span: tuple[float, float] = (0.0, math.inf)  # seconds


@dataclass
class SplitLayout:
    """The videos of each split; for errors, why a split may be empty; notes to print when a run starts."""

    splits: dict[str, list[LabelledVideo]]
    reasons: dict[str, str]
    notes: list[str] = field(default_factory=list)


@keep_listing
def video_folder(
    root: str,
    split: str,
    val_share: float = 0.2,
    seed: int = 0,
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Build a dataset from the `train` or `val` videos under `root`, in one of three layouts.

    - Tables `train` and `val`, `.csv` or `.tsv` with a header, `.jsonl` or `.json`, with the fields `path`, `label` (a
      name) and optionally `start` and `end` in seconds.
    - Folders `train/CLASS/` and `val/CLASS/`.
    - Folders `CLASS/`. The fraction `val_share` of each class is held out for `val`, chosen by the paths and `seed`.

    Names of tables and split folders may be in any case and in their usual forms (`Validation`, `test_set`).

    Raises:
        UserError: No layout fits, the split has no videos, or a table or class name is wrong.
    """
    check_root(root)
    root = strip_file_scheme(root)
    layout = _find_tables(root)
    if not layout and is_remote(root):
        raise UserError(f"{root}: the folders of a URL cannot be listed; give tables train.csv and val.csv")
    layout = layout or _find_folders(root, val_share, seed)
    if split not in layout.splits:
        raise UserError(
            f"{root}: has {' and '.join(layout.splits)} videos but none for {split}; add {split}.csv beside a table, "
            f"{split}/ beside a folder, or give only class folders, of which a part is held out"
        )
    if not layout.splits[split]:
        raise UserError(f"{root}: no videos for {split}; {layout.reasons[split]}")
    origins: dict[str, str] = {}
    for row in (row for rows in layout.splits.values() for row in rows):
        origins.setdefault(row.label, row.origin)
    classes, notes = unify_class_names(origins)
    names = sorted(set(classes.values()))
    labels = {written: names.index(name) for written, name in classes.items()}
    entries = {
        name: [VideoEntry(row.path, labels[row.label], row.span) for row in rows]
        for name, rows in layout.splits.items()
    }
    notes += [*layout.notes, *_note_classes(root, entries, names), *note_repeats(f"{root}: {split}", entries[split])]
    return VideoDataset(root, entries[split], names, decoder, Sampling(flip=flip), notes)


def _note_classes(root: str, entries: Mapping[str, Sequence[VideoEntry]], names: Sequence[str]) -> Iterator[str]:
    """Yield notes on classes without videos in a split, and on videos in both splits."""
    if len(names) == 1:
        yield f"{root}: only one class, {names[0]}: is dataset.root the folder that holds a folder per class?"
    for split, rows in entries.items():
        present = {row.label for row in rows}
        if absent := [name for label, name in enumerate(names) if label not in present]:
            yield f"{root}: classes without videos for {split}: {shorten(absent)}"
    train, val = ({(row.path, row.span) for row in entries.get(split, ())} for split in ("train", "val"))
    if train & val:
        yield f"{root}: videos both in train and in val: {shorten(path for path, _ in sorted(train & val))}"


def split_of(name: str) -> str | None:
    """Return the split (train, val or test) that a folder or table name means, or None."""
    match = _SPLIT.fullmatch(name.strip())
    return match.lastgroup if match else None


def _choose_splits(root: str, names: Iterable[str], notes: list[str]) -> dict[str, str]:
    """Find the split folders or tables among `names`; returns split → name. Adds to `notes`.

    Test videos are used for `val` if there is `train` but no `val`.

    Raises:
        UserError: Two names mean the same split.
    """
    chosen: dict[str, str] = {}
    for name in names:
        split = split_of(os.path.splitext(name)[0] if name.lower().endswith(TABLE_SUFFIXES) else name)
        if split and chosen.setdefault(split, name) != name:
            raise UserError(f"{root}: {chosen[split]} and {name} are both {split} videos: keep one of them")
    test = chosen.pop("test", None)
    if test and "train" in chosen:
        if "val" not in chosen:
            chosen["val"] = test
        notes.append(f"{root}: {test} is {'not read' if chosen['val'] != test else 'used for validation'}")
    elif test and "val" not in chosen:
        chosen["test"] = test
    return chosen


# folders


def _find_folders(root: str, val_share: float, seed: int) -> SplitLayout:
    """Read the splits from class folders, either inside split folders or directly under `root`."""
    folders = [entry.name for entry in _subfolders(root)]
    notes: list[str] = []
    splits = _choose_splits(root, folders, notes)
    others = [name for name in folders if split_of(name) is None]
    if splits:
        extra = [name for name in others if scan_folder(root, name).videos]
        if extra and not splits.keys() >= {"train", "val"}:
            raise UserError(
                f"{root}: split folders ({shorten(splits.values())}) beside class folders ({shorten(extra)}): "
                "move the classes into train/ and val/, or rename class folders, or give train.csv and val.csv"
            )
        extra += scan_folder(root, deep=False).videos
        notes += [f"{root}: not read, because outside the split folders: {shorten(extra)}"] if extra else []
        rows_and_remarks = {split: _find_classes(root, name, notes) for split, name in splits.items()}
        expected = "expected a folder of videos per class in"
        reasons = {split: f"{expected} {splits[split]}{remarks}" for split, (_, remarks) in rows_and_remarks.items()}
        return SplitLayout({split: rows for split, (rows, _) in rows_and_remarks.items()}, reasons, notes)
    _refuse_named_splits(root, folders)
    rows, remarks = _find_classes(root, "", notes)
    reason = f"expected a folder of videos ({COMMON_SUFFIXES}) per class{remarks}"
    layout = SplitLayout(_hold_out(rows, val_share, seed), {"train": reason, "val": reason}, notes)
    if rows and not layout.splits["val"]:
        layout.reasons["val"] = (
            f"each class has one video and none to hold out ({shorten(_classes_of(rows))}): add videos, or "
            "define both splits with train/ and val/ or train.csv and val.csv"
        )
    return layout


def _refuse_named_splits(root: str, folders: Sequence[str]) -> None:
    """Raise UserError if folders look like splits with longer names: `train_256` and `val_256`."""
    training: dict[str, str] = {}
    others: dict[str, str] = {}
    for name in folders:
        word = _SPLIT_WORD.search(name.lower())
        if word:
            rest = re.sub(r"[\W\d_]+", "", name.lower().replace(word[1], "", 1))
            (others if word[2] else training)[rest] = name
    for rest in training.keys() & others.keys():
        raise UserError(
            f"{root}: {training[rest]} and {others[rest]} look like split folders, where class folders are expected: "
            "rename them to train and val"
        )


def _subfolders(folder: str) -> list[os.DirEntry[str]]:
    record_input(folder)
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if e.is_dir() and not is_leftover(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be listed: {error.strerror}") from error


def _find_classes(root: str, top: str, notes: list[str]) -> tuple[list[LabelledVideo], str]:
    """Return the videos of the class folders in the folder `top` of `root`, and remarks on skipped files for an error.

    Adds the remarks to `notes`.
    """
    folder = os.path.join(root, top) if top else root
    rows: list[LabelledVideo] = []
    empty: list[str] = []
    skipped = scan_folder(root, top, deep=False)
    loose, skipped.videos = skipped.videos, []
    for entry in _subfolders(folder):
        _refuse_splits_of_class(entry.path)
        scan = scan_folder(root, os.path.join(top, entry.name))
        rows += [LabelledVideo(path, entry.name, entry.path) for path in scan.videos]
        if not scan.videos:
            empty.append(f"{entry.name} ({scan.extensions() or 'no files'})")
        skipped.add(scan)
    remarks = [f"{folder}: not read, because in no class folder: {shorten(loose)}"] if loose else []
    remarks += [f"{folder}: folders without videos, not counted as classes: {shorten(empty)}"] if empty else []
    remarks += skipped.notes(folder)
    notes += remarks
    return rows, "".join(f"; {remark}" for remark in remarks)


def _refuse_splits_of_class(folder: str) -> None:
    """Raise UserError if a class folder contains split folders."""
    splits = {split: entry.name for entry in _subfolders(folder) if (split := split_of(entry.name))}
    if "train" in splits and len(splits) > 1:
        raise UserError(
            f"{folder}: holds {' and '.join(splits.values())}, split folders, where a class folder is expected: "
            "set dataset.root to it, or put class folders into train/ and val/"
        )


def _classes_of(rows: Iterable[LabelledVideo]) -> list[str]:
    return sorted({normalize_class_name(row.label) for row in rows})


def _hold_out(rows: Sequence[LabelledVideo], val_share: float, seed: int) -> dict[str, list[LabelledVideo]]:
    """Hold out the fraction `val_share` of each class.

    The order of a hash of the path decides, so that adding videos moves as few of the others as possible.
    """
    if not 0 < val_share < 1:
        raise UserError(f"dataset: val_share must lie between 0 and 1, not {val_share}")
    splits: dict[str, list[LabelledVideo]] = {"train": [], "val": []}
    for name in _classes_of(rows):
        group = [row for row in rows if normalize_class_name(row.label) == name]
        # NFC: hold out the same videos on macOS, which stores decomposed accents, as elsewhere.
        group.sort(key=lambda row: _hash(f"{seed}:{unicodedata.normalize('NFC', row.path)}"))
        num_held_out = min(math.ceil(val_share * len(group)), len(group) - 1)
        splits["val"] += sorted(group[:num_held_out])
        splits["train"] += sorted(group[num_held_out:])
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# tables


def _find_tables(root: str) -> SplitLayout | None:
    """Read the splits from tables in a folder or at a URL; returns None if there are no tables; raises UserError."""
    notes: list[str] = []
    if is_remote(root):
        candidates = [join(root, name) for name in ("train.csv", "val.csv", "train.jsonl", "val.jsonl")]
        for file in candidates:
            record_input(file)
        files = [os.path.basename(file) for file in candidates if exists(file)]
    else:
        record_input(root)
        with os.scandir(root) as entries:
            all_entries = sorted(entries, key=lambda entry: entry.name)
        # .json files beside split folders are often from other programs.
        has_split_folders = any(entry.is_dir() and split_of(entry.name) for entry in all_entries)
        suffixes = TABLE_SUFFIXES[:-1] if has_split_folders else TABLE_SUFFIXES
        files = [
            e.name for e in all_entries if e.is_file() and e.name.lower().endswith(suffixes) and not is_leftover(e.name)
        ]
    tables = _choose_splits(root, files, notes)
    if not tables.keys() & {"train", "val"}:
        return None
    splits = {split: _read_table(root, name) for split, name in tables.items()}
    return SplitLayout(splits, {split: f"{name} lists none" for split, name in tables.items()}, notes)


def _read_table(root: str, name: str) -> list[LabelledVideo]:
    file = join(root, name)
    if not name.lower().endswith((".json", ".jsonl")) and is_frame_list(lines := read_lines(file)):
        videos = ((f"{file}:{line}", path, labels) for line, path, labels in frame_list_videos(file, lines))
        return [_row(root, origin, {"path": path, "label": _only(origin, labels)}) for origin, path, labels in videos]
    if name.lower().endswith((".json", ".jsonl")):
        return [_row(root, origin, fields) for origin, fields in read_records(file)]
    rows = read_table(file, read_lines(file), ("path", "label"))
    return [_row(root, f"{file}:{row.line}", row.fields) for row in rows]


def _only(origin: str, labels: Sequence[int]) -> int:
    if len(labels) > 1:
        raise UserError(f"{origin}: several labels, {shorten(map(str, labels))}, where the task has one a video")
    return labels[0]


def _row(root: str, origin: str, fields: Any) -> LabelledVideo:
    """Convert a row of a table to a video; `origin` names the row in errors. Raises UserError."""
    path, label = (fields.get(key) if isinstance(fields, dict) else None for key in ("path", "label"))
    if path in (None, "") or label in (None, ""):
        raise UserError(f"{origin}: expected a path and a label, found {str(fields)[:120]}")
    try:
        if not isinstance(path, str):
            raise ValueError(f"the path must be text, found {path!r}")
        os.fsencode(path)
        path, name = find_spelling(root, strip_quotes(path)), _label(label)
        start, end = _seconds(fields.get("start"), 0.0), _seconds(fields.get("end"), math.inf)
    except UnicodeEncodeError:
        raise UserError(f"{origin}: the path {path!a} is not text that can name a file") from None
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None
    if not 0 <= start < end:
        raise UserError(f"{origin}: expected 0 <= start < end in seconds, found {start:g} and {end:g}")
    return LabelledVideo(path, name, origin, (start, end))


def _label(label: Any) -> str:
    """Convert a label to the name of a class; raises ValueError if it is missing or a list."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    # pandas writes whole numbers as 3.0 if values are missing in the column.
    if isinstance(label, bool) or not isinstance(label, (str, int)) or _NO_LABEL.fullmatch(str(label).strip()):
        raise ValueError(f"expected one label, a name, found {label!r}")
    return re.sub(r"^\s*(\d+)\.0+\s*$", r"\1", str(label))


def _seconds(value: Any, default: float) -> float:
    """Convert a number or text, with a decimal point or comma, to seconds; empty is `default`; raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return default
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(re.sub(r"^(\d+),(\d+)$", r"\1.\2", value.strip()) if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"start and end must be seconds, found {value!r}") from None
