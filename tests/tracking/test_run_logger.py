"""Log files of a run that is killed and resumed: one curve without gaps, and lists without incomplete lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import tiny_plan

from mgvideo.loading.requests import DecodeFailure
from mgvideo.tracking.run_logger import RunLogger


def record(logger: RunLogger, steps: range) -> None:
    """Log two steps a second, and an evaluation every four steps."""
    for step in steps:
        metrics: dict[str, Any] = {
            "phase": 0,
            "frames": 8,
            "size": 32,
            "batch": 8,
            "clips_per_s": 1.0,
            "data_wait": 0.0,
        }
        logger.log_train_step({"step": step, "seconds": step / 2, "loss": 1 / step, **metrics})
        if step % 4 == 0:
            logger.log_validation(step, step / 2, {"top1": float(step)})


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points that TensorBoard draws, as (step, value), by tag."""
    points = {}
    for events_folder in (folder / "tensorboard", folder / "tensorboard/by_second"):
        events = EventAccumulator(str(events_folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return points


@pytest.mark.parametrize("step", [0, 4, 5])
def test_curves_continue_after_a_kill(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RunLogger(tmp_path / "whole", tiny_plan())
    record(whole, range(1, 13))
    whole.close()
    killed = RunLogger(tmp_path / "cut", tiny_plan())
    record(killed, range(1, 10))
    killed.flush()
    later = time.time() + 1.1  # TensorBoard orders files by the second in their names
    monkeypatch.setattr(time, "time", lambda: later)
    resumed = RunLogger(tmp_path / "cut", tiny_plan(), step)
    record(resumed, range(step + 1, 13))
    resumed.close()
    expected = curves(tmp_path / "whole")
    assert {"train/loss", "val/top1", "train_by_second/loss", "val_by_second/top1"} <= expected.keys()
    assert curves(tmp_path / "cut") == expected


def test_listed_bad_videos_are_read_back_and_damaged_lines_removed(tmp_path: Path) -> None:
    first, later = DecodeFailure(3, "a, b.mp4", "cut short"), DecodeFailure(4, "c.mp4", "empty")
    logger = RunLogger(tmp_path, tiny_plan())
    logger.log_failures(2, [first])
    logger.log_failures(8, [later])
    logger.close()
    with open(tmp_path / "bad_videos.csv", "ab") as file:
        file.write(b"4,\0\xff,x,y\n\0\0\0\n5,6")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\0\n")
    resumed = RunLogger(tmp_path, tiny_plan(), 6)
    resumed.close()
    assert resumed.listed_failures == {first}
    assert (tmp_path / "bad_videos.csv").read_text().splitlines() == [
        "step,index,path,reason",
        '2,3,"a, b.mp4",cut short',
    ]
