"""Check the size of /dev/shm, through which loader workers pass batches to the training process.

On most systems its size is half of the machine's memory, but in a Docker container it is 64 MiB by default. If it is
full, a worker raises an error or, with some versions of torch, is killed by SIGBUS.
"""

from __future__ import annotations

import errno
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from mgvideo.cpu.resources import machine_id
from mgvideo.distributed.collectives import gather_objects
from mgvideo.errors import UserError
from mgvideo.plan.formatting import format_memory

FOLDER = Path("/dev/shm")
GIB = 2**30


class BatchSizes(NamedTuple):
    """Bytes of the largest batches that a rank loads."""

    training: int  # in training and validation
    test: int


def max_bytes_in_flight(sizes: Sequence[BatchSizes], workers: int, prefetch: int) -> int:
    """Return the maximum number of bytes that the batches of ranks occupy at once.

    A loader keeps `prefetch` batches per worker ready while one batch is in use. In training two loaders can do so at
    once: those of this phase and the next, or of training and validation.

    Args:
        sizes: the batch sizes of each rank.
        workers: workers per rank.
        prefetch: batches per worker.
    """
    ready = workers * prefetch
    return sum(max((2 * ready + 1) * rank.training, (ready + 1) * rank.test) for rank in sizes)


def min_bytes(sizes: Sequence[BatchSizes]) -> int:
    """Return the minimum number of bytes that loading requires: the batch in use and the next one, for each rank."""
    return sum(2 * max(rank) for rank in sizes)


@dataclass(frozen=True)
class SharedMemorySpace:
    """The size of a shared-memory file system."""

    identifier: str  # equal for all ranks that share the file system
    host: str  # name of the host that mounts it
    total: int  # bytes
    free: int  # bytes


def get_shared_memory_space(folder: Path = FOLDER) -> SharedMemorySpace | None:
    """Return the space in `folder`, or None if this system sets no limit.

    A missing folder has a size of 0. A read-only folder has 0 bytes free.
    """
    if sys.platform != "linux":
        return None
    try:
        stats, device = os.statvfs(folder), folder.stat().st_dev
    except OSError:
        return SharedMemorySpace(machine_id(), platform.node(), 0, 0)
    if stats.f_blocks == 0:  # a tmpfs mounted with size=0 has no limit
        return None
    free = stats.f_bavail * stats.f_frsize if os.access(folder, os.W_OK) else 0
    return SharedMemorySpace(f"{machine_id()} {device}", platform.node(), stats.f_blocks * stats.f_frsize, free)


def check_shared_memory_space(sizes: BatchSizes, workers: int, prefetch: int, folder: Path = FOLDER) -> list[str]:
    """Compare the bytes that the ranks' batches need with the space for them. All ranks must call it together.

    Returns:
        A warning for each `folder` (one per container) that may be too small.

    Raises:
        UserError: a folder is too small for `min_bytes`. All ranks raise it.
    """
    ranks: list[tuple[Any, BatchSizes]] = gather_objects((get_shared_memory_space(folder), sizes))
    limited = sorted((pair for pair in ranks if pair[0] is not None), key=lambda pair: pair[0].identifier)
    warnings = []
    for _, group in groupby(limited, key=lambda pair: pair[0].identifier):
        spaces, rank_sizes = zip(*group, strict=True)
        space = min(spaces, key=lambda space: space.free)
        max_needed, min_needed = max_bytes_in_flight(rank_sizes, workers, prefetch), min_bytes(rank_sizes)
        if space.free >= max_needed:
            continue
        state = f"has {format_memory(space.free)} free" if space.free else "is full, missing or read-only"
        problem = f"{folder} on {space.host} {state}"
        fitting = [n for n in range(1, workers + 1) if max_bytes_in_flight(rank_sizes, n, 1) <= space.free]
        if fitting:
            options = f"loader.num_workers={fitting[-1]} loader.prefetch_factor=1"
        else:
            options = "loader.num_workers=0, which is slow"
        total_gib = math.ceil((space.total - space.free + max_needed) / GIB)
        remedy = f"enlarge it (docker run --shm-size={total_gib}g), or set {options}"
        if space.free < min_needed:
            need = f"loader workers need at least {format_memory(min_needed)} and up to {format_memory(max_needed)}"
            raise UserError(f"{problem}, but {need}: {remedy}")
        use = f"loader workers may use up to {format_memory(max_needed)}, and a full {folder} ends the run"
        warnings.append(f"{problem}, but {use}: {remedy}")
    return warnings


def is_shared_memory_error(error: Exception) -> bool:
    """Return whether torch passed on the error of a loader worker that had no space in shared memory."""
    return isinstance(error, RuntimeError) and "shared memory" in str(error) and "in DataLoader worker" in str(error)


def full_shared_memory_message(folder: Path = FOLDER) -> str:
    """Return a message that `folder` has no space, with its size and what to do."""
    space = get_shared_memory_space(folder)
    size = f" ({format_memory(space.total)})" if space and space.free else ""
    return (
        f"{folder}{size}, which holds the batches of loader workers, is full, missing or read-only: enlarge it "
        "(docker run --shm-size=…), or lower loader.num_workers or loader.prefetch_factor"
    )


@contextmanager
def explain_queue_errors() -> Iterator[None]:
    """Explain errors in creating queues, whose semaphores are files in /dev/shm.

    Raises:
        UserError: /dev/shm is full, missing or read-only.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT):
            raise UserError(full_shared_memory_message()) from error
        raise
