"""Log files of a run that is killed and resumed: one curve without gaps, and lists without incomplete lines."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import tiny_plan

from mgvideo.loading.requests import DecodeFailure
from mgvideo.tracking.run_logger import Eta, RunLogger


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


def test_bad_videos_are_listed_once_with_a_count_and_damaged_lines_removed(tmp_path: Path) -> None:
    first, later = DecodeFailure(3, "a, b.mp4", "cut short"), DecodeFailure(4, "c.mp4", "empty")
    logger = RunLogger(tmp_path, tiny_plan())
    logger.log_failures(2, [first, first], "train")
    logger.log_failures(4, [first], "train")
    logger.log_failures(8, [later], "train")
    logger.log_failures(8, [DecodeFailure(3, "a, b.mp4", "cut short")], "val")
    logger.close()
    lines = (tmp_path / "bad_videos.csv").read_text().splitlines()
    assert lines == [
        "part,index,path,reason,count,step",
        'train,3,"a, b.mp4",cut short,3,2',
        "train,4,c.mp4,empty,1,8",
        'val,3,"a, b.mp4",cut short,1,8',
    ]
    with open(tmp_path / "bad_videos.csv", "ab") as file:
        file.write(b"train,4,\0\xff,x,y,1\n\0\0\0\n5,6")
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\0\n")
    resumed = RunLogger(tmp_path, tiny_plan(), 6)
    resumed.close()
    assert (tmp_path / "bad_videos.csv").read_text().splitlines() == lines[:2]


def test_a_checkpoint_restores_the_counts_of_bad_videos(tmp_path: Path) -> None:
    failure = DecodeFailure(3, "a.mp4", "empty")
    logger = RunLogger(tmp_path, tiny_plan())
    logger.log_failures(2, [failure], "train")
    state = logger.bad_videos.state()
    logger.log_failures(4, [failure], "train")
    logger.log_failures(4, [DecodeFailure(5, "b.mp4", "empty")], "train")
    logger.close()
    resumed = RunLogger(tmp_path, tiny_plan(), 2)
    resumed.load_bad_videos(state)
    resumed.close()
    assert (tmp_path / "bad_videos.csv").read_text().splitlines()[1:] == ["train,3,a.mp4,empty,1,2"]


def test_time_left_counts_the_evaluations_to_come() -> None:
    plan = tiny_plan("baseline")
    eta = Eta(plan)
    eta.evaluation_steps = {phase.steps[1] for phase in plan.phases}
    eta.add(0, 2.0, 2)
    assert eta.seconds_left(2) == plan.steps - 2, "no evaluation is measured yet"
    eta.add_evaluation(3.0)
    eta.add_evaluation(5.0)
    assert eta.seconds_left(2) == plan.steps - 2 + 4 * len(plan.phases)
    assert eta.seconds_left(plan.steps - 1) == 1 + 4
    assert eta.seconds_left(plan.steps) == 4, "the last evaluation"


def test_long_activities_print_progress_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    logger = RunLogger(tmp_path, tiny_plan())
    calls: list[int] = []
    show = logger.showing_progress("precise BN", lambda done, *_: calls.append(done))
    for done in range(11):
        show(done, 10, True)
        now += 10.0
    logger.close()
    assert calls == [*range(11)]
    assert capsys.readouterr().out.splitlines() == [
        "precise BN: 3 of 10 batches, 70 s left",
        "precise BN: 6 of 10 batches, 40 s left",
        "precise BN: 9 of 10 batches, 10 s left",
    ]
