"""Start a rank and join its process group; leave it together with the other ranks."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from fractions import Fraction
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mgvideo.errors import UserError

from .collectives import rank_cpus
from .launch import choose_gpu, launched_number, ranks_from_slurm, visible_gpus
from .signals import Stopped, defer_signals, raise_on_signal, requeue
from .watchdog import LEAVING, Position, Watchdog

LEAVE_TIMEOUT_S = 15.0  # for which a rank that leaves waits for others, which may hang


def local_rank() -> int:
    """Return this process's rank on its node."""
    return launched_number("LOCAL_RANK", "0")


@contextmanager
def process_group(position: Position | None = None, timeout_s: float = 600.0) -> Iterator[torch.device]:
    """Yield the device of this process, inside a process group if a launcher (torchrun or srun) started several.

    Inside, a signal raises Stopped. If that ends the block, the SLURM job is requeued.

    Args:
        position: the block reports to it what this rank does, for the watchdog and its messages.
        timeout_s: seconds for the ranks to meet, and torch's timeout of each collective operation.

    Raises:
        UserError: the launcher's variables are invalid, the ranks do not meet, or a rank has no GPU of its own.
    """
    ranks_from_slurm()
    single = launched_number("WORLD_SIZE", "1") == 1
    timeout = timedelta(seconds=timeout_s)
    with _single_process() if single else _multi_process(position or Position(), timeout) as device:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        limit_threads(rank_cpus())
        raise_on_signal()
        yield device


@contextmanager
def _single_process() -> Iterator[torch.device]:
    try:
        yield torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    except Stopped as stop:
        requeue(stop.number)
        raise


@contextmanager
def _multi_process(position: Position, timeout: timedelta) -> Iterator[torch.device]:
    """Join the ranks and run a watchdog; inside, a signal that arrives before `raise_on_signal` is deferred.

    Raises:
        RankError: another rank failed first.
    """
    store, number, size = _rendezvous(timeout)
    store = dist.PrefixStore(_fresh_store_prefix(store, number, size, timeout), store)
    watchdog = Watchdog(store.clone(), number, size, position)
    watchdog.start()
    failed = True
    try:
        device = _init_process_group(store, number, size, timeout)
        yield device
        failed = False
    except (Exception, SystemExit) as error:
        defer_signals()  # launchers send a signal to the survivors of a failure, which must not cut off its report
        explained = watchdog.explain(error)
        if isinstance(explained, Stopped):
            _leave(explained, watchdog, store.clone())
        elif isinstance(explained, SystemExit):  # its code may be 0
            raise RuntimeError(f"a rank called sys.exit({explained.code!r}) in a run of several ranks") from explained
        if explained is error:
            raise
        raise explained from None
    finally:
        reason = sys.exc_info()[1]
        if failed:  # exit handlers may hang on ranks that have ended
            code = reason.number + 128 if isinstance(reason, Stopped) else 1
            threading.Thread(target=_exit_later, args=(code,), daemon=True).start()
        watchdog.stop(failed and not isinstance(reason, Stopped))
        if not failed:
            dist.destroy_process_group()


def _init_process_group(store: dist.Store, number: int, size: int, timeout: timedelta) -> torch.device:
    """Choose this rank's device and initialise torch's process group: NCCL on GPUs, gloo on CPUs."""
    # compare the GPUs before NCCL starts: its own error names neither the rank nor the reason
    store.set(f"gpus{number}", json.dumps(visible_gpus()))
    gpu = choose_gpu(number, [json.loads(text) for text in store.multi_get([f"gpus{r}" for r in range(size)])])
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=number,
        world_size=size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    return device


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return the rendezvous store, this process's rank and the number of ranks."""
    number, size, port = (launched_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR', '')} MASTER_PORT={port}"
    if number >= size:
        raise UserError(f"RANK={number} WORLD_SIZE={size}: ranks count from 0, so {size - 1} is the last")
    try:
        return next(iter(rendezvous("env://", timeout=timeout)))
    except (ValueError, RuntimeError) as error:  # torch's store errors are RuntimeErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"rank {number} of {size} cannot meet the others at {address} ({reason}): set the address of the machine "
            "of rank 0 and a port that is free there, and start all ranks"
        ) from error


def _fresh_store_prefix(store: dist.Store, number: int, size: int, timeout: timedelta) -> str:
    """Return a new prefix for this start's keys in the store, the same on all ranks.

    torchrun's store outlives a restart of the ranks and keeps the keys of the start before; each node counts restarts
    by itself, so the count gives no common prefix. Instead each rank writes a random key, and rank 0 answers every key
    that it finds, until all ranks of this start have confirmed its answer.
    """
    prefix, deadline = uuid4().hex, time.monotonic() + timeout.total_seconds()
    if number > 0:
        reply_key = prefix
        store.set(f"mgvideo_request{number}", reply_key)
        prefix = store.get(reply_key).decode()
        store.add(f"{prefix}confirmed", 1)
        return prefix
    request_keys = [f"mgvideo_request{other}" for other in range(1, size)]
    while store.add(f"{prefix}confirmed", 0) < len(request_keys):
        if time.monotonic() > deadline:
            raise UserError(f"not all of {size} ranks joined within {timeout.total_seconds():g} s: start all of them")
        for key in request_keys:
            if store.check([key]):
                store.set(store.get(key).decode(), prefix)
        time.sleep(0.05)
    return prefix


def _leave(stop: Stopped, watchdog: Watchdog, store: dist.Store) -> None:
    """Requeue the job and leave with all ranks together, because launchers kill the rest when one exits.

    Rank 0 requeues, and not after a failure.
    """
    watchdog.position.report(LEAVING)
    if watchdog.rank == 0:
        _meet(store, "stopped", watchdog)
        if watchdog.failure is None:
            requeue(stop.number)
    else:
        with suppress(RuntimeError):
            store.add("stopped", 1)
    _meet(store, "leaving", watchdog)


def _meet(store: dist.Store, key: str, watchdog: Watchdog) -> None:
    """Wait until all ranks have counted up `key`, for at most `LEAVE_TIMEOUT_S`: a rank may hang in a collective.

    The other ranks wait longer while rank 0 reports that it leaves, since it may be writing a checkpoint.
    """
    deadline = time.monotonic() + LEAVE_TIMEOUT_S
    with suppress(RuntimeError):
        store.add(key, 1)
        while store.add(key, 0) < watchdog.size and watchdog.failure is None and time.monotonic() < deadline:
            if watchdog.rank > 0 and watchdog.leaves(0):
                deadline = time.monotonic() + LEAVE_TIMEOUT_S
            time.sleep(0.1)


def _exit_later(code: int) -> None:
    """Exit the process after `LEAVE_TIMEOUT_S`, even if its exit handlers hang."""
    time.sleep(LEAVE_TIMEOUT_S)
    os._exit(code)


def limit_threads(cores: int | Fraction) -> None:
    """Limit torch to as many threads as this process has cores, unless OMP_NUM_THREADS is set.

    torch's default is the number of cores in the CPU affinity, without regard to other processes and to CPU quotas.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, int(cores))))
