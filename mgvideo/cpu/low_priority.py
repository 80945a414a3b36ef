"""Loader workers that run only on otherwise idle cores, so that training on the same CPU gets the cores first.

Does not import torch, so that a program can start the loader's fork server before it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

Batch = TypeVar("Batch")

IS_SUPPORTED = hasattr(os, "SCHED_IDLE")  # on Linux
# The training loop waits at least this long in total for low-priority workers before they count as starved.
STARVATION_TIMEOUT_S = 10.0
CLIP_TIMEOUT_S = 0.02  # added to the timeout of a batch for each of its clips


def set_low_priority() -> None:
    """Run this process only when a core is otherwise idle, where the system allows it."""
    with suppress(OSError):  # some sandboxes forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def batch_timeout_s(clips: int) -> float:
    """Return the seconds to wait for a batch of `clips` clips. It is short, since starved workers are restarted."""
    return STARVATION_TIMEOUT_S + CLIP_TIMEOUT_S * clips


def until_starved(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches until their workers starve: they hang, or the training loop waits too much for them.

    It waits too much if it has waited for STARVATION_TIMEOUT_S in all and for half of the time. Workers that hang raise
    a TimeoutError in `batches`.
    """
    start, waited_s = time.monotonic(), 0.0
    while waited_s < max(STARVATION_TIMEOUT_S, (time.monotonic() - start) / 2):
        wait_start = time.monotonic()
        try:
            batch = next(batches)
        except (StopIteration, TimeoutError):
            return
        waited_s += time.monotonic() - wait_start
        yield batch
