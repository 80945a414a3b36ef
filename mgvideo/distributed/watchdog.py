"""A watchdog thread on every rank: when a rank fails, dies or hangs, all ranks exit and name the first failure.

Once a second every rank's watchdog writes a heartbeat to the rendezvous store, with the position of its main thread.
It then checks the store for a failure, and checks the heartbeat of the next rank. So all ranks notice a dead rank on
any backend, long before a collective operation times out.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from mgvideo.errors import UserError, print_error

from .signals import Stopped, received_signal

# Limits count heartbeats, one a second, and not time: after SLURM suspends and resumes a job, no rank counts as dead.
MAX_SILENT_HEARTBEATS = 10  # heartbeats of this rank without a new one of the next rank, until that rank counts as dead
MAX_SILENT_HEARTBEATS_AFTER_FAILURE = 4  # the same limit after a collective operation failed
EXIT_GRACE_HEARTBEATS = 8  # after a failure: heartbeats until the watchdog exits the process under its main thread
STUCK_TIMEOUT_S = 60.0  # upper limit for waiting, after a failed collective operation, for heartbeats to name the cause

LEAVING = "stopping after a signal"  # a position. Rank 0 may stay there for long, since it writes a checkpoint


@dataclass(frozen=True)
class RankFailure:
    """The first failure of a run: the rank, the position of its main thread, and the error message."""

    rank: int
    where: str
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed first, {self.where}: {self.error}"


class RankError(Exception):
    """Another rank failed, so this one ends."""


@dataclass
class _Report:
    where: str = "before the first step"
    order: tuple[int, ...] = (-1,)  # (step, part of the step, …)
    limit: float | None = None  # heartbeats (about seconds) that the main thread may stay here; None: no limit
    heartbeats: int = 0  # since the main thread reported this position


class Position:
    """The position of the main thread in the run. The main thread reports it, and the watchdog thread reads it."""

    def __init__(self) -> None:
        self.last_report = _Report()

    def report(self, where: str, order: tuple[int, ...] = (-1,), limit: float | None = None) -> None:
        """Set the position.

        Args:
            where: the position in words, for error messages.
            order: (step, part of the step, …); the ranks with the smallest order hold up the others.
            limit: seconds in which the main thread should report another position; None for no limit.
        """
        self.last_report = _Report(where, order, limit)

    def __str__(self) -> str:
        return self.last_report.where


class Watchdog(threading.Thread):
    """The watchdog thread of this rank, whose main thread reports to `position`.

    `store` is a client of the rendezvous store for this thread alone: the main thread may block in its own client.
    `failure` is the first failure of the run, None before there is one.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, position: Position) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.position = position
        self.store = dist.PrefixStore("watchdog", store)
        self.rank, self.size = rank, size
        self.failure: RankFailure | None = None
        self._done = threading.Event()
        self._collective_failed = False
        self._heartbeats = 0
        self._next_rank: tuple[str, int] = ("", 0)  # its last heartbeat, and for how many of ours it has not changed

    def start(self) -> None:
        """Write the first heartbeat at once, so that the other ranks notice even an early death, and start."""
        self._check_heartbeats()
        super().start()

    def run(self) -> None:
        """Check heartbeats each second until `stop`; after a failure, exit the process unless its main thread does."""
        grace = EXIT_GRACE_HEARTBEATS
        while not self._done.wait(1.0):
            if self.failure is None:
                try:
                    self._check_heartbeats()
                except (RuntimeError, ValueError) as error:  # rank 0, or torchrun, holds the store
                    text = f"the rendezvous store does not answer ({_first_line(error)})"
                    self.failure = RankFailure(0, "unreachable", text)
            elif grace == 0:
                print_error(self.failure, self.rank)
                os._exit(1)
            else:
                grace -= 1

    def _check_heartbeats(self) -> None:
        """Write this rank's heartbeat, then check for a posted failure, for a dead next rank and for a hanging rank."""
        current = self.position.last_report
        current.heartbeats += 1
        self._heartbeats += 1
        heartbeat = [self._heartbeats, current.where, current.order, current.limit, current.heartbeats]
        self.store.set(f"rank{self.rank}", json.dumps(heartbeat))
        if self.store.check(["failure"]):
            self.failure = RankFailure(**json.loads(self.store.get("failure")))
            return
        self._check_next_rank()
        if current.limit is not None and current.heartbeats > current.limit:
            self._find_hanging_rank()

    def _find_hanging_rank(self) -> None:
        """Post a failure of the rank that is furthest behind, if it has exceeded the limit of its position."""
        keys = [f"rank{r}" for r in range(self.size)]
        if not self.store.check(keys):
            return
        heartbeats = [json.loads(text) for text in self.store.multi_get(keys)]
        least = min(order for _, _, order, *_ in heartbeats)
        behind = [r for r, (_, _, order, *_) in enumerate(heartbeats) if order == least]
        if any(limit is None or count <= limit for *_, limit, count in (heartbeats[r] for r in behind)):
            return
        others = f", or rank {', '.join(map(str, behind[1:]))}," if len(behind) > 1 else ""
        _, where, _, limit, _ = heartbeats[behind[0]]
        text = f"it{others} hangs: nothing has happened for {limit:g} s (hang_timeout)"
        self.post(RankFailure(behind[0], where, text))

    def _check_next_rank(self) -> None:
        """Post a failure of the next rank if its heartbeat has not changed for too long."""
        key = f"rank{(self.rank + 1) % self.size}"
        heartbeat = self.store.get(key).decode() if self.store.check([key]) else ""
        ended = bool(heartbeat) and json.loads(heartbeat)[0] < 0
        if heartbeat != self._next_rank[0] or not heartbeat or ended:
            self._next_rank = (heartbeat, 0)
            return
        self._next_rank = (heartbeat, self._next_rank[1] + 1)
        limit = MAX_SILENT_HEARTBEATS_AFTER_FAILURE if self._collective_failed else MAX_SILENT_HEARTBEATS
        if self._next_rank[1] >= limit:
            text = "it stopped sending heartbeats: was it killed, out of memory, or on a lost node?"
            self.post(RankFailure((self.rank + 1) % self.size, json.loads(heartbeat)[1], text))

    def post(self, failure: RankFailure) -> RankFailure:
        """Publish a failure to all ranks; returns the failure that was published first."""
        first = self.store.compare_set("failure", "", json.dumps(asdict(failure)))
        self.failure = RankFailure(**json.loads(first))
        return self.failure

    def leaves(self, rank: int) -> bool:
        """Whether the position of a rank is `LEAVING`."""
        key = f"rank{rank}"
        return self.store.check([key]) and json.loads(self.store.get(key))[1] == LEAVING

    def explain(self, error: BaseException) -> BaseException:
        """Return the exception to raise in place of the main thread's: itself, or another rank's earlier failure."""
        if isinstance(error, Stopped):
            return error
        if _caused_by_other_rank(error):
            self._collective_failed = True
            self._wait_for_failure()
            if self.failure is None and received_signal():
                return Stopped(received_signal())  # the others received a signal too, and left earlier
        first = self.failure
        if first is None:
            with suppress(RuntimeError):
                first = self.post(RankFailure(self.rank, str(self.position), f"{_kind(error)}{_first_line(error)}"))
        if first is None or first.rank == self.rank:
            return error
        return RankError(str(first))

    def _wait_for_failure(self) -> None:
        """Wait until `failure` is known, for a limited number of heartbeats and a limited time."""
        last = self._heartbeats + 3 * MAX_SILENT_HEARTBEATS_AFTER_FAILURE
        deadline = time.monotonic() + STUCK_TIMEOUT_S
        while self.failure is None and self._heartbeats < last and time.monotonic() < deadline:
            time.sleep(0.1)

    def stop(self, failed: bool) -> None:
        """End the thread. After a failure, first give the other ranks time to read it."""
        if failed:
            time.sleep(3)
        self._done.set()
        self.join()
        with suppress(RuntimeError):
            self.store.set(f"rank{self.rank}", json.dumps([-1, "after the end", (sys.maxsize,), None, 0]))


def _caused_by_other_rank(error: BaseException) -> bool:
    """Whether an error only shows that another rank does not respond."""
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _kind(error: BaseException) -> str:
    """Return the prefix that names an error's type; a UserError needs none."""
    return "" if isinstance(error, UserError) else f"{type(error).__name__}: "


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
