"""What a run shows and leaves behind: a progress bar or lines, metrics.jsonl, TensorBoard events, bad_videos.csv."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable
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
from mgvideo.storage.checkpoints import write_atomic

BAD_VIDEOS = ("step", "index", "path", "reason")  # columns of bad_videos.csv


class Eta:
    """Time left, from the step times of each phase as they come.

    Steps cost about the same by design, so a phase not yet seen is taken to cost what the last one does.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.times: dict[int, tuple[float, int]] = {}  # phase -> seconds, steps

    def add(self, phase: int, seconds: float, steps: int) -> None:
        """Count measured steps of a phase."""
        before = self.times.get(phase, (0.0, 0))
        self.times[phase] = (before[0] + seconds, before[1] + steps)

    def left(self, step: int) -> float | None:
        """Seconds from `step` to the end, None before anything was measured."""
        total, last = 0.0, None
        for i, phase in enumerate(self.plan.phases):
            if i in self.times:
                last = self.times[i][0] / self.times[i][1]
            steps_left = max(0, phase.steps[1] - max(step, phase.steps[0]))
            if steps_left and last is None:
                return None
            total += steps_left * (last or 0.0)
        return total


class _Status(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["status"])


def frames_as_image(clips: Tensor, count: int = 4) -> np.ndarray:
    """The first clips of uint8 `[n, t, s, s, 3]`, one a row, at most eight frames of each, as one image."""
    t = clips.shape[1]
    chosen = clips[:count, np.linspace(0, t - 1, min(t, 8)).astype(int)].cpu().numpy()
    return np.concatenate([np.concatenate(list(clip), axis=1) for clip in chosen], axis=0)


class RunLogger:
    """Shows and records a run on rank 0; on other ranks it does nothing.

    A resumed run goes on in the same files: what they hold of later steps than `step` is dropped first, and of `step`
    itself its evaluation where that is to be repeated.
    """

    def __init__(self, folder: Path, plan: Plan, step: int = 0, active: bool = True, *, evaluated: bool = True) -> None:
        self.folder, self.active = folder, active
        self.console = Console(file=sys.stdout, quiet=not active, soft_wrap=True, highlight=False)
        self.eta = Eta(plan)
        self.plan = plan
        self._progress: Progress | None = None
        self._task: Any = None
        self._named: set[str] = set()  # bad videos that the terminal has been told
        self.listed: set[DecodeFailure] = set()  # in bad_videos.csv before this process
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics_path = folder / "metrics.jsonl"
        kept = self._truncate(step, evaluated)
        self._truncate_bad_videos(step)
        self._metrics = open(self._metrics_path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open for the whole run
        second = int(kept[-1]["seconds"]) if kept else 0
        # TensorBoard drops what a folder holds from a step on: figures by second need a folder of their own
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self.board_by_second = SummaryWriter(str(folder / "tensorboard/by_second"), purge_step=second)
        for record in kept:
            if record["step"] == step:  # it drops whole steps, this one too
                self._draw(record)
            if int(record["seconds"]) >= second:
                self._draw_by_second(record)

    def _truncate(self, step: int, evaluated: bool) -> list[dict[str, Any]]:
        """Rewrite metrics.jsonl as it was at `step`; the records that are left."""
        kept = []
        there = self._metrics_path.exists() and step
        lines = self._metrics_path.read_text(encoding="utf-8", errors="replace").splitlines() if there else []
        for line in lines:
            try:
                record = json.loads(line)
                if record["step"] < step or (record["step"] == step and (evaluated or "loss" in record)):
                    kept.append(record)
            except (ValueError, KeyError):
                continue  # the half line that a killed run left
        write_atomic(self._metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        return kept

    def _truncate_bad_videos(self, step: int) -> None:
        """Rewrite bad_videos.csv as it was at `step`, without what a killed run or a failing disk left half written."""
        path = self.folder / "bad_videos.csv"
        if not path.exists():
            return
        lines = path.read_bytes().decode(errors="surrogateescape").replace("\0", "")
        rows = [row for row in csv.reader(StringIO(lines, newline="")) if len(row) == len(BAD_VIDEOS)]
        kept = [row for row in rows if row[0].isdecimal() and row[1].isdecimal() and int(row[0]) <= step]
        self.listed = {DecodeFailure(int(index), where, reason) for _, index, where, reason in kept}
        text = StringIO(newline="")
        csv.writer(text).writerows([BAD_VIDEOS, *kept])
        write_atomic(path, text.getvalue().encode(errors="surrogateescape"))

    def flush(self) -> None:
        """Bring to disk what was recorded so far."""
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
        """Show a bar where there is a terminal."""
        if self.active and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.percentage:3.0f}%"), BarColumn(24), _Status(), console=self.console, transient=True
            )
            self._task = self._progress.add_task("train", total=self.plan.steps, completed=step, status="starting")
            self._progress.start()

    def tested(self, done: int, total: int) -> None:
        """Show how far a test is, where there is a terminal."""
        if not (self.active and self.console.is_terminal):
            return
        if not self._progress:
            columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(24), TextColumn("test")
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task("test", total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)

    def stop_progress(self) -> None:
        """Leave the terminal as it was."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def train(self, record: dict[str, Any]) -> None:
        """Record the metrics of a log step, and show where the run is."""
        if not self.active:
            return
        self._record(record)
        left = self.eta.left(record["step"])
        status = (
            f"phase {record['phase'] + 1}/{len(self.plan.phases)} · {record['frames']}×{record['size']}² "
            f"batch {record['batch']} · loss {record['loss']:.3f} · {record['clips_per_s']:.0f} clips/s · "
            f"data wait {record['data_wait']:.0%} · {'' if left is None else format_duration(left) + ' left'}"
        )
        if self._progress:
            self._progress.update(self._task, completed=record["step"], status=status)
        else:
            self.print_line(f"step {record['step']}/{self.plan.steps} · {status}")

    def validation(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Record and show an evaluation."""
        if not self.active:
            return
        record = {"step": step, "seconds": seconds, **{f"val_{name}": value for name, value in metrics.items()}}
        self._record(record)
        self.print_line(
            f"step {step}/{self.plan.steps} · validation " + " · ".join(f"{k} {v:.1f}" for k, v in metrics.items())
        )

    def clips(self, step: int, phase: int, clips: Tensor) -> None:
        """Show a few input clips of a phase in TensorBoard."""
        if self.active:
            self.board.add_image(f"clips/phase_{phase:02d}", frames_as_image(clips), step, dataformats="HWC")

    def failures(self, step: int, failures: Iterable[DecodeFailure]) -> None:
        """Name bad videos: in bad_videos.csv each time that one is met, on the terminal the first time."""
        if not self.active:
            return
        path = self.folder / "bad_videos.csv"
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(BAD_VIDEOS)
            for failure in failures:
                writer.writerow([step, failure.index, failure.path, failure.reason])
                if failure.path not in self._named:
                    self._named.add(failure.path)
                    self.print_line(f"bad video {failure.path}: {failure.reason}")

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(record) + "\n")
        self._draw(record)
        self._draw_by_second(record)

    def _draw(self, record: dict[str, Any]) -> None:
        """A record's figures in TensorBoard."""
        for name, value in record.items():
            if name.startswith("val_"):
                self.board.add_scalar(f"val/{name[4:]}", value, record["step"])
            elif name not in ("step", "seconds") and isinstance(value, int | float):
                self.board.add_scalar(f"train/{name}", value, record["step"])

    def _draw_by_second(self, record: dict[str, Any]) -> None:
        """Those of them that are compared over time: the loss, and validation's."""
        for name, value in record.items():
            if name.startswith("val_"):
                self.board_by_second.add_scalar(f"val_by_second/{name[4:]}", value, int(record["seconds"]))
        if "loss" in record:
            self.board_by_second.add_scalar("train_by_second/loss", record["loss"], int(record["seconds"]))

    def close(self) -> None:
        """Flush everything."""
        self.stop_progress()
        if self.active:
            self._metrics.close()
            self.board.close()
            self.board_by_second.close()
