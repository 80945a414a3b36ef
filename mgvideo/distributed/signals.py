"""Handle the signals that stop a run, and requeue its SLURM job.

The first stop signal that this process receives is process-wide state, held by `_StopSignal`.
"""

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
_REPEAT_WINDOW_S = 1.0  # a second Ctrl-C within this time is the first one again, forwarded by a launcher


class Stopped(SystemExit):
    """A signal stopped the run, and everything that the run did is on disk. Exit code: 128 + signal, as shells use."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.name = signal.Signals(number).name


class _StopSignal:
    number = 0  # the first stop signal that this process received; 0: none
    received_at = 0.0  # time.monotonic()
    deferred = False  # the handler only records a signal, and does not raise Stopped


def received_signal() -> int:
    """Return the first stop signal that this process received, 0 if none."""
    return _StopSignal.number


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _StopSignal.number:
        if number == signal.SIGINT and now - _StopSignal.received_at > _REPEAT_WINDOW_S:
            os._exit(128 + number)
        return
    _StopSignal.number, _StopSignal.received_at = number, now
    if not _StopSignal.deferred:
        raise Stopped(number)
    if number == signal.SIGINT:
        os.write(2, b"\nfinishing the step and writing a checkpoint; press Ctrl-C again to exit at once\n")


def record_early_signals() -> None:
    """Record stop signals until `handle_signals` starts: their default action would kill this process.

    SIGINT keeps its default action, so that Ctrl-C ends a program that has not started its work.
    """
    _StopSignal.deferred = True
    for number in STOP_SIGNALS:
        if number != signal.SIGINT:
            signal.signal(number, _handle)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Inside, record `STOP_SIGNALS` for `received_signal()`.

    From `raise_on_signal()` to `defer_signals()` they also raise Stopped, at any point of the main thread.
    """
    _StopSignal.deferred = True
    previous_handlers = {number: signal.signal(number, _handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        _StopSignal.number, _StopSignal.deferred = 0, False


def raise_on_signal() -> None:
    """Let a signal raise Stopped at any point until `defer_signals()`; raise it now if one was received before."""
    _StopSignal.deferred = False
    raise_if_stopped()


def defer_signals() -> None:
    """Only record signals from here on, until `raise_on_signal()` or the end of `handle_signals`.

    An exception from a signal handler may be lost in a callback, interrupt a training step, or interrupt the report of
    an error.
    """
    _StopSignal.deferred = True


def raise_if_stopped() -> None:
    """Raise Stopped if this process received a stop signal. For loops that have nothing to save."""
    if _StopSignal.number:
        raise Stopped(_StopSignal.number)


@contextmanager
def block_signals() -> Iterator[None]:
    """Block `STOP_SIGNALS` in this thread, so that processes started inside inherit the mask and never receive them.

    A terminal sends Ctrl-C to worker processes too. Workers run until the parent process ends them or exits.
    """
    resource_tracker.ensure_running()  # start it first: before Python 3.12 its start unblocks SIGINT and SIGTERM
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def requeue(number: int) -> None:
    """Put this SLURM job back into the queue after signal `number`, if SLURM does not do so itself.

    SLURM sends a signal to a running job before its time limit or before preemption; the job would then end for good.
    It is requeued only in state RUNNING: a job that is cancelled, or that the scheduler requeues, has another state.
    After SIGINT nothing is requeued.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or number == signal.SIGINT:
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # SLURM_JOB_ID may stand for the whole array
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
