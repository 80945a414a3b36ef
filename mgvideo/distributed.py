"""Ranks: joining them, and the few collective operations that the core needs on one rank as on many."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from .errors import UserError
from .signals import Stopped, defer, heed, requeue
from .watch import LEAVING, Watch, at

PATIENCE = 15.0  # seconds that a rank which leaves waits for others, which may be stuck


def rank() -> int:
    """This process's rank, 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_from_slurm() -> None:
    """Where srun started this process, and torchrun did not, set the variables that torchrun would."""
    env = os.environ
    if "WORLD_SIZE" in env or "SLURM_STEP_NUM_TASKS" not in env:
        return
    env["WORLD_SIZE"], env["RANK"] = env["SLURM_STEP_NUM_TASKS"], env["SLURM_PROCID"]
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = env["SLURM_LOCALID"], str(len(env["SLURM_GTIDS"].split(",")))
    if "MASTER_ADDR" not in env:
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        )
        env["MASTER_ADDR"] = nodes.stdout.split()[0]
    # the same on all ranks, another for each job, below the ports that systems hand out
    env.setdefault("MASTER_PORT", str(12000 + int(env["SLURM_JOB_ID"]) % 20000))


@contextmanager
def joined(timeout_s: float = 600.0) -> Iterator[torch.device]:
    """The device of this process, ranks joined where a launcher such as torchrun or srun started several.

    Inside, a signal raises Stopped; where that ends it, the job goes back into SLURM's queue.
    """
    ranks_from_slurm()
    cuda = torch.cuda.is_available()
    if cuda and local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} is number {local_rank()} on this node, which has "
            f"{torch.cuda.device_count()} GPUs: start at most that many processes a node"
        )
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    with _alone() if alone else _together(device, timedelta(seconds=timeout_s)):
        heed()
        yield device


@contextmanager
def _alone() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        requeue(stop.number)
        raise


@contextmanager
def _together(device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Inside, ranks are joined and watch each other; a signal that comes before waits until they can leave together."""
    store, number, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = dist.PrefixStore(_meeting(store, number, size, timeout), store)
    watch = Watch(store.clone(), number, size)
    watch.start()
    failed = True
    try:
        cuda = device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=number,
            world_size=size,
            timeout=timeout,
            device_id=device if cuda else None,
        )
        yield
        failed = False
    except (Exception, SystemExit) as error:
        defer()  # launchers ask the survivors of a failure to leave, but its report is to be heard
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


def _meeting(store: dist.Store, number: int, size: int, timeout: timedelta) -> str:
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


def _leave(stop: Stopped, watch: Watch, store: dist.Store) -> None:
    """Requeue together: a rank that left first would end the others, and what follows a failure is no reason to."""
    at(LEAVING)
    if watch.rank == 0:
        _meet(store, "asked", watch)
        if watch.failure is None:
            requeue(stop.number)
    else:
        with suppress(RuntimeError):
            store.add("asked", 1)
    _meet(store, "leaving", watch)


def _meet(store: dist.Store, name: str, watch: Watch) -> None:
    """Wait until all ranks are here, for rank 0 as long as it is on its way, since it may have a checkpoint to write.

    But not for ever: a rank may be waiting for another in a collective operation.
    """
    deadline = time.monotonic() + PATIENCE
    with suppress(RuntimeError):
        store.add(name, 1)
        while store.add(name, 0) < watch.size and watch.failure is None and time.monotonic() < deadline:
            if watch.rank > 0 and watch.leaves(0):
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.1)


def _exit_later(code: int) -> None:
    time.sleep(PATIENCE)
    os._exit(code)


class Votes:
    """The most that any rank asks for, agreed on while a step runs: over gloo on the CPU, so that no device waits."""

    def __init__(self, wish: Callable[[], int]) -> None:
        self.wish = wish
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Any, Tensor] | None = None

    def cast(self) -> None:
        """Start to tell this rank's wish."""
        if self.group is not None:
            vote = torch.tensor(self.wish())
            self._pending = (dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group, async_op=True), vote)

    def result(self) -> int:
        """The largest wish of all ranks, the same on each."""
        if self._pending is None:
            return self.wish()
        (work, vote), self._pending = self._pending, None
        work.wait()
        return int(vote)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather_objects(item: object) -> list:
    """What each rank gave, by rank."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


@cache
def neighbours(size: int) -> Any:
    """The ProcessGroup of `size` consecutive ranks that this rank is in; None for 1. All ranks call it together."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return groups[rank() // size]
