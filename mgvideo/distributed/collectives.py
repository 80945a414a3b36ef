"""The few collective operations that the core needs, on one rank as on many."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgvideo.cpu.resources import cpu_share, find_resources, memory_share


def rank() -> int:
    """This process's rank, 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


class RequestSync:
    """The most that any rank asks for, agreed on while a step runs: over gloo on the CPU, so that no device waits."""

    def __init__(self, wish: Callable[[], int]) -> None:
        self.wish = wish
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: tuple[Any, Tensor] | None = None

    def start(self) -> None:
        """Start to tell this rank's wish."""
        if self.group is not None:
            vote = torch.tensor(self.wish())
            self._pending = (dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group, async_op=True), vote)

    def wait(self) -> int:
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


def rank_cpus() -> Fraction:
    """CPU cores of this rank, its share of what the ranks of its machine may use. All ranks call it together."""
    own = find_resources()
    return cpu_share(own, gather_objects(own))


def rank_memory() -> int:
    """Bytes of memory that this rank may take, its share of what its machine has free. All ranks call it together."""
    own = find_resources()
    return memory_share(own, gather_objects(own))


@cache
def bn_process_group(size: int) -> Any:
    """The ProcessGroup of `size` consecutive ranks that this rank is in; None for 1. All ranks call it together."""
    if size == 1:
        return None
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return groups[rank() // size]
