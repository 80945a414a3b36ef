"""Checking a dataset's files before a run trips over them: what is missing, unreadable, too short or odd, and why."""

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

from mgvideo.storage.paths import is_remote, join

from .frame_table import video_streams
from .parallel import Progress, parallel, silent
from .pyav import PyAV, PyAVVideo
from .video import VideoDataset
from .videofile import DecodeError, Decoder, Video

BROKEN = ("missing", "unreadable")  # problems that cost a video; the others are worth a look
AGAIN = (*BROKEN, "too short")  # those that another copy of the file would mend
CHUNK = 64  # frames decoded at once
THUMBNAIL = 64  # short side that they are shrunk to where they are large


@dataclass(frozen=True)
class Finding:
    """What is wrong with a video, or unusual: `problem` is a word of docs/datasets/preparation.md.

    The first words are about the file, duplicate, conflicting labels and overlap about its lines in the lists.
    """

    path: str
    problem: str
    reason: str


class Line(NamedTuple):
    """A line of a list: the video, the part of the dataset that lists it, its classes, the seconds that count."""

    path: str
    part: str
    classes: tuple[str, ...]
    span: tuple[float, float] = (0, math.inf)


def listed(dataset: VideoDataset, part: str) -> list[Line]:
    """What a dataset lists, with the videos that it has left out because they are not there."""
    lines = []
    for entry in (*map(dataset.entry, range(len(dataset))), *dataset.missing):
        labels = entry.label if isinstance(entry.label, tuple) else (entry.label,)
        classes = tuple(dataset.class_names[label] for label in labels)
        lines.append(Line(join(dataset.root, entry.path), part, classes, entry.span))
    return lines


def repeated(lines: Iterable[Line]) -> list[Finding]:
    """Videos listed twice, under different labels, or in two parts; stretches of one video are as many videos."""
    groups: dict[tuple[str, tuple[float, float]], list[Line]] = {}
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
    progress: Progress = silent,
    journal: str | None = None,
    decoder: Decoder | None = None,
) -> list[Finding]:
    """Decode every frame of every file, or the first, middle and last, and return what is wrong, in the order given.

    `min_frames`: fewer are too short. `progress` is told (files done, files). `journal`, a file, takes what is found as
    it is found: a check that was killed goes on from there, if it asks for the same, and looks again at what another
    copy may have mended; remove it when all is done. `decoder` opens the files: PyAV, or one of folders of images.
    """
    asked = {"min_frames": min_frames, "fully": fully}
    found = _read_journal(journal, asked)
    every = list(dict.fromkeys(paths))
    left = [path for path in every if path not in found]
    work = partial(check_file, min_frames=min_frames, fully=fully, decoder=decoder or PyAV())
    with _begin_journal(journal, asked, found) as file:
        for done, (path, rows) in enumerate(zip(left, parallel(work, left, processes), strict=True), start=1):
            found[path] = rows
            file.write(_row(path, rows))
            file.flush()
            progress(done, len(left))
    return [finding for path in every for finding in found[path]]


def _row(path: str, findings: Sequence[Finding]) -> str:
    return json.dumps({"path": path, "findings": [asdict(finding) for finding in findings]}) + "\n"


def _begin_journal(journal: str | None, asked: dict[str, int], found: dict[str, list[Finding]]) -> IO[str]:
    """The journal, open to be continued: written anew, since a killed check may have left an unfinished line."""
    if journal is None:
        return open(os.devnull, "w", encoding="utf-8")
    part = f"{journal}.new"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(asked) + "\n")
        file.writelines(_row(path, rows) for path, rows in found.items())
    os.replace(part, journal)
    return open(journal, "a", encoding="utf-8")


def _read_journal(journal: str | None, asked: dict[str, int]) -> dict[str, list[Finding]]:
    """What a check that asked the same has found, and need not look at again."""
    if journal is None or not os.path.isfile(journal):
        return {}
    found = {}
    for number, line in enumerate(Path(journal).read_text(encoding="utf-8").splitlines()):
        try:
            content = json.loads(line)
        except ValueError:  # a line that a killed check did not finish
            continue
        if number == 0 and content != asked:
            return {}
        if number and not any(row["problem"] in AGAIN for row in content["findings"]):
            found[content["path"]] = [Finding(**row) for row in content["findings"]]
    return found


def check_file(path: str, min_frames: int, fully: bool, decoder: Decoder) -> list[Finding]:
    """What is wrong with one file."""
    if not is_remote(path) and not os.path.exists(path):
        return [Finding(path, "missing", "No such file")]
    try:
        with decoder.open(path, THUMBNAIL) as video:
            findings = [Finding(path, problem, reason) for problem, reason in _oddities(video, min_frames)]
            every = range(video.frames) if fully else sorted({0, video.frames // 2, video.frames - 1})
            for start in range(0, len(every), CHUNK):
                video.read(every[start : start + CHUNK])
    except DecodeError as error:
        return [Finding(path, "unreadable", error.reason)]
    return findings


def _oddities(video: Video, min_frames: int) -> Iterator[tuple[str, str]]:
    if video.frames < min_frames:
        yield "too short", f"{video.frames} frames, fewer than {min_frames}"
    if isinstance(video, PyAVVideo):  # images have neither times nor shapes of their own
        yield from _times(video)
        yield from _picture(video)
        yield from _left_out(video)


def _times(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """Where frames are not spaced evenly, and where the file does not say when they are shown."""
    table = video.table
    gaps = np.diff(table.ticks)
    # containers round times to their clock, so that even frames differ by a tick
    if len(gaps) and gaps.max() - gaps.min() > max(1, 0.1 * gaps.min()):
        base = video.stream.time_base
        low, high = (float(gap * base) for gap in (gaps.min(), gaps.max()))
        yield "variable frame rate", f"{low:.3g} to {high:.3g} s between frames, of which a stride counts each as one"
    if video.frames > 1 and table.ticks[0] == table.ticks[-1]:
        yield "zero duration", "all frames have the same time"
    if table.breaks:
        yield (
            "broken times",
            f"at {table.breaks} of {video.frames} frames they are missing, repeat or start over: frames are read in "
            "the order of decoding, and start and end count on from one to the next",
        )
    if table.counted:
        yield "slow", "its packets do not tell its frames: each clip decodes it from its beginning; build a pyramid"


def _picture(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """Where pictures are shown otherwise than they are stored."""
    turn = video.orientation
    if not turn.upright or not turn.exact:
        words = [f"by {turn.degrees} degrees"] if turn.degrees else []
        words += ["mirrored left to right"] if turn.mirrored else []
        reason = ", then ".join(words) or "not at all"
        near = "" if turn.exact else "the nearest to what its file asks for: "
        yield "rotated", f"{near}{reason}; PyAV reads it under all decoders"
    aspect = video.stream.sample_aspect_ratio
    if aspect and aspect != 1:
        yield "stretched", f"pixels are shown {aspect.numerator}:{aspect.denominator} wide, and read as squares"
    if video.interlaced:
        yield "interlaced", "players join the two halves of a frame, which are read as they are stored"


def _left_out(video: PyAVVideo) -> Iterator[tuple[str, str]]:
    """What a file holds and is not read."""
    if video.table.discarded:
        yield "edit list", f"{video.table.discarded} stored frames are not shown, and not read"
    if video.table.damaged:
        yield "damaged", f"{video.table.damaged} of its packets are incomplete or follow lost ones"
    if video.table.lost:
        yield "no keyframe", f"the first {video.table.lost} frames cannot be decoded, and are not read"
    videos = video_streams(video.container)
    if len(videos) > 1:
        places = ", ".join(str(stream.index) for stream in videos)
        yield "several videos", f"streams {places}, of which {video.index} is read"


def write_findings(file: str, findings: Sequence[Finding]) -> None:
    """Write findings as a CSV with columns path, problem and reason."""
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as target:
        rows = csv.writer(target)
        rows.writerow(("path", "problem", "reason"))
        rows.writerows((finding.path, finding.problem, finding.reason) for finding in findings)


def summary(findings: Sequence[Finding], classes: Mapping[str, Collection[str]]) -> dict[str, Counter[str]]:
    """How often each problem occurs, in all (key "") and in each class; `classes` are those of each path."""
    table: dict[str, Counter[str]] = {"": Counter(finding.problem for finding in findings)}
    for finding in findings:
        for name in classes[finding.path]:
            table.setdefault(name, Counter())[finding.problem] += 1
    return table


def broken_share(findings: Sequence[Finding], total: int) -> float:
    """Share of the `total` videos that cannot be read."""
    return len({finding.path for finding in findings if finding.problem in BROKEN}) / max(1, total)
