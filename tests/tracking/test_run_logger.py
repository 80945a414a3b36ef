"""What a run leaves behind when it is killed and goes on: one curve, and lists without what was half written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import tiny_plan

from mgvideo.loading.requests import DecodeFailure
from mgvideo.tracking.run_logger import RunLogger


def record(monitor: RunLogger, steps: range) -> None:
    """Two steps a second, and an evaluation each four steps."""
    for step in steps:
        figures: dict[str, Any] = {
            "phase": 0,
            "frames": 8,
            "size": 32,
            "batch": 8,
            "clips_per_s": 1.0,
            "data_wait": 0.0,
        }
        monitor.train({"step": step, "seconds": step / 2, "loss": 1 / step, **figures})
        if step % 4 == 0:
            monitor.validation(step, step / 2, {"top1": float(step)})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point that TensorBoard would draw, by tag."""
    found = {}
    for place in (folder / "tensorboard", folder / "tensorboard/by_second"):
        events = EventAccumulator(str(place), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.mark.parametrize("step", [0, 4, 5])
def test_every_curve_is_one_after_a_kill(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunLogger(tmp_path / "whole", tiny_plan())
    record(whole, range(1, 13))
    whole.close()
    killed = RunLogger(tmp_path / "cut", tiny_plan())
    record(killed, range(1, 10))
    killed.flush()
    later = time.time() + 1.1  # TensorBoard reads files by the second that stands in their names
    monkeypatch.setattr(time, "time", lambda: later)
    again = RunLogger(tmp_path / "cut", tiny_plan(), step)
    record(again, range(step + 1, 13))
    again.close()
    expected = curves(tmp_path / "whole")
    assert {"train/loss", "val/top1", "train_by_second/loss", "val_by_second/top1"} <= expected.keys()
    assert curves(tmp_path / "cut") == expected


def test_bad_videos_that_are_listed_are_known_again_and_rotten_lines_dropped(tmp_path: Path) -> None:
    first, later = DecodeFailure(3, "a, b.mp4", "cut short"), DecodeFailure(4, "c.mp4", "empty")
    monitor = RunLogger(tmp_path, tiny_plan())
    monitor.failures(2, [first])
    monitor.failures(8, [later])
    monitor.close()
    with open(tmp_path / "bad_videos.csv", "ab") as file:
        file.write(b"4,\0\xff,x,y\n\0\0\0\n5,6")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\0\n")
    again = RunLogger(tmp_path, tiny_plan(), 6)
    again.close()
    assert again.listed == {first}
    assert (tmp_path / "bad_videos.csv").read_text().splitlines() == [
        "step,index,path,reason",
        '2,3,"a, b.mp4",cut short',
    ]
