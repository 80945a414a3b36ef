"""Progress over many files: a bar with the time left, in a log file a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LOG_INTERVAL_S = 30.0  # seconds between two lines of a log file


class ProgressLog:
    """A context manager to call with (done, of how many); says the time left."""

    def __init__(self, name: str) -> None:
        self.name, self.started, self.told = name, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        console = Console(file=sys.stderr)
        self.bar = Bar(*columns, *left, console=console) if console.is_terminal else None
        self.task = self.bar.add_task(name, total=None) if self.bar else None

    def __enter__(self) -> ProgressLog:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show how far it is."""
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self.told >= LOG_INTERVAL_S or done == total:
            left = (now - self.started) / done * (total - done)
            print(f"{self.name}: {done} of {total}, {_clock(left)} left", file=sys.stderr, flush=True)
            self.told = now


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
