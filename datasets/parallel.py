"""Work on many files at once, in processes that end with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mgvideo.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # told (done, of how many)


def silent(done: int, total: int) -> None:
    """A Progress that says nothing."""


def parallel(
    work: Callable[[Item], Result], items: Sequence[Item], processes: int | None = None
) -> Generator[Result, None, None]:
    """`work` on every item, in order; `processes` None is one a core. Raises UserError where a process dies."""
    processes = min(processes or len(os.sched_getaffinity(0)), len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # spawn: the caller may already hold threads or a CUDA context, which a fork would break
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _end_with_parent)
    try:
        yield from pool.map(work, items, chunksize=max(1, min(4, len(items) // (4 * processes))))
    except BrokenProcessPool:
        raise UserError("a worker process died, out of memory? Give fewer with processes=…; a repeat goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Else the workers of a killed program would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
