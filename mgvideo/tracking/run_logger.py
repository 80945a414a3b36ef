"""Log a run: a progress bar or lines, metrics.jsonl, TensorBoard events and bad_videos.csv."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from io import StringIO
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

from .report import Report
from .trackers import Tracker

BAD_VIDEOS_COLUMNS = ("step", "index", "path", "reason")  # of bad_videos.csv


class Eta:
    """Estimates the time left in training, from the measured step times of each phase.

    All steps cost about the same by design, so a phase without a measurement gets the step time of the phase before it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.times: dict[int, tuple[float, int]] = {}  # phase -> seconds, steps

    def add(self, phase: int, seconds: float, steps: int) -> None:
        """Add the measured seconds of some steps of a phase."""
        total_seconds, total_steps = self.times.get(phase, (0.0, 0))
        self.times[phase] = (total_seconds + seconds, total_steps + steps)

    def seconds_left(self, step: int) -> float | None:
        """Return the seconds from `step` to the end of training, None before the first measurement."""
        total, step_seconds = 0.0, None
        for i, phase in enumerate(self.plan.phases):
            if i in self.times:
                step_seconds = self.times[i][0] / self.times[i][1]
            steps_left = max(0, phase.steps[1] - max(step, phase.steps[0]))
            if steps_left and step_seconds is None:
                return None
            total += steps_left * (step_seconds or 0.0)
        return total


class _StatusColumn(ProgressColumn):
    """The task's status text, without markup."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"])


def frames_as_image(clips: Tensor, count: int = 4) -> np.ndarray:
    """Return an image of the first `count` of uint8 clips `[n, t, s, s, 3]`: one row a clip, of at most eight frames.

    The image is uint8 `[rows · s, columns · s, 3]`.
    """
    t = clips.shape[1]
    frames = clips[:count, np.linspace(0, t - 1, min(t, 8)).astype(int)].cpu().numpy()
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
        self._task: Any = None
        self._printed_paths: set[str] = set()  # of bad videos that were printed
        self.listed_failures: set[DecodeFailure] = set()  # in bad_videos.csv when this process started
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        records = self._truncate(step, evaluated)
        self._truncate_bad_videos(step)
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

    def _truncate_bad_videos(self, step: int) -> None:
        """Cut bad_videos.csv to its state at `step`, without lines that a killed run or a failing disk damaged."""
        path = self.folder / "bad_videos.csv"
        if not path.exists():
            return
        lines = path.read_bytes().decode(errors="surrogateescape").replace("\0", "")
        rows = [row for row in csv.reader(StringIO(lines, newline="")) if len(row) == len(BAD_VIDEOS_COLUMNS)]
        rows = [row for row in rows if row[0].isdecimal() and row[1].isdecimal() and int(row[0]) <= step]
        self.listed_failures = {DecodeFailure(int(index), video, reason) for _, index, video, reason in rows}
        text = StringIO(newline="")
        csv.writer(text).writerows([BAD_VIDEOS_COLUMNS, *rows])
        write_atomic(path, text.getvalue().encode(errors="surrogateescape"))

    def flush(self) -> None:
        """Write all records to disk."""
        if self.active:
            os.fsync(self._metrics.fileno())
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
        if self.active and self.console.is_terminal:
            columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(24), _StatusColumn()
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("train", total=self.plan.steps, completed=step, status="starting")
            self._progress.start()

    def show_test_progress(self, done: int, total: int) -> None:
        """Show the progress of a test if the output is a terminal."""
        if not (self.active and self.console.is_terminal):
            return
        if not self._progress:
            columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(24), TextColumn("test")
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("test", total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)

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

    def log_failures(self, step: int, failures: Iterable[DecodeFailure]) -> None:
        """Log videos that cannot be decoded: every failure in bad_videos.csv, each video once on the terminal."""
        if not self.active:
            return
        path = self.folder / "bad_videos.csv"
        is_new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(BAD_VIDEOS_COLUMNS)
            for failure in failures:
                writer.writerow([step, failure.index, failure.path, failure.reason])
                if failure.path not in self._printed_paths:
                    self._printed_paths.add(failure.path)
                    self.print_line(f"bad video {failure.path}: {failure.reason}")

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
            self._metrics.close()
            self.board.close()
            self.board_by_second.close()
