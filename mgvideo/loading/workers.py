"""Start, prepare and end the worker processes that load clips."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import active_children, forkserver, parent_process, util
from multiprocessing.process import BaseProcess
from weakref import WeakSet

from mgvideo.cpu.low_priority import set_low_priority
from mgvideo.cpu.resources import set_cpu_affinity
from mgvideo.distributed.signals import block_signals
from mgvideo.errors import UserError

# torch is imported only in the function that needs it, so that a program can start the fork server before torch.

_workers: WeakSet[BaseProcess] = WeakSet()
_start_lock = threading.Lock()  # only one caller starts workers at a time, so that it can identify its new processes


_MAX_SOCKET_PATH_BYTES = 103  # macOS accepts 104 with the terminating null byte, Linux more
_SOCKET_NAME_BYTES = len("/pymp-12345678/listener-12345678")  # multiprocessing adds this to the folder
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def use_short_socket_paths() -> None:
    """Put multiprocessing's sockets into a short folder if TMPDIR is too long for them. Other files stay in TMPDIR.

    Raises:
        UserError: no folder is writable.
    """
    try:
        folder, old_tempdir = tempfile.gettempdir(), tempfile.tempdir
        if len(os.fsencode(folder)) + _SOCKET_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
            tempfile.tempdir = next(short for short in _SHORT_FOLDERS if os.access(short, os.W_OK))
        try:
            util.get_temp_dir()  # multiprocessing stores the result and passes it to the processes that it starts
        finally:
            tempfile.tempdir = old_tempdir
    except StopIteration:
        message = f"TMPDIR={folder} is too long for the sockets of loader workers"
        max_length = _MAX_SOCKET_PATH_BYTES - _SOCKET_NAME_BYTES
        raise UserError(f"{message}: give a folder of at most {max_length} characters") from None
    except OSError as error:
        message = f"cannot create a folder for temporary files ({error.strerror})"
        raise UserError(f"{message}: set TMPDIR to a folder with free space") from error


def start_fork_server(modules: Sequence[str] = ("mgvideo.datasets.video",)) -> None:
    """Start the fork server, the small process that workers are forked from, unless it runs already.

    It imports the modules that workers need, in parallel with this process. Workers forked from the training process
    would start as quickly, but then each memory page that the training process writes would be copied first.
    """
    forkserver.set_forkserver_preload(["__main__", "mgvideo.loading.loader", "mgvideo.loading.sampler", *modules])
    use_short_socket_paths()
    # The fork server ignores the parent's `sys.path`, so pass it in PYTHONPATH. Without PYTHONSAFEPATH it would import
    # from the current folder first, which may be a checkout of another version than the installed one.
    variables = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
    old_environ = dict(os.environ)
    os.environ.update(variables)
    try:
        with block_signals():
            forkserver.ensure_running()
    finally:
        for name in variables:
            os.environ.pop(name)
        os.environ.update(old_environ)


@contextmanager
def track_new_workers() -> Iterator[list[BaseProcess]]:
    """Yield a list that holds, after the context, the workers started inside it.

    The workers block stop signals, so that they outlive them. They also do not garbage-collect objects that they
    inherit: if a forked worker collects such an object, for example a video that the training process had open, it can
    hang on threads that a fork does not copy.
    """
    with _start_lock:
        old_processes = set(active_children())
        new_processes: list[BaseProcess] = []
        gc.freeze()
        try:
            with block_signals():
                yield new_processes
        finally:
            gc.unfreeze()
            new_processes += set(active_children()) - old_processes
            _workers.update(new_processes)


@atexit.register
def _kill_workers() -> None:
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report killed workers as failed
    for worker in _workers:  # multiprocessing would send SIGTERM, which workers block
        worker.kill()


def any_worker_killed_by(number: int) -> bool:
    """Return whether signal `number` has killed a worker. torch knows this only of workers forked by this process."""
    return any(worker.exitcode == -number for worker in _workers)


def init_worker(low_priority: bool, cpus: frozenset[int], _: int) -> None:
    """Prepare a worker to run on `cpus`. A `low_priority` worker runs only when a core is otherwise idle."""
    import torch

    from mgvideo.cpu.memory import keep_freed_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # already blocked by `blocked`, but a library may unblock it
    set_cpu_affinity(cpus)
    if low_priority:
        set_low_priority()
    torch.set_num_threads(1)  # several workers decode in parallel, each on one thread
    keep_freed_memory()
    exit_with_parent()


def exit_with_parent() -> None:
    """Exit this worker when the process that started it dies. A thread waits for that. No effect in a main process.

    torch's own check watches the parent PID, which under a fork server is the server's and stays alive.
    """
    parent = parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
