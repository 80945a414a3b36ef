"""UCF101 and HMDB51 with their official splits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mgvideo.errors import UserError

from .class_names import index_classes, normalize_class_name, suggest_class
from .decoders import Decoder
from .inputs import record_input
from .listing import keep_listing
from .lists import check_root, note_repeats, parse_line
from .sampling import Sampling
from .scan import VIDEO_SUFFIXES, is_leftover
from .tables import read_lines
from .video import VideoDataset, VideoEntry


@keep_listing
def ucf101(
    root: str,
    split: str,
    fold: int = 1,
    videos: str = "UCF-101",
    splits: str = "ucfTrainTestlist",
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Build UCF101 from the lists `root/splits/trainlist01.txt` and `testlist01.txt` and `root/videos/CLASS/*.avi`.

    `fold` is 1 to 3. `split` is train, test or val, which is the same as test. Raises UserError.
    """
    check_root(root)
    folder = os.path.join(root, splits)
    file = os.path.join(folder, f"{_official(split)}list{fold:02d}.txt")
    names = _read_class_index(os.path.join(folder, "classInd.txt"))
    labels = index_classes(names, os.path.join(folder, "classInd.txt"))
    entries = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            path, label = _parse_line(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: expected 'CLASS/video.avi 1', found {line[:80]!r}: {error}") from None
        name = normalize_class_name(path.partition("/")[0])
        if name not in labels:
            raise UserError(f"{file}:{number}: class {name!r} is not in classInd.txt{suggest_class(name, names)}")
        if label not in (None, labels[name] + 1):
            raise UserError(f"{file}:{number}: label {label}, where classInd.txt has {labels[name] + 1} for {name}")
        entries.append(VideoEntry(os.path.join(videos, path), labels[name]))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip), note_repeats(file, entries))


def _parse_line(line: str) -> tuple[str, int | None]:
    """Parse a line of a list: returns the path and the label (from 1), or None in a test list; raises ValueError."""
    text = line.strip().replace("\\", "/")
    if os.path.splitext(text)[1].lower() in VIDEO_SUFFIXES:
        return text, None
    path, labels = parse_line(text)
    if len(labels) > 1:
        raise ValueError(f"several labels, {labels}")
    return path, labels[0]


def _read_class_index(file: str) -> list[str]:
    """Read class names from lines `number name`, ordered by number (from 1); raises UserError."""
    names: dict[int, str] = {}
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            match = re.fullmatch(r"\s*(\d{1,9})\s+(\S.*)", line)
            if not match or int(match[1]) in names:
                raise UserError(f"{file}:{number}: expected a new number and a class, found {line.strip()[:80]!r}")
            names[int(match[1])] = normalize_class_name(match[2])
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{file}: classes must be numbered from 1 to {len(names)}")
    return [names[number] for number in sorted(names)]


@keep_listing
def hmdb51(
    root: str,
    split: str,
    fold: int = 1,
    videos: str = "hmdb51_org",
    splits: str = "testTrainMulti_7030_splits",
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Build HMDB51 from the lists `root/splits/CLASS_test_split1.txt` and `root/videos/CLASS/*.avi`.

    `fold` is 1 to 3. `split` is train, test or val, which is the same as test. Raises UserError.
    """
    check_root(root)
    suffix = f"_test_split{fold}.txt"
    record_input(os.path.join(root, splits))
    files = sorted(file for file in (Path(root) / splits).glob(f"*{suffix}") if not is_leftover(file.name))
    if not files:
        raise UserError(f"{os.path.join(root, splits)}: no files *{suffix}; unpack test_train_splits.rar there")
    split_code = {"train": "1", "test": "2"}[_official(split)]
    names = [normalize_class_name(file.name.removesuffix(suffix)) for file in files]
    index_classes(names, os.path.join(root, splits))
    entries = []
    for label, file in enumerate(files):
        for number, line in enumerate(read_lines(str(file)), start=1):
            fields = line.split()
            if fields and (len(fields) != 2 or fields[1] not in ("0", "1", "2")):
                raise UserError(f"{file}:{number}: expected 'name.avi 0|1|2', found {line[:80]!r}")
            if fields and fields[1] == split_code:
                entries.append(VideoEntry(os.path.join(videos, file.name.removesuffix(suffix), fields[0]), label))
    if not entries:
        raise UserError(f"{os.path.join(root, splits)}: no {split} videos in fold {fold}")
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip), note_repeats(splits, entries))


def _official(split: str) -> str:
    """Map `val` to `test`, because these datasets have no validation split."""
    return "test" if split == "val" else split
