"""Test checking files: the problems of each file and their counts by class."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
from fields import FIELD, NUMBERS, write_fields
from PIL import Image
from videos import numbered_frame, write_video

from mgvideo.datasets import check as check_module
from mgvideo.datasets.check import ListLine, broken_share, check, count_problems, find_repeats, write_findings
from mgvideo.datasets.decoders import PyAV, Video
from mgvideo.datasets.frames import FrameFolders
from mgvideo.errors import UserError


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Create one file for each problem."""
    faststart = write_video(tmp_path / "whole.mp4", options={"g": "10", "movflags": "faststart"})
    data = faststart.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.6)])
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "short.mp4", frames=5)
    write_video(tmp_path / "uneven.mp4", times=lambda i: i + 3 * (i // 10))
    write_video(tmp_path / "even.mkv", fps=30)
    names = ("whole.mp4", "cut.mp4", "text.mp4", "short.mp4", "uneven.mp4", "even.mkv", "gone.mp4")
    return {name: str(tmp_path / name) for name in names}


ODDITIES = {
    "cat.ts": ["broken times", "slow", "damaged"],
    "cover.wmv": ["slow", "several videos"],
    "cut_g30.mp4": ["edit list"],
    "dup.mkv": ["variable frame rate", "broken times", "slow"],
    "recorder_live.webm": ["variable frame rate"],
    "two_same.mp4": ["several videos"],
    "vfr.mp4": ["variable frame rate"],
    "xvid_small.avi": ["slow"],
}


@pytest.mark.parametrize("fully", [True, False])
def test_check_reports_unusual_files(fully: bool) -> None:
    findings: dict[str, list[str]] = {name: [] for name in NUMBERS}
    for finding in check([str(FIELD / name) for name in NUMBERS], fully=fully, processes=1):
        findings[Path(finding.path).name].append(finding.problem)
        assert finding.reason
    assert {name: problems for name, problems in findings.items() if problems} == ODDITIES


def test_check_reports_stretched_and_interlaced_videos(tmp_path: Path) -> None:
    wide = write_video(tmp_path / "wide.mp4", options={"x264-params": "sar=16/11"})
    halves = write_fields(tmp_path / "halves.ts", 10)
    findings = check([str(wide), str(halves)], processes=1)
    assert [(Path(finding.path).name, finding.problem) for finding in findings] == [
        ("wide.mp4", "stretched"),
        ("halves.ts", "slow"),
        ("halves.ts", "interlaced"),
    ]
    assert "16:11" in findings[0].reason
    with PyAV().open(str(wide)) as video:
        assert (video.height, video.width) == (60, 80), "as they are stored"


@pytest.mark.parametrize("processes", [1, 2])
def test_check_reports_each_problem(paths: dict[str, str], processes: int) -> None:
    calls: list[tuple[int, int]] = []
    listed = [*paths.values(), paths["whole.mp4"]]
    findings = check(listed, 8, processes=processes, progress=lambda done, total: calls.append((done, total)))
    assert [(Path(finding.path).name, finding.problem) for finding in findings] == [
        ("cut.mp4", "unreadable"),
        ("text.mp4", "unreadable"),
        ("short.mp4", "too short"),
        ("uneven.mp4", "variable frame rate"),
        ("gone.mp4", "missing"),
    ]
    assert findings[2].reason == "5 frames, fewer than 8"
    assert calls[-1] == (7, 7)
    assert broken_share(findings, 7) == pytest.approx(3 / 7)


def test_quick_check_reads_first_middle_and_last_frame(paths: dict[str, str]) -> None:
    assert [finding.problem for finding in check([paths["whole.mp4"], paths["cut.mp4"]], fully=False, processes=1)] == [
        "unreadable"
    ]


def test_write_findings_and_count_problems_per_class(paths: dict[str, str], tmp_path: Path) -> None:
    findings = check([paths["text.mp4"], paths["gone.mp4"], paths["short.mp4"]], 8, processes=1)
    write_findings(str(tmp_path / "bad.csv"), findings)
    rows = list(csv.DictReader((tmp_path / "bad.csv").open()))
    assert [(row["path"], row["problem"]) for row in rows] == [(f.path, f.problem) for f in findings]
    classes = {paths["text.mp4"]: ["run", "sit"], paths["gone.mp4"]: ["walk"], paths["short.mp4"]: ["run"]}
    table = count_problems(findings, classes)
    assert table[""] == {"unreadable": 1, "missing": 1, "too short": 1}
    assert table["run"] == {"unreadable": 1, "too short": 1}
    assert table["sit"] == {"unreadable": 1}


def test_find_repeats() -> None:
    lines = [
        *(ListLine("twice.mp4", "train", ("run",)), ListLine("twice.mp4", "train", ("run",))),
        *(ListLine("both.mp4", "train", ("run", "sit")), ListLine("both.mp4", "val", ("walk",))),
        *(ListLine("cut.mp4", "train", ("run",), (0, 2)), ListLine("cut.mp4", "train", ("walk",), (2, 4))),
        ListLine("once.mp4", "train", ("run",)),
    ]
    assert [(finding.path, finding.problem, finding.reason) for finding in find_repeats(lines)] == [
        ("twice.mp4", "duplicate", "listed 2 times in train"),
        ("both.mp4", "conflicting labels", "run; sit or walk"),
        ("both.mp4", "overlap", "listed in train and val"),
    ]


def test_check_folders_of_images(tmp_path: Path) -> None:
    for name in ("whole", "cut", "short"):
        (tmp_path / name).mkdir()
        for i in range(2 if name == "short" else 4):
            Image.fromarray(numbered_frame(i, 60, 80)).save(tmp_path / name / f"{i}.png")
    last = tmp_path / "cut/3.png"
    last.write_bytes(last.read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / name) for name in ("whole", "cut", "short", "empty", "gone")]
    findings = check(paths, 3, processes=1, decoder=FrameFolders(24))
    assert [(Path(finding.path).name, finding.problem) for finding in findings] == [
        ("cut", "unreadable"),
        ("short", "too short"),
        ("empty", "unreadable"),
        ("gone", "missing"),
    ]


def test_repeated_check_reads_broken_files_again(paths: dict[str, str], tmp_path: Path) -> None:
    journal = str(tmp_path / "journal")

    def problems() -> list[str]:
        return [finding.problem for finding in check(list(paths.values()), 8, processes=1, journal=journal)]

    assert problems() == ["unreadable", "unreadable", "too short", "variable frame rate", "missing"]
    for name in ("cut.mp4", "text.mp4", "short.mp4", "gone.mp4"):
        Path(paths[name]).write_bytes(Path(paths["whole.mp4"]).read_bytes())
    assert problems() == ["variable frame rate"]


def test_check_killed_at_start_keeps_the_journal(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    check(list(paths.values()), 8, processes=1, journal=str(journal))
    before = journal.read_text()
    dumps, calls = json.dumps, iter(range(10))

    def killed(content: object) -> str:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return dumps(content)

    monkeypatch.setattr(check_module.json, "dumps", killed)
    with pytest.raises(KeyboardInterrupt):
        check(list(paths.values()), 8, processes=1, journal=str(journal))
    assert journal.read_text() == before


class Crashing(PyAV):
    """A decoder that crashes its process at one file."""

    def open(self, path: str, short_side: int | None = None) -> Video:  # type: ignore[override]
        if path.endswith("text.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(path, short_side)


def test_error_names_a_file_that_kills_a_worker(paths: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"a worker process died at .*text\.mp4.*out of memory, or a file that crashes"):
        check(list(paths.values()), 8, processes=2, decoder=Crashing())
