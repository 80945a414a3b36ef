"""UCF101 and HMDB51 with their official splits."""

from __future__ import annotations

import os
from pathlib import Path

from mgvideo.errors import UserError

from .decoders import Decoder
from .lists import check_root, read_lines
from .sampling import Sampling
from .video import Entry, VideoDataset


def ucf101(
    root: str,
    split: str,
    fold: int = 1,
    videos: str = "UCF-101",
    splits: str = "ucfTrainTestlist",
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Fold 1 to 3: `root/splits/trainlist01.txt` and `testlist01.txt` over `root/videos/CLASS/*.avi`; UserError."""
    check_root(root)
    folder = os.path.join(root, splits)
    file = os.path.join(folder, f"{_official(split)}list{fold:02d}.txt")
    names = [line.split(maxsplit=1)[-1].strip() for line in read_lines(os.path.join(folder, "classInd.txt")) if line]
    places = {name: place for place, name in enumerate(names)}
    entries = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        path = line.split()[0]
        name = path.partition("/")[0]
        if name not in places:
            raise UserError(f"{file}:{number}: class {name!r} is not in classInd.txt")
        entries.append(Entry(os.path.join(videos, path), places[name]))
    if not entries:
        raise UserError(f"{file}: no videos in the list")
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip))


def hmdb51(
    root: str,
    split: str,
    fold: int = 1,
    videos: str = "hmdb51_org",
    splits: str = "testTrainMulti_7030_splits",
    decoder: Decoder | None = None,
    flip: bool = True,
) -> VideoDataset:
    """Fold 1 to 3: `root/splits/CLASS_test_split1.txt` over `root/videos/CLASS/*.avi`; raises UserError."""
    check_root(root)
    suffix = f"_test_split{fold}.txt"
    files = sorted((Path(root) / splits).glob(f"*{suffix}"))
    if not files:
        raise UserError(f"{os.path.join(root, splits)}: no files *{suffix}; unpack test_train_splits.rar there")
    wanted = {"train": "1", "test": "2"}[_official(split)]
    names = [file.name.removesuffix(suffix) for file in files]
    entries = []
    for place, file in enumerate(files):
        for number, line in enumerate(read_lines(str(file)), start=1):
            fields = line.split()
            if fields and (len(fields) != 2 or fields[1] not in ("0", "1", "2")):
                raise UserError(f"{file}:{number}: expected 'name.avi 0|1|2', found {line[:80]!r}")
            if fields and fields[1] == wanted:
                entries.append(Entry(os.path.join(videos, names[place], fields[0]), place))
    if not entries:
        raise UserError(f"{os.path.join(root, splits)}: no {split} videos in fold {fold}")
    return VideoDataset(root, entries, names, decoder, Sampling(flip=flip))


def _official(split: str) -> str:
    """These datasets have no validation videos: `val` is their test split."""
    return "test" if split == "val" else split
