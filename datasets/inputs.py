"""Record the files and folders that a function reads, to tell later whether one of them has changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar

from mgvideo.storage.paths import is_remote, read_bytes, remote_version, strip_file_scheme

# bytes and times of change in ns; of a URL the hash of its content, or the version of an archive; None: missing
State = list[int] | str | None
CLOCK_TICK_S = 0.02  # the times of files are at least this fine

_recorded: ContextVar[dict[str, State] | None] = ContextVar("recorded", default=None)

_own_changes: dict[str, tuple[State, State]] = {}  # folder → states before and after this process added a file


@contextmanager
def record_inputs() -> Iterator[dict[str, State]]:
    """Yield a dictionary, path → state, of all inputs that are read inside the block."""
    inputs: dict[str, State] = {}
    token = _recorded.set(inputs)
    try:
        yield inputs
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Return whether a `record_inputs` block is active."""
    return _recorded.get() is not None


def record_input(path: str, state: State = None, content: bytes | None = None) -> None:
    """Record a file, a folder or a missing path, with the `state` that it had before it was read.

    Without a state, call it before reading a local path, or with the content of a URL after that.
    """
    inputs = _recorded.get()
    path = path if is_remote(path) else os.path.abspath(strip_file_scheme(path))
    if inputs is not None and path not in inputs:
        before, after = _own_changes.get(path, (None, None))
        inputs[path] = after if state and state == before else state or input_state(path, content)


def input_state(path: str, content: bytes | None = None) -> State:
    """Return the state of an input; that of a URL, unless it is an archive, requires its content."""
    if is_remote(path):
        try:
            if path.endswith(".tar"):  # too large to read
                return f"version {remote_version(path)}"
            return hashlib.sha256(read_bytes(path) if content is None else content).hexdigest()
        except OSError:
            return None
    try:
        stat = os.stat(strip_file_scheme(path))
        if 0 <= time.time() - stat.st_mtime < CLOCK_TICK_S and is_recording():
            # The time of another change within this tick of the clock would be the same: wait it out.
            time.sleep(CLOCK_TICK_S)
            stat = os.stat(strip_file_scheme(path))
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def are_unchanged(inputs: Mapping[str, State]) -> bool:
    """Return whether all inputs have the states that were recorded."""
    with ThreadPoolExecutor(16) as pool:  # for the latency of URLs
        mapper = pool.map if any(map(is_remote, inputs)) else map
        states = zip(inputs, mapper(input_state, inputs), inputs.values(), strict=True)
        return all(new == old or _own_changes.get(path) == (old, new) for path, new, old in states)


@contextmanager
def own_change(folder: str, inputs: dict[str, State]) -> Iterator[None]:
    """Change a folder inside the block, which is no change of an input: if nothing else has changed it, update it."""
    before = input_state(folder)
    yield
    if folder in inputs and inputs[folder] == before:
        inputs[folder] = input_state(folder)
        _own_changes[folder] = (before, inputs[folder])
