"""The index of a folder of tar archives (shards) in the layout of WebDataset: where each sample's files are.

A sample is the files of one archive with the same name up to the first dot: `000123.mp4`, `000123.json`, and of a
packed pyramid `000123.short128.mp4`. The index is made once by reading the headers of the archives, and is mapped into
memory. Archives and samples that are broken are named in it and left out.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import numpy as np

from mgvideo.errors import UserError
from mgvideo.storage.members import Member
from mgvideo.storage.paths import exists, file_size, is_remote, join, list_folder, local_copy, read_bytes, read_range

from .array_file import SharedArrays, Strings
from .inputs import record_input
from .listing import kept_arrays
from .scan import VIDEO_SUFFIXES, is_leftover

INDEX_FILE = "shards.index"  # beside archives that `prepare pack` has written
LABEL_SUFFIXES = ("json", "cls", "txt")  # the first one that a sample has names its label
MAX_LABEL_BYTES = 1 << 20
BLOCK = 1 << 16  # bytes of a remote archive to read at once
THREADS = 16
_LEVEL = re.compile(r"short(\d+)\.mp4")


@dataclass
class ShardScan:
    """The samples of an archive: name and range of the video, label file as JSON text, ranges of levels by side."""

    samples: list[tuple[str, int, int, str, dict[int, tuple[int, int]]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # why samples are left out
    size: int = 0  # bytes of the archive


class _RemoteFile:
    """What tarfile needs of a file at a URL: reads blocks of it."""

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size, self.position, self.start, self.block = path, size, 0, 0, b""

    def seek(self, position: int) -> int:
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        count = max(0, min(count, self.size - self.position))
        first = self.position - self.start
        if not 0 <= first <= first + count <= len(self.block):
            length = min(max(count, BLOCK), self.size - self.position)
            self.block, self.start, first = read_range(self.path, self.position, length), self.position, 0
        self.position += count
        return self.block[first : first + count]

    def close(self) -> None:
        self.block = b""


def read_index(folder: str, names: Sequence[str] | None = None) -> SharedArrays:
    """Return the index of the archives in a folder or at a URL.

    Its header has `shards` (names), `sizes` (bytes), `problems` (by name) and `sides` of levels. Its arrays have a row
    for each sample, in the order of the archives: `shards` (number), `offsets` and `sizes` (bytes), `names`,
    `name_bounds`, `labels`, `label_bounds` (of JSON texts), and a column for each side: `level_offsets` (-1: none),
    `level_sizes`.

    Args:
        names: Names of the archives; None: all of the folder that end in .tar.

    Raises:
        UserError: The folder or an archive cannot be read, or there is none.
    """
    shipped = _shipped_index(folder)
    if shipped is not None and (names is None or set(names) <= set(shipped.header["shards"])):
        return shipped
    try:
        found = sorted(name for name in list_folder(folder) if name.endswith(".tar")) if names is None else list(names)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be listed: {error.strerror}; name the archives as a{{000..119}}.tar"
        ) from None
    if not found:
        raise UserError(f"{folder}: no .tar archives")
    return kept_arrays(folder, f"shards {found}", partial(_scan_all, folder, found))


def _shipped_index(folder: str) -> SharedArrays | None:
    """Return the index that `prepare pack` has written, or None if it is missing, damaged or of other archives."""
    file = join(folder, INDEX_FILE)
    record_input(file)
    try:
        if not exists(file):
            return None
        arrays = SharedArrays.parse(read_bytes(file)) if is_remote(file) else SharedArrays.open(file)
        sizes = _map(partial(_size, folder), arrays.header["shards"])
    except (OSError, ValueError):
        return None
    same = all(size in (None, old) for size, old in zip(sizes, arrays.header["sizes"], strict=True))
    return arrays if same else None


def _map(work: Any, items: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def _size(folder: str, name: str) -> int | None:
    return file_size(join(folder, name))


def _scan_all(folder: str, names: Sequence[str]) -> SharedArrays:
    for name in names:
        record_input(join(folder, name))
    if not is_remote(folder):
        record_input(folder)
    return build_index(names, _map(scan_shard, [join(folder, name) for name in names]))


def build_index(names: Sequence[str], scans: Sequence[ShardScan]) -> SharedArrays:
    """Return the index of archives from the scan of each."""
    rows = [(number, *sample) for number, scan in enumerate(scans) for sample in sorted(scan.samples, key=_offset)]
    sides = sorted({side for row in rows for side in row[5]})
    levels = np.array([[row[5].get(side, (-1, 0)) for side in sides] for row in rows], np.int64)
    levels = levels.reshape(len(rows), len(sides), 2)
    files, labels = Strings.pack([row[1] for row in rows]), Strings.pack([row[4] for row in rows])
    arrays: dict[str, np.ndarray] = {
        "shards": np.array([row[0] for row in rows], np.int32),
        "offsets": np.array([row[2] for row in rows], np.int64),
        "sizes": np.array([row[3] for row in rows], np.int64),
        "names": files.content,
        "name_bounds": files.bounds,
        "labels": labels.content,
        "label_bounds": labels.bounds,
        "level_offsets": levels[:, :, 0],
        "level_sizes": levels[:, :, 1],
    }
    problems = {name: scan.problems for name, scan in zip(names, scans, strict=True) if scan.problems}
    header: dict[str, Any] = {
        "videos": len(rows),
        "shards": list(names),
        "sizes": [scan.size for scan in scans],
        "problems": problems,
        "sides": sides,
    }
    return SharedArrays(arrays, header)


def _offset(sample: Any) -> int:
    return int(sample[1])


def scan_shard(archive: str) -> ShardScan:
    """List the samples of one archive by its headers. What is broken is named in `problems`."""
    scan, files = ShardScan(), {}
    try:
        size = file_size(archive)
        source: Any = _RemoteFile(archive, size) if is_remote(archive) and size is not None else None
        source = source or open(local_copy(archive), "rb")  # noqa: SIM115
        with closing(source):
            scan.size = os.fstat(source.fileno()).st_size if hasattr(source, "fileno") else source.size
            files = _list_members(source, scan)
            for key, members in files.items():
                _add_sample(source, key, members, scan)
    except (OSError, tarfile.TarError) as error:
        scan.problems.append(getattr(error, "strerror", None) or str(error))
    return scan


def _list_members(source: Any, scan: ShardScan) -> dict[str, dict[str, tuple[int, int]]]:
    """Return key → suffix (lower case) → range of bytes of the complete files of an archive."""
    files: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(fileobj=source, mode="r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                folder, base = os.path.split(info.name)
                if not info.isfile() or is_leftover(base):
                    continue
                if info.offset_data + info.size > scan.size:
                    raise tarfile.ReadError("unexpected end of data")
                stem, _, suffix = base.partition(".")
                members = files.setdefault(os.path.join(folder, stem), {})
                if suffix.lower() in members:
                    scan.problems.append(f"{info.name} occurs twice, and the first is read")
                members.setdefault(suffix.lower(), (info.offset_data, info.size))
    except tarfile.TarError as error:
        scan.problems.append(f"is cut off or damaged after {len(files)} samples: {error}")
        return files
    source.seek(end)
    if source.read(tarfile.BLOCKSIZE) != b"\0" * tarfile.BLOCKSIZE:
        scan.problems.append(f"is cut off or damaged after {len(files)} samples: no mark of its end")
    return files


def _add_sample(source: IO[bytes], key: str, members: dict[str, tuple[int, int]], scan: ShardScan) -> None:
    levels = {int(match[1]): members[name] for name in members if (match := _LEVEL.fullmatch(name))}
    videos = [
        name for name in members if not _LEVEL.fullmatch(name) and f".{name.rpartition('.')[2]}" in VIDEO_SUFFIXES
    ]
    label = next((name for name in LABEL_SUFFIXES if name in members), None)
    if len(videos) != 1:
        scan.problems.append(f"{key} has {len(videos) or 'no'} video{'s' if videos else ''}")
    elif label is None:
        scan.problems.append(f"{key} has no label: no .{', .'.join(LABEL_SUFFIXES)}")
    else:
        offset, size = members[label]
        source.seek(offset)
        data = source.read(min(size, MAX_LABEL_BYTES))
        with suppress(UnicodeDecodeError):
            text = data.decode("utf-8-sig").strip()
            if label != "json":
                text = json.dumps({"label": text})
            if isinstance(_parse(text), dict):
                scan.samples.append((f"{key}.{videos[0]}", *members[videos[0]], text, levels))
                return
        scan.problems.append(f"{key}.{label} is not {'a JSON object' if label == 'json' else 'UTF-8 text'}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def expand_pattern(pattern: str) -> list[str] | None:
    """Expand `a-{000..119}.tar` to names; returns None for a pattern with * or ?. Raises UserError."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return None if set(pattern) & set("*?[") else [pattern]
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise UserError(f"shards: {pattern}: the first number is greater than the last")
    width = len(match[1]) if match[1].startswith("0") else 0
    return [
        name
        for number in range(first, last + 1)
        for name in expand_pattern(f"{pattern[: match.start()]}{number:0{width}d}{pattern[match.end() :]}") or []
    ]


def chosen_shards(index: SharedArrays, pattern: str) -> list[int]:
    """Return the numbers of the archives of an index that a pattern names."""
    names = expand_pattern(pattern)
    shards = index.header["shards"]
    return [
        i for i, name in enumerate(shards) if (fnmatch.fnmatchcase(name, pattern) if names is None else name in names)
    ]


def sample_path(index: SharedArrays, row: int) -> str:
    """Return the path of a sample's video, relative to the folder of the archives (see `members.Member`)."""
    name = Strings(index["names"], index["name_bounds"])[row]
    shard = index.header["shards"][index["shards"][row]]
    return Member(shard, int(index["offsets"][row]), int(index["sizes"][row]), name).path
