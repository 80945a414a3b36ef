"""Local copies of remote files: complete or absent, shared by jobs, within a limit of bytes.

If the copies exceed the limit, those that were used least recently are deleted. A copy in use is locked and kept; if
the file system has no locks, a deleted copy stays readable for the processes that have it open. The file `size` holds
the bytes of all copies, so that only a deletion lists the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from iopath.common.file_io import get_cache_dir

KEPT = 0.9  # fraction of the limit to which a deletion goes down, so that it is rare
MIN_FREE = 0.05  # fraction of the disk that stays free whatever the limit
STALE_PART_S = 24 * 3600.0  # age at which an unfinished copy is deleted as left by a killed process


def cache_folder() -> Path:
    """Return the folder for copies of remote files and for what cannot be kept beside a dataset."""
    return Path(get_cache_dir()) / "mgvideo"


def copy_path(path: str) -> Path:
    """Return the path of a URL's copy: it is always inside the cache, and different for each URL."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / digest[:2] / f"{digest}-{path.rsplit('/', 1)[-1][-100:]}"


def fetch_once(path: str, fetch: Callable[[IO[bytes]], None]) -> str:
    """Return the copy of a URL, for which `fetch` writes the content into a file if there is none.

    Raises what `fetch` raises, and OSError.
    """
    copy = copy_path(path)
    with suppress(OSError):
        os.utime(copy)  # the time of last use
        return str(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=copy.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as target:
            fetch(target)
            size = target.tell()
        os.replace(part, copy)  # atomic: several workers may fetch the same file at once
    finally:
        Path(part).unlink(missing_ok=True)
    with suppress(OSError), _locked_size(size):
        pass
    return str(copy)


@contextmanager
def _locked_size(added: int = 0) -> Iterator[list[int]]:
    """Yield the bytes of all copies, as a list of one number to change; no other process changes it meanwhile.

    `added` are the bytes of a new copy.
    """
    with open(cache_folder() / "size", "a+b") as file:
        with suppress(OSError):  # a file system without locks: the number is only an estimate
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        total = [int(text) + added if text.isdigit() else sum(size for _, size, _ in _copies())]
        yield total
        file.truncate(0)
        file.write(str(max(0, total[0])).encode())


def _copies() -> list[tuple[int, int, str]]:
    """Return time of last use in ns, bytes and path of every copy, the least recently used first."""
    copies = []
    for folder in cache_folder().glob("[0-9a-f][0-9a-f]"):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another process has just deleted or renamed it
                    stat = entry.stat()
                    copies.append((stat.st_mtime_ns, stat.st_size, entry.path))
    return sorted(copies)


def limit_size(limit: int | None) -> None:
    """Delete the least recently used copies if all of them exceed `limit` bytes or the disk is nearly full."""
    folder = cache_folder()
    with suppress(OSError):
        text = (folder / "size").read_bytes()
        disk = shutil.disk_usage(folder)
        missing = MIN_FREE * disk.total - disk.free
        used = int(text) if text.isdigit() else 0
        if (limit is None or (text.isdigit() and used <= limit)) and missing <= 0:
            return
        with _locked_size() as total:
            copies = _copies()
            total[0] = sum(size for _, size, _ in copies)
            target = total[0] - max(0, missing) if limit is None or total[0] <= limit else KEPT * limit
            newest = copies[-1][0] if copies else 0
            for time, size, path in copies:
                if path.endswith(".part") and newest - time < STALE_PART_S * 1e9:
                    continue
                if total[0] <= target:
                    break
                if _delete_unless_used(path):
                    total[0] -= size


def _delete_unless_used(path: str) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if a process uses it
        os.unlink(path)
        return True
    return False


def lock_copy(copy: str) -> IO[bytes] | None:
    """Open a copy and lock it against deletion until it is closed; None: another process has just deleted it."""
    try:
        file = open(copy, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_SH)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()
    return None
