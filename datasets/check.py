"""Checking a dataset's files before a run trips over them: what is missing, unreadable, too short or odd, and why."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

from mgvideo.paths import is_remote

from .parallel import Progress, parallel, silent
from .pyav import PyAV, PyAVVideo
from .videofile import DecodeError

BROKEN = ("missing", "unreadable")  # problems that cost a video; the others are worth a look
CHUNK = 64  # frames decoded at once
THUMBNAIL = 64  # short side that they are shrunk to where they are large


@dataclass(frozen=True)
class Finding:
    """What is wrong with a video: `problem` is one of missing, unreadable, too short, rotated, variable frame rate,
    zero duration and duplicate."""

    path: str
    problem: str
    reason: str


def check(
    paths: Sequence[str],
    min_frames: int = 1,
    fully: bool = True,
    processes: int | None = None,
    progress: Progress = silent,
    journal: str | None = None,
) -> list[Finding]:
    """Decode every frame of every file, or the first, middle and last, and return what is wrong, in the order given.

    `min_frames`: fewer are too short. `progress` is told (files done, files). `journal`, a file, takes what is found as
    it is found: a check that was killed goes on from there, if it asks for the same; remove it when all is done.
    """
    counts = Counter(paths)
    findings = [Finding(path, "duplicate", f"listed {n} times") for path, n in counts.items() if n > 1]
    asked = {"min_frames": min_frames, "fully": fully}
    found = _read_journal(journal, asked)
    left = [path for path in counts if path not in found]
    with open(journal or os.devnull, "w", encoding="utf-8") as file:
        # written whole, so that what comes next does not continue an unfinished line
        for content in (asked, *(_line(path, rows) for path, rows in found.items())):
            file.write(json.dumps(content) + "\n")
        for done, rows in enumerate(
            parallel(partial(check_file, min_frames=min_frames, fully=fully), left, processes), start=1
        ):
            path = left[done - 1]
            found[path] = rows
            file.write(json.dumps(_line(path, rows)) + "\n")
            file.flush()
            progress(done, len(left))
    return findings + [finding for path in counts for finding in found[path]]


def _line(path: str, findings: Sequence[Finding]) -> dict[str, object]:
    return {"path": path, "findings": [asdict(finding) for finding in findings]}


def _read_journal(journal: str | None, asked: dict[str, int]) -> dict[str, list[Finding]]:
    """What a check that asked the same has found."""
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
        if number:
            found[content["path"]] = [Finding(**row) for row in content["findings"]]
    return found


def check_file(path: str, min_frames: int, fully: bool) -> list[Finding]:
    """What is wrong with one file."""
    if not is_remote(path) and not os.path.exists(path):
        return [Finding(path, "missing", "No such file")]
    try:
        with PyAV().open(path, THUMBNAIL) as video:
            findings = [Finding(path, problem, reason) for problem, reason in _oddities(video, min_frames)]
            every = range(video.frames) if fully else sorted({0, video.frames // 2, video.frames - 1})
            for start in range(0, len(every), CHUNK):
                video.read(every[start : start + CHUNK])
    except DecodeError as error:
        return [Finding(path, "unreadable", error.reason)]
    return findings


def _oddities(video: PyAVVideo, min_frames: int) -> Iterable[tuple[str, str]]:
    if video.frames < min_frames:
        yield "too short", f"{video.frames} frames, fewer than {min_frames}"
    if video.turns:
        yield "rotated", f"by {90 * video.turns} degrees; decord leaves it to PyAV"
    gaps = {after - before for before, after in pairwise(video.times)}
    # containers round times to their clock, so that even frames differ by a tick
    if gaps and max(gaps) - min(gaps) > max(1, 0.1 * min(gaps)):
        yield "variable frame rate", f"{min(gaps)} to {max(gaps)} ticks of the file's clock between frames"
    if video.frames > 1 and video.times[0] == video.times[-1]:
        yield "zero duration", "all frames have the same time"


def write_findings(file: str, findings: Sequence[Finding]) -> None:
    """Write findings as a CSV with columns path, problem and reason."""
    with open(file, "w", newline="", encoding="utf-8") as target:
        rows = csv.writer(target)
        rows.writerow(("path", "problem", "reason"))
        rows.writerows((finding.path, finding.problem, finding.reason) for finding in findings)


def summary(findings: Sequence[Finding], labels: dict[str, str]) -> dict[str, Counter[str]]:
    """How often each problem occurs, in all (key "") and in each class; `labels` names the class of each path."""
    table: dict[str, Counter[str]] = {"": Counter(finding.problem for finding in findings)}
    for finding in findings:
        table.setdefault(labels[finding.path], Counter())[finding.problem] += 1
    return table


def broken_share(findings: Sequence[Finding], total: int) -> float:
    """Share of the `total` videos that cannot be read."""
    return len({finding.path for finding in findings if finding.problem in BROKEN}) / max(1, total)
