"""Progress over many files: a progress bar in a terminal, a line every 30 seconds in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mgvideo.plan.formatting import format_duration

LOG_INTERVAL_S = 30.0


class ProgressLog:
    """A context manager; call it with (done, total) to show progress and the time left on stderr."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.last_line = name, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        remaining = (TextColumn("left"), TimeRemainingColumn())
        console = Console(file=sys.stderr)
        self.bar = Bar(*columns, *remaining, console=console) if console.is_terminal else None
        self.task = self.bar.add_task(name, total=None) if self.bar else None

    def __enter__(self) -> ProgressLog:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Update the bar, or print a line if the last one is older than `LOG_INTERVAL_S` or all is done."""
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.last_line >= LOG_INTERVAL_S or done == total:
            left = (now - self.started) / done * (total - done)
            print(f"{self.name}: {done} of {total}, {format_duration(left)} left", file=sys.stderr, flush=True)
            self.last_line = now
