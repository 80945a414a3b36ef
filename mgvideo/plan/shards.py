"""Which part of a global batch a rank has, in whole BN groups where there are enough. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from mgvideo.errors import UserError

from .plan import Plan


@dataclass(frozen=True)
class BatchShard:
    """A rank's part of a global batch of `batch` clips: the clips `[start, stop)`.

    It holds either `groups` whole BN groups, or a part of one group that it shares with `ranks`.
    """

    batch: int
    start: int
    stop: int
    groups: int
    group_size: int  # clips in a BN group
    ranks: tuple[int, ...]  # those that share this rank's one group; itself alone where groups are whole


def shard_batch(batch: int, groups: int, rank: int, world_size: int) -> BatchShard:
    """Cut a global batch of `batch` clips in `groups` BN groups among `world_size` ranks.

    Ranks take whole groups while there is one for each, one more or less where they do not divide; with fewer groups
    than ranks, a group is spread over as many ranks as there are to each.

    Raises:
        UserError: the ranks cannot be divided evenly among the groups, or some rank would get no clip.
    """
    size = batch // groups
    if groups >= world_size:
        first, last = rank * groups // world_size, (rank + 1) * groups // world_size
        return BatchShard(batch, first * size, last * size, last - first, size, (rank,))
    if world_size % groups or size < world_size // groups:
        usable = [n for n in range(1, world_size + 1) if n <= groups or (n % groups == 0 and n // groups <= size)]
        raise UserError(
            f"{world_size} ranks cannot share a batch of {batch} clips in {groups} BN groups: "
            f"use {usable[-1]} ranks or change base.batch_size"
        )
    ranks = world_size // groups
    group, part = divmod(rank, ranks)
    start = group * size
    members = tuple(range(group * ranks, (group + 1) * ranks))
    first, stop = start + part * size // ranks, start + (part + 1) * size // ranks
    return BatchShard(batch, first, stop, 1, size, members)


def check_shards(plan: Plan, world_size: int) -> None:
    """Raise UserError where some step's batch cannot be cut among `world_size` ranks."""
    for phase in plan.phases:
        for slot in phase.slots:
            shard_batch(slot.batch, phase.bn_groups, 0, world_size)
