"""Log a run: a progress bar or lines, metrics.jsonl, TensorBoard events and bad_videos.csv."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mgvideo.loading.requests import DecodeFailure
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Plan
from mgvideo.storage.files import parse_json_lines, write_atomic

from .bad_videos import BadVideos
from .report import Report
from .trackers import Tracker

ACTIVITY_INTERVAL_S = 30.0  # between two lines on the progress of precise BN, a validation or a test
ProgressCallback = Callable[[int, int, bool], None]  # (batches done, batches, whether this rank waits)


class Eta:
    """Estimates the time left in training, from the measured times of the steps of each phase and of evaluations.

    All steps cost about the same by design, so a phase without a measurement gets the step time of the phase before it.

    Attributes:
        evaluation_steps: numbers of steps done after which an evaluation runs.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.evaluation_steps: Collection[int] = ()
        self.evaluations: list[float] = []  # seconds
        self.times: dict[int, tuple[float, int]] = {}  # phase -> seconds, steps

    def add(self, phase: int, seconds: float, steps: int) -> None:
        """Add the measured seconds of some steps of a phase."""
        total_seconds, total_steps = self.times.get(phase, (0.0, 0))
        self.times[phase] = (total_seconds + seconds, total_steps + steps)

    def add_evaluation(self, seconds: float) -> None:
        """Add the measured seconds of an evaluation, with its precise BN."""
        self.evaluations.append(seconds)

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds from `step` to the end of training, None before the first measurement.

        Evaluations count as soon as one is measured, and that after `step` counts as still to come.
        """
        total, step_seconds = 0.0, None
        for i, phase in enumerate(self.plan.phases):
            if i in self.times:
                step_seconds = self.times[i][0] / self.times[i][1]
            steps_left = max(0, phase.steps[1] - max(step, phase.steps[0]))
            if steps_left and step_seconds is None:
                return None
            total += steps_left * (step_seconds or 0.0)
        if self.evaluations:
            to_come = sum(evaluation_step >= step for evaluation_step in self.evaluation_steps)
            total += to_come * sum(self.evaluations) / len(self.evaluations)
        return total


class _StatusColumn(ProgressColumn):
    """The task's status text, without markup."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"])


def frames_as_image(clips: Tensor, count: int = 4, max_frames: int = 8) -> np.ndarray:
    """Return an image of the first `count` of uint8 clips `[n, t, s, s, 3]`: one row a clip, of some of its frames.

    The image is uint8 `[rows · s, columns · s, 3]`.
    """
    t = clips.shape[1]
    frames = clips[:count, np.linspace(0, t - 1, min(t, max_frames)).astype(int)].cpu().numpy()
    return np.concatenate([np.concatenate(list(clip), axis=1) for clip in frames], axis=0)


def _scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record of metrics.jsonl, by the names that TensorBoard shows."""
    for name, value in record.items():
        if name.startswith("val_"):
            yield f"val/{name[4:]}", value
        elif name not in ("step", "seconds") and isinstance(value, int | float):
            yield f"train/{name}", value


class RunLogger:
    """Prints and records a run on rank 0; on other ranks it does nothing.

    A resumed run appends to the files of the run before. Their records after `step` are removed first.

    Args:
        folder: the run's folder.
        plan: the run's plan; None if the run only tests weights whose training is not known.
        step: the step that the run resumes from, 0 for a new run.
        active: whether this process logs, which is rank 0.
        evaluated: whether the evaluation at `step` is complete. Otherwise its record is removed, since it is repeated.
        tracker: gets the same scalars as TensorBoard, and the report.
    """

    plan: Plan
    eta: Eta

    def __init__(
        self,
        folder: Path,
        plan: Plan | None,
        step: int = 0,
        active: bool = True,
        *,
        evaluated: bool = True,
        tracker: Tracker | None = None,
    ) -> None:
        self.folder, self.active, self.tracker = folder, active, tracker
        self.console = Console(file=sys.stdout, quiet=not active, soft_wrap=True, highlight=False)
        if plan is not None:
            self.plan, self.eta = plan, Eta(plan)
        self._progress: Progress | None = None
        self._progress_name = ""
        self._task: Any = None
        self._activity, self._activity_start, self._last_line = "", 0.0, 0.0
        self._printed_paths: set[str] = set()  # of bad videos that were printed
        self.bad_videos = BadVideos(folder / "bad_videos.csv")
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        records = self._truncate(step, evaluated)
        self.bad_videos.read(step)
        # stays open for the whole run
        self._metrics = open(self._metrics_path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        last_second = int(records[-1]["seconds"]) if records else 0
        # purge_step removes all events of a folder from that step on, so scalars over seconds need their own folder
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self.board_by_second = SummaryWriter(str(folder / "tensorboard/by_second"), purge_step=last_second)
        for record in records:
            if record["step"] == step:  # purge_step has removed this step too
                self._add_scalars(record)
            if int(record["seconds"]) >= last_second:
                self._add_scalars_by_second(record)

    def _truncate(self, step: int, evaluated: bool) -> list[dict[str, Any]]:
        """Cut metrics.jsonl to its state at `step`; returns the remaining records."""
        resumes = self._metrics_path.exists() and step
        lines = self._metrics_path.read_text(encoding="utf-8", errors="replace").splitlines() if resumes else []
        records = [
            record
            for record in parse_json_lines(lines)
            if record["step"] < step or (record["step"] == step and (evaluated or "loss" in record))
        ]
        write_atomic(self._metrics_path, "".join(json.dumps(record) + "\n" for record in records).encode())
        return records

    def flush(self) -> None:
        """Write all records to disk."""
        if self.active:
            os.fsync(self._metrics.fileno())
            self.bad_videos.write()
            self.board.flush()
            self.board_by_second.flush()

    def print_line(self, text: str) -> None:
        """Print a line."""
        if self.active:
            (self._progress.console if self._progress else self.console).print(text, markup=False)

    def print_renderable(self, renderable: object) -> None:
        """Print a rich renderable, such as the plan's table."""
        if self.active:
            self.console.print(renderable)

    def start_progress(self, step: int) -> None:
        """Show a progress bar if the output is a terminal."""
        self.stop_progress()
        if self.active and self.console.is_terminal:
            self._start_bar("train", self.plan.steps, step)

    def showing_progress(self, name: str, on_progress: ProgressCallback) -> ProgressCallback:
        """Return a callback that calls `on_progress`, and shows the progress of an activity other than training."""

        def show(done: int, total: int, is_waiting: bool) -> None:
            on_progress(done, total, is_waiting)
            self.show_activity(name, done, total)

        return show

    def show_activity(self, name: str, done: int, total: int) -> None:
        """Show the progress of precise BN, a validation or a test, in batches, with the time left.

        On a terminal this is in the progress bar, otherwise a line every `ACTIVITY_INTERVAL_S`.
        """
        if not self.active:
            return
        now = time.monotonic()
        if done == 0 or name != self._activity:
            self._activity, self._activity_start, self._last_line = name, now, now
        left = f", {format_duration((now - self._activity_start) / done * (total - done))} left" if done else ""
        if self.console.is_terminal:
            if not self._progress:
                self._start_bar(name, total)
            is_training = self._progress_name == "train"
            progress: Any = self._progress
            progress.update(self._task, status=f"{name}: batch {done} of {total}{left}")
            if not is_training:
                progress.update(self._task, completed=done, total=total)
        elif now - self._last_line >= ACTIVITY_INTERVAL_S and done < total:
            self._last_line = now
            self.print_line(f"{name}: {done} of {total} batches{left}")

    def _start_bar(self, name: str, total: int, completed: int = 0) -> None:
        columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(24), _StatusColumn()
        self._progress, self._progress_name = Progress(*columns, console=self.console, transient=True), name
        self._task = self._progress.add_task(name, total=total, completed=completed, status="starting")
        self._progress.start()

    def stop_progress(self) -> None:
        """Remove the progress bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def log_train_step(self, record: dict[str, Any]) -> None:
        """Record the metrics of a log step, and show the status of the run."""
        if not self.active:
            return
        self._record(record)
        seconds_left = self.eta.seconds_left(record["step"])
        time_left = "" if seconds_left is None else f"{format_duration(seconds_left)} left"
        status = (
            f"phase {record['phase'] + 1}/{len(self.plan.phases)} · {record['frames']}×{record['size']}² "
            f"batch {record['batch']} · loss {record['loss']:.3f} · {record['clips_per_s']:.0f} clips/s · "
            f"data wait {record['data_wait']:.0%} · {time_left}"
        )
        if self._progress:
            self._progress.update(self._task, completed=record["step"], status=status)
        else:
            self.print_line(f"step {record['step']}/{self.plan.steps} · {status}")

    def log_validation(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Record and print the metrics of an evaluation."""
        if not self.active:
            return
        record = {"step": step, "seconds": seconds, **{f"val_{name}": value for name, value in metrics.items()}}
        self._record(record)
        self.print_line(
            f"step {step}/{self.plan.steps} · validation " + " · ".join(f"{k} {v:.1f}" for k, v in metrics.items())
        )

    def log_clips(self, step: int, phase: int, clips: Tensor) -> None:
        """Write the first input clips of a phase to TensorBoard."""
        if self.active:
            self.board.add_image(f"clips/phase_{phase:02d}", frames_as_image(clips), step, dataformats="HWC")

    def log_failures(self, step: int, failures: Iterable[DecodeFailure], part: str) -> None:
        """Count videos of a part of the dataset that cannot be decoded, and print each once."""
        if not self.active:
            return
        self.bad_videos.add(step, part, failures)
        for failure in failures:
            if failure.path not in self._printed_paths:
                self._printed_paths.add(failure.path)
                self.print_line(f"bad video {failure.path}: {failure.reason}")

    def load_bad_videos(self, state: Iterable[Sequence[Any]]) -> None:
        """Restore the bad videos of the checkpoint that a run resumes from."""
        if self.active:
            self.bad_videos.load(state)

    def log_test(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of the test to test.json, TensorBoard and the tracker."""
        if not self.active:
            return
        scalars = {f"test/{name}": value for name, value in metrics.items()}
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(scalars, step)
        write_atomic(self.folder / "test.json", json.dumps({"step": step, **metrics}).encode())

    def log_report(self, report: Report) -> None:
        """Write the report to the run's folder and the tracker, and print it."""
        if not self.active:
            return
        report.write()
        if self.tracker:
            files = [self.folder / name for name in ("report.md", "report.json", "predictions.csv", "per_class.csv")]
            self.tracker.log_report(report.as_json(), [file for file in files if file.exists()])
        self.print_line("\n" + report.markdown())

    def _record(self, record: dict[str, Any]) -> None:
        """Write a record to metrics.jsonl, TensorBoard and the tracker."""
        self._metrics.write(json.dumps(record) + "\n")
        if self.tracker:
            self.tracker.log(dict(_scalars(record)), record["step"])
        self._add_scalars(record)
        self._add_scalars_by_second(record)

    def _add_scalars(self, record: dict[str, Any]) -> None:
        """Write a record's numbers to TensorBoard, over steps."""
        for name, value in _scalars(record):
            self.board.add_scalar(name, value, record["step"])

    def _add_scalars_by_second(self, record: dict[str, Any]) -> None:
        """Write a record's loss and validation metrics to TensorBoard, over whole seconds of training."""
        for name, value in record.items():
            if name.startswith("val_"):
                self.board_by_second.add_scalar(f"val_by_second/{name[4:]}", value, int(record["seconds"]))
        if "loss" in record:
            self.board_by_second.add_scalar("train_by_second/loss", record["loss"], int(record["seconds"]))

    def close(self) -> None:
        """Remove the progress bar and close all files. During an exception, the tracked run is marked as failed."""
        self.stop_progress()
        if self.tracker:
            self.tracker.close(failed=sys.exc_info()[0] is not None)
        if self.active:
            self.bad_videos.write()
            self._metrics.close()
            self.board.close()
            self.board_by_second.close()
