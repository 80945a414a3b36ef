"""Being asked to stop: by a scheduler, by a person, and what SLURM expects of a job that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_REPEAT_WINDOW_S = 1.0  # seconds in which a second Ctrl-C is the same one, passed on by a launcher


class Stopped(SystemExit):
    """The run was asked to stop and all that it did is on disk; the exit code is the shell's for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


class _State:
    received = 0  # the first signal that asked
    at = 0.0
    deferred = False


def received() -> int:
    """The signal that asked this process to stop, 0 where none did."""
    return _State.received


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.received:
        if number == signal.SIGINT and now - _State.at > _REPEAT_WINDOW_S:
            os._exit(128 + number)
        return
    _State.received, _State.at = number, now
    if not _State.deferred:
        raise Stopped(number)
    if number == signal.SIGINT:
        os.write(2, b"\nfinishing the step and writing a checkpoint; Ctrl-C again leaves at once\n")


def record_early_signals() -> None:
    """Keep in mind until `listening` what a scheduler asks: by default its signals would end this process."""
    _State.deferred = True
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:  # a person may end what has not begun
            signal.signal(number, _handle)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside, the signals of `ASKING` show in `received()`; from `heed` to `defer` they raise Stopped at any place."""
    _State.deferred = True
    before = {number: signal.signal(number, _handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.received, _State.deferred = 0, False


def raise_on_signal() -> None:
    """From here to `defer` a signal raises Stopped wherever the process is; here, where one came before."""
    _State.deferred = False
    stop_if_asked()


def defer_signals() -> None:
    """From here to the end of `listening` a signal only shows in `received()`.

    What a handler raises may be lost in a callback, cut a step, or cut the report of an error.
    """
    _State.deferred = True


def stop_if_asked() -> None:
    """Raise Stopped where a signal asked for it: for loops that have nothing to save."""
    if _State.received:
        raise Stopped(_State.received)


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals of `ASKING` in this thread: processes started inside inherit that and never receive them.

    A terminal sends Ctrl-C to workers too. They stay until the parent process ends them, or ends itself.
    """
    resource_tracker.ensure_running()  # before Python 3.12 its start unblocks SIGINT and SIGTERM, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def requeue(number: int) -> None:
    """Put this SLURM job back into the queue where that is left to us.

    A job that is cancelled, or that the scheduler itself puts back, counts as running no more; one that runs and was
    asked to stop (before its time limit, or to be preempted) would otherwise be over.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number == signal.SIGINT:
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # a bare id may name a whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        command = ["scontrol", "-o", "show", "job", job]
        shown = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
        if not {"JobState=RUNNING", "BatchFlag=1", "Requeue=1"} <= set(shown.stdout.split()):
            return
        subprocess.run(["scontrol", "requeue", job], timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"warning: job {job} could not be requeued: {error}", file=sys.stderr)
    else:
        print(f"job {job} is back in SLURM's queue", file=sys.stderr)
