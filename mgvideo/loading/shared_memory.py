"""Room in /dev/shm, through which loader workers pass batches to the training process.

It is half of a machine's memory on most systems, but 64 MiB in a Docker container that does not ask for more. A worker
that finds it full raises an error or, with other versions of torch, is killed by SIGBUS.
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
from mgvideo.distributed.ranks import gather_objects
from mgvideo.errors import UserError

FOLDER = Path("/dev/shm")
GIB = 2**30


class BatchSizes(NamedTuple):
    """Bytes of the largest batches that a rank loads."""

    training: int  # and in validation
    test: int


def max_bytes_in_flight(sizes: Sequence[BatchSizes], workers: int, prefetch: int) -> int:
    """The most bytes that the batches of some ranks take at once, each rank with so many workers.

    A loader keeps `prefetch` batches a worker ready while one is used. In training two loaders may do so: those of
    this phase and the next, or of training and validation.
    """
    ready = workers * prefetch
    return sum(max((2 * ready + 1) * rank.training, (ready + 1) * rank.test) for rank in sizes)


def min_bytes(sizes: Sequence[BatchSizes]) -> int:
    """Bytes without which loading cannot go on: of a batch that is used, and the next one that arrives."""
    return sum(2 * max(rank) for rank in sizes)


@dataclass(frozen=True)
class SharedMemorySpace:
    """A file system for shared memory: an identifier, a host that mounts it, its bytes and how many are free."""

    identifier: str
    host: str
    total: int
    free: int


def get_shared_memory_space(folder: Path = FOLDER) -> SharedMemorySpace | None:
    """The room in `folder`; nothing is free where it is missing or read-only. None: this system sets no limit."""
    if sys.platform != "linux":
        return None
    try:
        about, device = os.statvfs(folder), folder.stat().st_dev
    except OSError:
        return SharedMemorySpace(machine_id(), platform.node(), 0, 0)
    if about.f_blocks == 0:  # a tmpfs of size=0
        return None
    free = about.f_bavail * about.f_frsize if os.access(folder, os.W_OK) else 0
    return SharedMemorySpace(f"{machine_id()} {device}", platform.node(), about.f_blocks * about.f_frsize, free)


def check_shared_memory_space(sizes: BatchSizes, workers: int, prefetch: int, folder: Path = FOLDER) -> list[str]:
    """Compare what the ranks' batches take with the room for them. All ranks call it together.

    Returns:
        A warning for each `folder`, one a container, that may be too small.

    Raises:
        UserError: a folder is too small for the batches that no loader can do without; on all ranks.
    """
    ranks: list[tuple[Any, BatchSizes]] = gather_objects((get_shared_memory_space(folder), sizes))
    limited = sorted((pair for pair in ranks if pair[0] is not None), key=lambda pair: pair[0].identifier)
    warnings = []
    for _, group in groupby(limited, key=lambda pair: pair[0].identifier):
        rooms, sharing = zip(*group, strict=True)
        room = min(rooms, key=lambda room: room.free)
        needed, fewest = max_bytes_in_flight(sharing, workers, prefetch), min_bytes(sharing)
        if room.free >= needed:
            continue
        state = f"has {_size(room.free)} free" if room.free else "is full, missing or read-only"
        found = f"{folder} on {room.host} {state}"
        fits = [n for n in range(1, workers + 1) if max_bytes_in_flight(sharing, n, 1) <= room.free]
        instead = (
            f"loader.num_workers={fits[-1]} loader.prefetch_factor=1" if fits else "loader.num_workers=0, which is slow"
        )
        space = math.ceil((room.total - room.free + needed) / GIB)
        remedy = f"enlarge it (docker run --shm-size={space}g), or set {instead}"
        if room.free < fewest:
            need = f"loader workers need {_size(fewest)} there at least, and up to {_size(needed)}"
            raise UserError(f"{found}, but {need}: {remedy}")
        warnings.append(f"{found}, but loader workers may fill {_size(needed)}, which ends the run: {remedy}")
    return warnings


def is_shared_memory_error(error: Exception) -> bool:
    """Whether this is an error of a loader worker, passed on by torch, for which there was no room."""
    return isinstance(error, RuntimeError) and "shared memory" in str(error) and "in DataLoader worker" in str(error)


def full_shared_memory_message(folder: Path = FOLDER) -> str:
    """Say that there was no room, and what to do."""
    room = get_shared_memory_space(folder)
    size = f" ({_size(room.total)})" if room and room.free else ""
    return (
        f"{folder}{size}, where the batches of loader workers wait, is full, missing or read-only: enlarge it "
        "(docker run --shm-size=…), or lower loader.num_workers or loader.prefetch_factor"
    )


@contextmanager
def explain_queue_errors() -> Iterator[None]:
    """Turn the errors of queues made inside, whose semaphores are files in /dev/shm, into one line.

    Raises:
        UserError: they cannot be made there.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT):
            raise UserError(full_shared_memory_message()) from error
        raise


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{math.ceil(count / 2**20)} MiB"
