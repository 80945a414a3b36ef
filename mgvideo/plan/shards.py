"""Split global batches over ranks, into whole BN groups where there are enough of them. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from mgvideo.errors import UserError

from .plan import Plan


@dataclass(frozen=True)
class BatchShard:
    """A rank's part of a global batch of `batch` clips: the clips `[start, stop)`.

    It holds either `groups` whole BN groups, or a part of one BN group that several ranks share.
    """

    batch: int  # clips in the global batch
    start: int
    stop: int
    groups: int  # BN groups in the shard; 1 for a part of a group
    group_size: int  # clips in a whole BN group
    ranks: tuple[int, ...]  # the ranks that share this rank's BN group; only this rank if its groups are whole


def shard_batch(batch: int, groups: int, rank: int, world_size: int) -> BatchShard:
    """Return the shard of `rank` of a global batch of `batch` clips in `groups` BN groups.

    With at least one BN group per rank, ranks get whole groups; their numbers differ by at most one. With fewer groups
    than ranks, equally many ranks share each group.

    Raises:
        UserError: the ranks cannot be divided evenly among the groups, or a rank would get no clip.
    """
    group_size = batch // groups
    if groups >= world_size:
        first, last = rank * groups // world_size, (rank + 1) * groups // world_size
        return BatchShard(batch, first * group_size, last * group_size, last - first, group_size, (rank,))
    if world_size % groups or group_size < world_size // groups:
        usable = [n for n in range(1, world_size + 1) if n <= groups or (n % groups == 0 and n // groups <= group_size)]
        raise UserError(
            f"{world_size} ranks cannot share a batch of {batch} clips in {groups} BN groups: "
            f"use {usable[-1]} ranks or change base.batch_size"
        )
    ranks_per_group = world_size // groups
    group, part = divmod(rank, ranks_per_group)
    group_start = group * group_size
    ranks = tuple(range(group * ranks_per_group, (group + 1) * ranks_per_group))
    clips = group_parts(group_size, ranks_per_group)[part]
    return BatchShard(batch, group_start + clips.start, group_start + clips.stop, 1, group_size, ranks)


def group_parts(group_size: int, ranks: int) -> list[range]:
    """Return which clips of a BN group each of the ranks that share it has, counted from the start of the group."""
    return [range(part * group_size // ranks, (part + 1) * group_size // ranks) for part in range(ranks)]


def check_shards(plan: Plan, world_size: int) -> None:
    """Check that `world_size` ranks can share the batch of every step.

    Raises:
        UserError: they cannot, see `shard_batch`.
    """
    for phase in plan.phases:
        for slot in phase.slots:
            shard_batch(slot.batch, phase.bn_groups, 0, world_size)
