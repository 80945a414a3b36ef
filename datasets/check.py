"""Check a dataset's files before a run: find missing, unreadable, short and unusual videos, with reasons."""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mgvideo.storage.files import parse_json_lines, replace_when_complete
from mgvideo.storage.members import file_on_disk
from mgvideo.storage.paths import is_remote, join

from .frame_table import video_streams
from .frames import frame_folder
from .parallel import FileProgress, ignore_progress, parallel_map
from .pyav import PyAV, PyAVVideo
from .video import VideoDataset
from .videofile import DecodeError, Decoder, Video

BROKEN = ("missing", "unreadable")  # problems that make a video unusable; the others are warnings
TOO_SHORT = "too short"
RECHECKED = (*BROKEN, TOO_SHORT)  # problems that a new copy of the file may fix
CHUNK_FRAMES = 64  # frames to decode at once
THUMBNAIL_SIDE = 64  # short side to which large frames are shrunk, see Decoder.open


@dataclass(frozen=True)
class Finding:
    """A problem or a warning about a video; `problem` is one of the words in docs/datasets/preparation.md.

    "duplicate", "conflicting labels" and "overlap" concern its lines in the lists, the other words its file.
    """

    path: str
    problem: str
    reason: str


class ListLine(NamedTuple):
    """A line of a list: the video, the part of the dataset that lists it, its classes, its span in seconds."""

    path: str
    part: str
    classes: tuple[str, ...]
    span: tuple[float, float] = (0, math.inf)


def list_lines(dataset: VideoDataset, part: str) -> list[ListLine]:
    """Return all lines of a dataset's list, including those of missing videos."""
    lines = []
    for entry in (*map(dataset.entry, range(len(dataset))), *dataset.missing):
        labels = entry.label if isinstance(entry.label, tuple) else (entry.label,)
        classes = tuple(dataset.class_names[label] for label in labels)
        lines.append(ListLine(join(dataset.root, entry.path), part, classes, entry.span))
    return lines


def find_repeats(lines: Iterable[ListLine]) -> list[Finding]:
    """Find videos listed twice, with different labels or in two parts; different spans of a video are not repeats."""
    groups: dict[tuple[str, tuple[float, float]], list[ListLine]] = {}
    for line in lines:
        groups.setdefault((line.path, line.span), []).append(line)
    findings = []
    for (path, _), group in groups.items():
        parts = Counter(line.part for line in group)
        labels = dict.fromkeys("; ".join(line.classes) for line in group)
        findings += [Finding(path, "duplicate", f"listed {n} times in {part}") for part, n in parts.items() if n > 1]
        if len(labels) > 1:
            findings.append(Finding(path, "conflicting labels", " or ".join(labels)))
        if len(parts) > 1:
            findings.append(Finding(path, "overlap", f"listed in {' and '.join(parts)}"))
    return findings


def check(
    paths: Sequence[str],
    min_frames: int = 1,
    fully: bool = True,
    processes: int | None = None,
    progress: FileProgress = ignore_progress,
    journal: str | None = None,
    decoder: Decoder | None = None,
) -> list[Finding]:
    """Decode the files and return the findings in the order of `paths`.

    Args:
        min_frames: A video with fewer frames is "too short".
        fully: Decode every frame; otherwise only the first, the middle and the last.
        processes: Number of worker processes; None: one a core.
        progress: Called with (files done, files) after each file.
        journal: A file to which findings are appended at once. A new check with the same `min_frames` and `fully`
            continues from it, and checks again the videos that a new copy may have fixed. The caller removes it.
        decoder: Opens the files; default: PyAV.
    """
    settings = {"min_frames": min_frames, "fully": fully}
    findings = _read_journal(journal, settings)
    unique_paths = list(dict.fromkeys(paths))
    remaining = [path for path in unique_paths if path not in findings]
    work = partial(check_file, min_frames=min_frames, fully=fully, decoder=decoder or PyAV())
    with _open_journal(journal, settings, findings) as file:
        for done, (path, rows) in enumerate(
            zip(remaining, parallel_map(work, remaining, processes), strict=True), start=1
        ):
            findings[path] = rows
            file.write(_journal_line(path, rows))
            file.flush()
            progress(done, len(remaining))
    return [finding for path in unique_paths for finding in findings[path]]


def _journal_line(path: str, findings: Sequence[Finding]) -> str:
    return json.dumps({"path": path, "findings": [asdict(finding) for finding in findings]}) + "\n"


def _open_journal(journal: str | None, settings: dict[str, int], findings: dict[str, list[Finding]]) -> IO[str]:
    """Rewrite the journal, because a killed check may have left an unfinished line, and open it for appending."""
    if journal is None:
        return open(os.devnull, "w", encoding="utf-8")
    lines = [json.dumps(settings) + "\n", *(_journal_line(path, rows) for path, rows in findings.items())]
    with replace_when_complete(Path(journal)) as part:
        part.write_text("".join(lines), encoding="utf-8")
    return open(journal, "a", encoding="utf-8")


def _read_journal(journal: str | None, settings: dict[str, int]) -> dict[str, list[Finding]]:
    """Return the findings by path that an earlier check with the same settings recorded and that need no new check."""
    if journal is None or not os.path.isfile(journal):
        return {}
    records = parse_json_lines(Path(journal).read_text(encoding="utf-8").splitlines())
    if next(records, None) != settings:
        return {}
    return {
        record["path"]: [Finding(**row) for row in record["findings"]]
        for record in records
        if not any(row["problem"] in RECHECKED for row in record["findings"])
    }


def check_file(path: str, min_frames: int, fully: bool, decoder: Decoder) -> list[Finding]:
    """Decode one file and return its findings."""
    if not is_remote(path) and not os.path.exists(file_on_disk(path)) and frame_folder(path) is None:
        return [Finding(path, "missing", "No such file")]
    try:
        with decoder.open(path, THUMBNAIL_SIDE) as video:
            findings = [Finding(path, problem, reason) for problem, reason in _find_problems(video, min_frames)]
            indices = range(video.frames) if fully else sorted({0, video.frames // 2, video.frames - 1})
            for start in range(0, len(indices), CHUNK_FRAMES):
                video.read(indices[start : start + CHUNK_FRAMES])
    except DecodeError as error:
        return [Finding(path, "unreadable", error.reason)]
    return findings


def _find_problems(video: Video, min_frames: int) -> Iterator[tuple[str, str]]:
    if video.frames < min_frames:
        yield TOO_SHORT, f"{video.frames} frames, fewer than {min_frames}"
    if isinstance(video, PyAVVideo):  # folders of images have no timestamps and no display settings
        yield from _time_problems(video)
        yield from _display_problems(video)
        yield from _unread_parts(video)


def _time_problems(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """Yield problems with the times of frames."""
    table = video.table
    gaps = np.diff(table.ticks)
    # Containers round times to ticks, so evenly spaced frames may differ by one tick.
    if len(gaps) and gaps.max() - gaps.min() > max(1, 0.1 * gaps.min()):
        base = video.stream.time_base
        low, high = (float(gap * base) for gap in (gaps.min(), gaps.max()))
        yield (
            "variable frame rate",
            f"{low:.3g} to {high:.3g} s between frames; frame_stride counts frames unless sampling.target_fps is set",
        )
    if video.frames > 1 and table.ticks[0] == table.ticks[-1]:
        yield "zero duration", "all frames have the same time"
    if table.breaks:
        yield (
            "broken times",
            f"at {table.breaks} of {video.frames} frames times are missing, repeated or reset: frames are read in "
            "decoding order, and start and end refer to continued times",
        )
    if table.counted:
        yield "slow", "its packets do not identify frames, so each clip decodes it from the beginning; build a pyramid"


def _display_problems(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """Yield ways in which pictures are displayed differently from how they are stored."""
    turn = video.orientation
    if not turn.upright or not turn.exact:
        words = [f"by {turn.degrees} degrees"] if turn.degrees else []
        words += ["mirrored left to right"] if turn.mirrored else []
        reason = ", then ".join(words) or "by 0 degrees"
        near = "" if turn.exact else "rounded to a quarter turn: "
        yield "rotated", f"{near}{reason}; PyAV reads it for every decoder"
    aspect = video.stream.sample_aspect_ratio
    if aspect and aspect != 1:
        yield "stretched", f"pixels are shown {aspect.numerator}:{aspect.denominator} wide and read as squares"
    if video.interlaced:
        yield "interlaced", "frames are read without deinterlacing"


def _unread_parts(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """Yield stored frames and streams that are not read."""
    if video.table.discarded:
        yield "edit list", f"{video.table.discarded} stored frames are not displayed and not read"
    if video.table.damaged:
        yield "damaged", f"{video.table.damaged} of its packets are incomplete or follow lost ones"
    if video.table.lost:
        yield "no keyframe", f"the first {video.table.lost} frames cannot be decoded and are not read"
    videos = video_streams(video.container)
    if len(videos) > 1:
        indices = ", ".join(str(stream.index) for stream in videos)
        yield "several videos", f"streams {indices}, of which {video.index} is read"


def write_findings(file: str, findings: Sequence[Finding]) -> None:
    """Write findings as a CSV with columns path, problem and reason."""
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as target:
        rows = csv.writer(target)
        rows.writerow(("path", "problem", "reason"))
        rows.writerows((finding.path, finding.problem, finding.reason) for finding in findings)


def count_problems(findings: Sequence[Finding], classes: Mapping[str, Collection[str]]) -> dict[str, Counter[str]]:
    """Count each problem over all videos (key "") and for each class; `classes` maps paths to class names."""
    table: dict[str, Counter[str]] = {"": Counter(finding.problem for finding in findings)}
    for finding in findings:
        for name in classes[finding.path]:
            table.setdefault(name, Counter())[finding.problem] += 1
    return table


def broken_share(findings: Sequence[Finding], total: int) -> float:
    """Return the fraction of the `total` videos that are missing or unreadable."""
    return len({finding.path for finding in findings if finding.problem in BROKEN}) / max(1, total)
