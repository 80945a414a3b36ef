"""Pack a dataset into tar archives (shards) in the layout of WebDataset: a few large files instead of many small ones.

A sample is `000000123.mp4`, with the original's extension, and `000000123.json`: its label, where it came from, and the
times of its span or actions. With a pyramid it has `000000123.short128.mp4` too, and so on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mgvideo.errors import UserError
from mgvideo.storage.members import parse_member
from mgvideo.storage.paths import is_remote, local_copy, read_range

from .frames import frame_folder
from .parallel import FileProgress, ignore_progress, parallel_map
from .pyramid import Pyramid, level_path, name_video, read_manifest
from .shard_index import INDEX_FILE, build_index, scan_shard
from .shards import SETTINGS_FILE
from .timed import TimedDataset
from .video import WHOLE, VideoDataset


@dataclass(frozen=True)
class PackedVideo:
    """A video to pack: number in the split, file, JSON fields, and the files of its levels by side."""

    number: int
    path: str
    fields: dict[str, Any]
    levels: dict[int, str]


@dataclass(frozen=True)
class PackedShard:
    """An archive that was written, its number of samples, and the videos that could not be read, with the reason."""

    name: str
    samples: int
    failures: tuple[tuple[str, str], ...]


def pack(
    datasets: dict[str, VideoDataset],
    folder: Path,
    shard_bytes: int,
    pyramid: Pyramid | None = None,
    processes: int | None = None,
    progress: FileProgress = ignore_progress,
) -> list[PackedShard]:
    """Write the videos of each split into archives `SPLIT-000000.tar` of about `shard_bytes`, and their index.

    Each archive is verified before it gets its name. A stopped command continues with the archives that are missing.

    Args:
        pyramid: Its levels are packed too; it must be a folder of files.
        progress: Called with (archives done, archives to do).

    Raises:
        UserError: The folder holds other data or cannot be written, or no video can be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    levels = _pyramid_rows(pyramid)
    plans = {}
    for split, dataset in datasets.items():
        videos = [_describe(dataset, index, pyramid, levels) for index in range(len(dataset))]
        for number, group in enumerate(_groups(videos, shard_bytes)):
            plans[f"{split}-{number:06d}.tar"] = group
    _write_settings(folder, datasets, pyramid, hashlib.sha256(repr(plans).encode("utf-8", "replace")).hexdigest())
    results = []
    for done, shard in enumerate(parallel_map(partial(_pack_shard, folder), list(plans.items()), processes), start=1):
        results.append(shard)
        progress(done, len(plans))
    names = [shard.name for shard in results if shard.samples]
    if not names:
        path, reason = results[0].failures[0]
        raise UserError(f"none of the videos can be read, for example {path}: {reason}")
    build_index(names, [scan_shard(str(folder / name)) for name in names]).write(folder / INDEX_FILE)
    return results


def _pyramid_rows(pyramid: Pyramid | None) -> dict[str, Any]:
    if pyramid is None:
        return {}
    return {row.path: row for row in read_manifest(pyramid.folder)[1] if not row.failure}


def _describe(dataset: VideoDataset, index: int, pyramid: Pyramid | None, levels: dict[str, Any]) -> PackedVideo:
    path, entry = dataset.path(index), dataset.entry(index)
    fields: dict[str, Any] = {"path": os.fsencode(entry.path).decode("utf-8", "backslashreplace")}
    labels = entry.label if isinstance(entry.label, tuple) else [entry.label]
    fields["label"] = list(labels) if isinstance(entry.label, tuple) else entry.label
    fields["class"] = "; ".join(dataset.class_names[label] for label in labels)
    if entry.span != WHOLE:
        fields["start"] = entry.span[0]
        if entry.span[1] < WHOLE[1]:
            fields["end"] = entry.span[1]
    if isinstance(dataset, TimedDataset):
        fields["actions"] = [list(action) for action in dataset.actions(index)]
    row = levels.get(name_video(path, pyramid.root)) if pyramid else None
    if pyramid is None or row is None:
        return PackedVideo(index, path, fields, {})
    fields.update(short_side=row.short_side, first_frame=row.start)
    return PackedVideo(
        index, path, fields, {side: level_path(pyramid.folder, side, row.path) for side in pyramid.layout.sides}
    )


def _groups(videos: Sequence[PackedVideo], shard_bytes: int) -> list[list[PackedVideo]]:
    """Cut videos into consecutive groups of about `shard_bytes`; of a URL, whose size is unknown, 1,000 a group."""
    groups: list[list[PackedVideo]] = []
    room = 0
    for video in videos:
        size = sum(map(_size, (video.path, *video.levels.values()))) or shard_bytes // 1000
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(video)
        room -= size
    return groups


def _size(path: str) -> int:
    member = parse_member(path)
    try:
        return member.size if member else 0 if is_remote(path) else os.path.getsize(path)
    except OSError:
        return 0


def _write_settings(folder: Path, datasets: dict[str, VideoDataset], pyramid: Pyramid | None, digest: str) -> None:
    """Write what describes all archives. Raises UserError if the folder holds archives of other videos."""
    first = next(iter(datasets.values()))
    file = folder / SETTINGS_FILE
    settings = {"sampling": asdict(first.sampling), "videos": digest}
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        if old != json.loads(json.dumps(settings)):
            raise UserError(f"{folder}: holds archives of other videos or another shard_mib; choose another folder")
    elif any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds archives already; choose another folder")
    names = "".join(f"{name}\n" for name in first.class_names)
    (folder / "classes.txt").write_text(names, encoding="utf-8", errors="surrogateescape")
    if pyramid is not None:
        (folder / "layout.json").write_text(json.dumps(asdict(pyramid.layout)) + "\n", encoding="utf-8")
    file.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def _pack_shard(folder: Path, plan: tuple[str, Sequence[PackedVideo]]) -> PackedShard:
    """Write one archive, unless it is there already, and verify it. It gets its name when it is complete."""
    name, videos = plan
    file, part = folder / name, folder / f".{name}.part"
    failures: list[tuple[str, str]] = []
    if file.exists():
        return PackedShard(name, len(scan_shard(str(file)).samples), ())
    try:
        digests: dict[str, str] = {}
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
            for video in videos:
                try:
                    _add_video(archive, video, digests)
                except OSError as error:
                    if error.filename is None or str(error.filename).startswith(str(folder)):
                        raise  # of the archive: the disk is full
                    failures.append((video.path, error.strerror or str(error)))
        _verify(part, digests)
        if digests:
            with open(part, "rb") as written:
                os.fsync(written.fileno())
            os.replace(part, file)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; repeat the command to continue") from error
    finally:
        part.unlink(missing_ok=True)
    return PackedShard(name, len(videos) - len(failures), tuple(failures))


def _add_video(archive: tarfile.TarFile, video: PackedVideo, digests: dict[str, str]) -> None:
    """Add the files of a sample to an archive, and their digests. Raises OSError before anything is added."""
    if frame_folder(video.path):
        raise OSError(0, "a folder of images cannot be packed; encode it as a video first", video.path)
    key, suffix = f"{video.number:09d}", os.path.splitext(video.path)[1].lower() or ".mp4"
    files = {f"{key}{suffix}": _content(video.path)}
    fields = dict(video.fields)
    try:
        files |= {f"{key}.short{side}.mp4": _content(path) for side, path in video.levels.items()}
    except OSError:  # a level is missing: the original is read instead
        fields.pop("short_side")
    files[f"{key}.json"] = json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")
    for name, content in files.items():
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        archive.addfile(info, io.BytesIO(content))
        digests[name] = hashlib.sha256(content).hexdigest()


def _content(path: str) -> bytes:
    """Return the bytes of a video; raises OSError with the path as its file name."""
    try:
        member = parse_member(path)
        data = read_range(*member[:3]) if member else Path(local_copy(path)).read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from None
    if not data:
        raise OSError(0, "empty file", path)
    return data


def _verify(part: Path, digests: dict[str, str]) -> None:
    """Read an archive again and compare its files. Raises UserError."""
    found = {}
    with tarfile.open(part, "r:") as archive:
        for info in archive:
            content = archive.extractfile(info)
            found[info.name] = hashlib.sha256(content.read()).hexdigest() if content else ""
    if found != digests:
        raise UserError(f"{part}: was not written correctly; is the disk damaged? Repeat the command")
