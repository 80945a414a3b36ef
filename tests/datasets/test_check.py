"""Checking files: what is wrong with each, in words, and in numbers per class."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from videos import write

from mgvideo.datasets.check import broken_share, check, summary, write_findings


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """One file of each kind."""
    faststart = write(tmp_path / "whole.mp4", options={"g": "10", "movflags": "faststart"})
    data = faststart.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(len(data) * 0.6)])
    (tmp_path / "text.mp4").write_text("no video")
    write(tmp_path / "short.mp4", frames=5)
    write(tmp_path / "uneven.mp4", times=lambda i: i + 3 * (i // 10))
    write(tmp_path / "even.mkv", fps=30)
    names = ("whole.mp4", "cut.mp4", "text.mp4", "short.mp4", "uneven.mp4", "even.mkv", "gone.mp4")
    return {name: str(tmp_path / name) for name in names}


@pytest.mark.parametrize("processes", [1, 2])
def test_each_problem_is_named(paths: dict[str, str], processes: int) -> None:
    calls: list[tuple[int, int]] = []
    listed = [*paths.values(), paths["whole.mp4"]]
    findings = check(listed, 8, processes=processes, progress=lambda done, total: calls.append((done, total)))
    assert [(Path(finding.path).name, finding.problem) for finding in findings] == [
        ("whole.mp4", "duplicate"),
        ("cut.mp4", "unreadable"),
        ("text.mp4", "unreadable"),
        ("short.mp4", "too short"),
        ("uneven.mp4", "variable frame rate"),
        ("gone.mp4", "missing"),
    ]
    assert findings[3].reason == "5 frames, fewer than 8"
    assert calls[-1] == (7, 7)
    assert broken_share(findings, 7) == pytest.approx(3 / 7)


def test_a_quick_look_reads_the_ends_and_the_middle(paths: dict[str, str]) -> None:
    assert [finding.problem for finding in check([paths["whole.mp4"], paths["cut.mp4"]], fully=False, processes=1)] == [
        "unreadable"
    ]


def test_findings_are_written_and_counted_per_class(paths: dict[str, str], tmp_path: Path) -> None:
    findings = check([paths["text.mp4"], paths["gone.mp4"], paths["short.mp4"]], 8, processes=1)
    write_findings(str(tmp_path / "bad.csv"), findings)
    rows = list(csv.DictReader((tmp_path / "bad.csv").open()))
    assert [(row["path"], row["problem"]) for row in rows] == [(f.path, f.problem) for f in findings]
    labels = {paths["text.mp4"]: "run", paths["gone.mp4"]: "walk", paths["short.mp4"]: "run"}
    table = summary(findings, labels)
    assert table[""] == {"unreadable": 1, "missing": 1, "too short": 1}
    assert table["run"] == {"unreadable": 1, "too short": 1}
