"""Ranks: joining them, and the few collective operations that the core needs on one rank as on many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


def rank() -> int:
    """This process's rank, 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined(timeout_s: float = 600.0) -> Iterator[torch.device]:
    """The device of this process, ranks joined where a launcher such as torchrun started several."""
    cuda = torch.cuda.is_available()
    if cuda and local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} is number {local_rank()} on this node, which has "
            f"{torch.cuda.device_count()} GPUs: start at most that many processes a node"
        )
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), device_id=device if cuda else None
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
