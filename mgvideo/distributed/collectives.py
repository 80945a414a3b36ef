"""Collective operations. Each also works in a single process that has joined no process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mgvideo.cpu.resources import cpu_share, find_resources, memory_share


def rank() -> int:
    """Return this process's rank, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


class RequestSync:
    """Agrees on the largest number that any rank requests, while a training step runs.

    It uses gloo on the CPU, so it does not synchronise the device. `request` returns this rank's number.
    """

    def __init__(self, request: Callable[[], int]) -> None:
        self.request = request
        self.group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._reduction: tuple[Any, Tensor] | None = None  # the all-reduce in progress, and its tensor

    def start(self) -> None:
        """Start to reduce this rank's number with those of the others."""
        if self.group is not None:
            number = torch.tensor(self.request())
            self._reduction = (dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group, async_op=True), number)

    def wait(self) -> int:
        """Return the largest number of all ranks, the same on each."""
        if self._reduction is None:
            return self.request()
        (work, number), self._reduction = self._reduction, None
        work.wait()
        return int(number)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor in place over all ranks; returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather_objects(item: object) -> list:
    """Return the `item` of every rank, in the order of ranks."""
    if not dist.is_initialized():
        return [item]
    items: list = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def gather_rows(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Return the rows `[n, …]` of all ranks of a group, in the order of ranks, of which rank i has `counts[i]`.

    All ranks of the group call it together. It does not synchronise the device.
    """
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def rank_cpus() -> Fraction:
    """Return the CPU cores of this rank: its share of the cores of its machine. All ranks call this together."""
    resources = find_resources()
    return cpu_share(resources, gather_objects(resources))


def rank_memory() -> int:
    """Return this rank's memory in bytes: its share of its machine's free memory. All ranks call this together."""
    resources = find_resources()
    return memory_share(resources, gather_objects(resources))


class Subgroups:
    """Process groups of consecutive ranks, each created when it is first needed. All ranks use it together."""

    def __init__(self) -> None:
        self._groups: dict[int, dist.ProcessGroup] = {}

    def of_size(self, size: int) -> dist.ProcessGroup | None:
        """Return the group of `size` ranks that this rank belongs to, None for size 1.

        Raises:
            ValueError: the number of ranks is not a multiple of `size`.
        """
        if size == 1:
            return None
        if size not in self._groups:
            self._groups[size], _ = dist.new_subgroups(size)
        return self._groups[size]
