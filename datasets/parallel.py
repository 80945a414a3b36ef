"""Apply a function to many files in parallel processes, which exit when the parent process dies."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from mgvideo.cpu.resources import cpu_count
from mgvideo.distributed.signals import block_signals
from mgvideo.errors import UserError
from mgvideo.loading.workers import exit_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
FileProgress = Callable[[int, int], None]  # called with (items done, items in all)


_busy: Any = None  # in a worker: a shared flag for each item, set while the item is in progress


def ignore_progress(done: int, total: int) -> None:
    """Do nothing: the default for a progress callback."""


def parallel_map(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Generator[Result, None, None]:
    """Apply `work` to every item in `processes` processes (None: one a core) and yield the results in order.

    Ctrl-C interrupts only the caller, which then kills the processes.

    Raises:
        UserError: A process cannot be started or died. The message names the items in progress, one of which may have
            crashed the process.
    """
    processes = min(processes or cpu_count(), len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # spawn: the caller may have threads or a CUDA context, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    chunk = max(1, min(4, len(items) // (4 * processes)))
    earlier_children = set(multiprocessing.active_children())
    finished = False
    try:
        busy = context.RawArray("b", len(items))
        pool = ProcessPoolExecutor(processes, context, _initialize_worker, (busy,))
        with block_signals():
            results = pool.map(partial(_work_on, work), range(len(items)), items, chunksize=chunk)
    except OSError as error:
        raise UserError(
            f"cannot start {processes} processes: {error.strerror}; set a smaller processes=…; 1 starts no process"
        ) from error
    try:
        yield from results
        finished = True
    except BrokenProcessPool:
        items_in_progress = (
            " or ".join(str(item) for item, is_busy in zip(items, busy, strict=True) if is_busy) or "its start"
        )
        raise UserError(
            f"a worker process died at {items_in_progress}: out of memory, or a file that crashes its decoder? "
            "Set a smaller processes=…, or leave the file out; repeat the command to continue"
        ) from None
    finally:
        if not finished:  # otherwise shutdown() waits for the items in progress
            for process in set(multiprocessing.active_children()) - earlier_children:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _initialize_worker(busy: Any) -> None:
    global _busy
    _busy = busy
    exit_with_parent()


def _work_on(work: Callable[[Item], Result], index: int, item: Item) -> Result:
    """Apply `work` to an item and set its flag in `_busy` meanwhile."""
    _busy[index] = True
    result = work(item)
    _busy[index] = False
    return result
