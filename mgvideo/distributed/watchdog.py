"""Ranks that watch each other: one that fails, vanishes or hangs ends all, and all say which failed first, and where.

Every rank tells the rendezvous' store once a second where it is, and looks there for a failure and at the next rank, in
a thread of its own. So a dead rank is noticed on any backend, long before a collective operation times out.
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

from mgvideo.errors import UserError

from .signals import Stopped, received

# all counted in looks, a second apart, so that a job that SLURM suspended finds nobody missing when it goes on
MAX_SILENT_HEARTBEATS = 10  # looks at a rank that tells nothing new, until it counts as gone
MAX_SILENT_HEARTBEATS_AFTER_FAILURE = 4  # the same, where a collective operation has failed already
EXIT_GRACE_HEARTBEATS = 8  # looks that the main thread has to raise, before the process ends under it
STUCK_TIMEOUT_S = (
    60.0  # seconds, for all that: how long a failed collective operation waits for looks to tell whose fault it is
)

LEAVING = "on its way out, as it was asked to"  # a place, which rank 0 may be at for long: it has a checkpoint to write


@dataclass(frozen=True)
class RankFailure:
    """What went wrong first, on which rank, and where that was in the run."""

    rank: int
    where: str
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed first, {self.where}: {self.error}"


class RankError(Exception):
    """Another rank failed, and therefore this one ends."""


@dataclass
class _Position:
    where: str = "before the first step"
    order: tuple[int, ...] = (-1,)  # step, and what of it
    limit: float | None = None  # seconds that this may take
    looks: int = 0  # since the main thread came here


_place = _Position()


def report_position(where: str, order: tuple[int, ...] = (-1,), limit: float | None = None) -> None:
    """Note where the main thread is, and in how many seconds it should be elsewhere (None: whenever).

    The order, (step, part of the step, …), tells who of several waiting ranks the others are waiting for.
    """
    global _place
    _place = _Position(where, order, limit)


def place() -> str:
    """Where the main thread is, as it reported by `at`."""
    return _place.where


class Watchdog(threading.Thread):
    """This rank's thread. `store` is the rendezvous' (a client of our own: the main thread may wait in its)."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.store = dist.PrefixStore("watch", store)
        self.rank, self.size = rank, size
        self.failure: RankFailure | None = None
        self._done = threading.Event()
        self._suspicious = False
        self._looks = 0
        self._next: tuple[str, int] = ("", 0)  # what the next rank told, and in how many looks nothing else

    def start(self) -> None:
        """Be known to the others at once, however soon this rank dies."""
        self._look()
        super().start()

    def run(self) -> None:
        """Look once a second until `stop`."""
        grace = EXIT_GRACE_HEARTBEATS
        while not self._done.wait(1.0):
            if self.failure is None:
                try:
                    self._look()
                except (RuntimeError, ValueError) as error:  # the store is where rank 0, or torchrun, was
                    self.failure = RankFailure(0, "no longer there", f"the rendezvous does not answer ({_line(error)})")
            elif grace == 0:
                print(f"error (rank {self.rank}): {self.failure}", file=sys.stderr, flush=True)
                os._exit(1)
            else:
                grace -= 1

    def _look(self) -> None:
        place = _place
        place.looks += 1
        self._looks += 1
        told = [self._looks, place.where, place.order, place.limit, place.looks]
        self.store.set(f"rank{self.rank}", json.dumps(told))
        if self.store.check(["failure"]):
            self.failure = RankFailure(**json.loads(self.store.get("failure")))
            return
        self._look_at_next()
        if place.limit is not None and place.looks > place.limit:
            self._find_hanging()

    def _find_hanging(self) -> None:
        """Post the rank that is furthest behind, unless it came there lately or what it does may take its time."""
        keys = [f"rank{r}" for r in range(self.size)]
        if not self.store.check(keys):
            return
        places = [json.loads(told) for told in self.store.multi_get(keys)]
        least = min(order for _, _, order, *_ in places)
        last = [r for r, (_, _, order, *_) in enumerate(places) if order == least]
        if any(limit is None or looks <= limit for *_, limit, looks in (places[r] for r in last)):
            return
        others = f", or rank {', '.join(map(str, last[1:]))}," if len(last) > 1 else ""
        _, where, _, limit, _ = places[last[0]]
        self.post(RankFailure(last[0], where, f"it{others} hangs: nothing has happened for {limit:g} s (hang_timeout)"))

    def _look_at_next(self) -> None:
        key = f"rank{(self.rank + 1) % self.size}"
        told = self.store.get(key).decode() if self.store.check([key]) else ""
        if told != self._next[0] or not told or json.loads(told)[0] < 0:
            self._next = (told, 0)
            return
        self._next = (told, self._next[1] + 1)
        if self._next[1] >= (MAX_SILENT_HEARTBEATS_AFTER_FAILURE if self._suspicious else MAX_SILENT_HEARTBEATS):
            text = "it is gone without a word: killed, out of memory, or its node is lost?"
            self.post(RankFailure((self.rank + 1) % self.size, json.loads(told)[1], text))

    def post(self, failure: RankFailure) -> RankFailure:
        """Make a failure known; the one that was first comes back."""
        first = self.store.compare_set("failure", "", json.dumps(asdict(failure)))
        self.failure = RankFailure(**json.loads(first))
        return self.failure

    def leaves(self, rank: int) -> bool:
        """Whether a rank has told that it is on its way out."""
        key = f"rank{rank}"
        return self.store.check([key]) and json.loads(self.store.get(key))[1] == LEAVING

    def explain(self, error: BaseException) -> BaseException:
        """What to raise for what the main thread raised: itself, or what another rank failed of before."""
        if isinstance(error, Stopped):
            return error
        if _of_others(error):
            self._suspicious = True
            enough, deadline = self._looks + 3 * MAX_SILENT_HEARTBEATS_AFTER_FAILURE, time.monotonic() + STUCK_TIMEOUT_S
            while self.failure is None and self._looks < enough and time.monotonic() < deadline:
                time.sleep(0.1)
            if self.failure is None and received():
                return Stopped(received())  # the others were asked to stop as well, and were faster
        first = self.failure
        if first is None:
            with suppress(RuntimeError):
                first = self.post(RankFailure(self.rank, _place.where, f"{_kind(error)}{_line(error)}"))
        if first is None or first.rank == self.rank:
            return error
        return RankError(str(first))

    def stop(self, failed: bool) -> None:
        """End the thread; after a failure late enough for the other ranks to read of it."""
        if failed:
            time.sleep(3)
        self._done.set()
        self.join()
        with suppress(RuntimeError):
            self.store.set(f"rank{self.rank}", json.dumps([-1, "after the end", (sys.maxsize,), None, 0]))


def _of_others(error: BaseException) -> bool:
    """Whether an error only says that another rank does not answer."""
    words = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _kind(error: BaseException) -> str:
    return "" if isinstance(error, UserError) else f"{type(error).__name__}: "


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
