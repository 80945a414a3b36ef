"""The processes that load clips: how they start, what they inherit, how they end."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import active_children, forkserver, parent_process, util
from multiprocessing.process import BaseProcess
from weakref import WeakSet

from mgvideo.cpu.resources import set_cpu_affinity
from mgvideo.distributed.signals import blocked
from mgvideo.errors import UserError

# torch is imported where a worker needs it: the server starts while a program still imports its own

SUPPORTS_LOW_PRIORITY = hasattr(os, "SCHED_IDLE")  # on Linux
_workers: WeakSet[BaseProcess] = WeakSet()
_one_at_a_time = threading.Lock()  # to tell whose workers started when


# bytes of a socket's path that systems accept (104 with its end on macOS), and what multiprocessing adds to a folder
_LONGEST_SOCKET, _SOCKET_NAME = 103, len("/pymp-12345678/listener-12345678")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def use_short_socket_paths() -> None:
    """Let multiprocessing keep its sockets in another folder where TMPDIR is too long for them; all else stays there.

    Raises:
        UserError: no folder can be written.
    """
    try:
        folder, before = tempfile.gettempdir(), tempfile.tempdir
        if len(os.fsencode(folder)) + _SOCKET_NAME > _LONGEST_SOCKET:
            tempfile.tempdir = next(short for short in _SHORT_FOLDERS if os.access(short, os.W_OK))
        try:
            util.get_temp_dir()  # which multiprocessing keeps, and hands on to the processes that it starts
        finally:
            tempfile.tempdir = before
    except StopIteration:
        told = f"TMPDIR={folder} is too long for the sockets of loader workers"
        raise UserError(f"{told}: give a folder of at most {_LONGEST_SOCKET - _SOCKET_NAME} characters") from None
    except OSError as error:
        raise UserError(f"no folder for temporary files ({error.strerror}): set TMPDIR to one that has room") from error


def start_server(modules: Sequence[str] = ("mgvideo.datasets.video",)) -> None:
    """Start the small process that workers are forked from, once; it imports what they need while this one goes on.

    Forked from this process they would be as quick to start, but every page that it writes then is copied first.
    """
    forkserver.set_forkserver_preload(["__main__", "mgvideo.loading.loader", "mgvideo.loading.sampler", *modules])
    use_short_socket_paths()
    # multiprocessing tells it where this process finds modules, and it does not listen: it would look first in the
    # folder that it starts in, which may be a checkout of something else than what is installed
    paths = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
    before = dict(os.environ)
    os.environ.update(paths)
    try:
        with blocked():
            forkserver.ensure_running()
    finally:
        for name in paths:
            os.environ.pop(name)
        os.environ.update(before)


@contextmanager
def starting() -> Iterator[list[BaseProcess]]:
    """Workers started inside, which the list then holds, outlive signals, and leave alone what they inherit.

    A forked worker that collects the training process's garbage, such as a video that was open there, may wait for ever
    for threads that were not forked with it.
    """
    with _one_at_a_time:
        before = set(active_children())
        started: list[BaseProcess] = []
        gc.freeze()
        try:
            with blocked():
                yield started
        finally:
            gc.unfreeze()
            started += set(active_children()) - before
            _workers.update(started)


@atexit.register
def _end_workers() -> None:
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for a worker's failure
    for worker in _workers:  # multiprocessing asks with the signal that they do not see
        worker.kill()


def killed_by(number: int) -> bool:
    """Whether a signal has killed a worker. torch knows which one only of those that it forked itself."""
    return any(worker.exitcode == -number for worker in _workers)


def begin(idle: bool, cpus: frozenset[int], _: int) -> None:
    """Prepare a worker that runs on `cpus`; an `idle` one only runs when a core has nothing else to do."""
    import torch

    from mgvideo.cpu.memory import keep_freed_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `blocked`, should a library unblock it
    set_cpu_affinity(cpus)
    if idle:
        with suppress(OSError):  # some sandboxes refuse it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    torch.set_num_threads(1)  # clips are decoded by processes, not by threads of each
    keep_freed_memory()
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this worker with the training process; torch looks for that in the server's stead, which lives on."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
