"""Starting and joining the ranks of a process group."""

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
from .watchdog import LEAVING, Watchdog, report_position

LEAVE_TIMEOUT_S = 15.0  # seconds that a rank which leaves waits for others, which may be stuck


def local_rank() -> int:
    """This process's rank on its node."""
    return launched_number("LOCAL_RANK", "0")


@contextmanager
def process_group(timeout_s: float = 600.0) -> Iterator[torch.device]:
    """The device of this process, ranks joined where a launcher such as torchrun or srun started several.

    Inside, a signal raises Stopped; where that ends it, the job goes back into SLURM's queue.

    Raises:
        UserError: the launcher's variables make no sense, ranks do not meet, or a rank has no GPU of its own.
    """
    ranks_from_slurm()
    alone = launched_number("WORLD_SIZE", "1") == 1
    with _single_process() if alone else _multi_process(timedelta(seconds=timeout_s)) as device:
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
def _multi_process(timeout: timedelta) -> Iterator[torch.device]:
    """Inside, ranks are joined and watch each other; a signal that comes before waits until they can leave together."""
    store, number, size = _rendezvous(timeout)
    store = dist.PrefixStore(_fresh_store_prefix(store, number, size, timeout), store)
    watch = Watchdog(store.clone(), number, size)
    watch.start()
    failed = True
    try:
        # compared before NCCL starts, which names neither the rank nor the reason
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
        yield device
        failed = False
    except (Exception, SystemExit) as error:
        defer_signals()  # launchers ask the survivors of a failure to leave, but its report is to be heard
        explained = watch.explain(error)
        if isinstance(explained, Stopped):
            _leave(explained, watch, store.clone())
        elif isinstance(explained, SystemExit):  # its code may be 0
            raise RuntimeError(f"a rank has left by sys.exit({explained.code!r})") from explained
        if explained is error:
            raise
        raise explained from None
    finally:
        reason = sys.exc_info()[1]
        if failed:  # exit handlers may wait for ranks that are gone
            code = reason.number + 128 if isinstance(reason, Stopped) else 1
            threading.Thread(target=_exit_later, args=(code,), daemon=True).start()
        watch.stop(failed and not isinstance(reason, Stopped))
        if not failed:
            dist.destroy_process_group()


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store where ranks meet, this rank's number, and how many they are."""
    number, size, port = (launched_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR', '')} MASTER_PORT={port}"
    if number >= size:
        raise UserError(f"RANK={number} WORLD_SIZE={size}: ranks count from 0, so {size - 1} is the last")
    try:
        return next(iter(rendezvous("env://", timeout=timeout)))
    except (ValueError, RuntimeError) as error:  # torch's errors of its store are of the latter kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"rank {number} of {size} cannot meet the others at {place} ({reason}): the address must be that of rank "
            "0's machine, the port free there, and all ranks be started"
        ) from error


def _fresh_store_prefix(store: dist.Store, number: int, size: int, timeout: timedelta) -> str:
    """A new name, the same on all ranks of this start, for what they tell each other.

    torchrun's store outlives ranks that are started again and what they told; their restarts each node counts for
    itself. So rank 0 answers whom it finds there, until all of now have heard it.
    """
    own, deadline = uuid4().hex, time.monotonic() + timeout.total_seconds()
    if number > 0:
        store.set(f"here{number}", own)
        name = store.get(own).decode()
        store.add(f"{name}heard", 1)
        return name
    callers = [f"here{other}" for other in range(1, size)]
    while store.add(f"{own}heard", 0) < len(callers):
        if time.monotonic() > deadline:
            raise UserError(f"not all of {size} ranks have come within {timeout.total_seconds():g} s")
        for caller in callers:
            if store.check([caller]):
                store.set(store.get(caller).decode(), own)
        time.sleep(0.05)
    return own


def _leave(stop: Stopped, watch: Watchdog, store: dist.Store) -> None:
    """Requeue together: a rank that left first would end the others, and what follows a failure is no reason to."""
    report_position(LEAVING)
    if watch.rank == 0:
        _meet(store, "asked", watch)
        if watch.failure is None:
            requeue(stop.number)
    else:
        with suppress(RuntimeError):
            store.add("asked", 1)
    _meet(store, "leaving", watch)


def _meet(store: dist.Store, name: str, watch: Watchdog) -> None:
    """Wait until all ranks are here, for rank 0 as long as it is on its way, since it may have a checkpoint to write.

    But not for ever: a rank may be waiting for another in a collective operation.
    """
    deadline = time.monotonic() + LEAVE_TIMEOUT_S
    with suppress(RuntimeError):
        store.add(name, 1)
        while store.add(name, 0) < watch.size and watch.failure is None and time.monotonic() < deadline:
            if watch.rank > 0 and watch.leaves(0):
                deadline = time.monotonic() + LEAVE_TIMEOUT_S
            time.sleep(0.1)


def _exit_later(code: int) -> None:
    time.sleep(LEAVE_TIMEOUT_S)
    os._exit(code)


def limit_threads(cores: int | Fraction) -> None:
    """Let torch use no more threads than a process has cores, unless OMP_NUM_THREADS says how many it is to use.

    torch counts the cores that it may run on, whoever else runs there and whatever quota there is.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, int(cores))))
