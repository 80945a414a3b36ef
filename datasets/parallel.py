"""Work on many files at once, in processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from mgvideo.cpu.resources import cpu_count
from mgvideo.distributed.signals import block_signals
from mgvideo.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # told (done, of how many)


_busy: Any = None  # in a worker: a flag for each item, set while it is worked on


def silent(done: int, total: int) -> None:
    """A Progress that says nothing."""


def parallel(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Generator[Result, None, None]:
    """Apply `work` to every item, in order; `processes` None is one a core.

    Ctrl-C interrupts the caller alone, which then kills the processes.

    Raises:
        UserError: a process died. It names the items in progress, one of which may have killed it.
    """
    processes = min(processes or cpu_count(), len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # spawn: the caller may already hold threads or a CUDA context, which a fork would break
    context = multiprocessing.get_context("spawn")
    chunk = max(1, min(4, len(items) // (4 * processes)))
    others = set(multiprocessing.active_children())
    finished = False
    try:
        busy = context.RawArray("b", len(items))
        pool = ProcessPoolExecutor(processes, context, _begin, (busy,))
        with block_signals():
            results = pool.map(partial(_noted, work), range(len(items)), items, chunksize=chunk)
    except OSError as error:
        raise UserError(
            f"cannot start {processes} processes: {error.strerror}; give fewer with processes=…, 1 starts none"
        ) from error
    try:
        yield from results
        finished = True
    except BrokenProcessPool:
        at = " or ".join(str(item) for item, is_busy in zip(items, busy, strict=True) if is_busy) or "its start"
        raise UserError(
            f"a worker process died at {at}: out of memory, or a file that crashes its decoder? Give fewer with "
            "processes=…, or leave the file out; a repeat goes on"
        ) from None
    finally:
        if not finished:  # else the pool waits for the items in progress
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _begin(busy: Any) -> None:
    global _busy
    _busy = busy
    _end_with_parent()


def _noted(work: Callable[[Item], Result], place: int, item: Item) -> Result:
    _busy[place] = True
    result = work(item)
    _busy[place] = False
    return result


def _end_with_parent() -> None:
    """Else the workers of a killed program would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
