"""Which clips a step trains on, and which of them are a rank's.

`Batches` is a pure function of (plan, dataset size, seed, step): a resumed run, or one with other workers or another
number of ranks, sees the same clips in the same order. It walks an endless row of shuffled passes over the dataset, so
each video comes once a pass, also where the batch size changes in the middle of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .clips import ClipRequest
from .errors import UserError
from .plan import Plan


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@dataclass(frozen=True)
class Batches:
    """`batches(step)` is the global batch of a step."""

    plan: Plan
    size: int  # videos in the dataset
    seed: int

    def __call__(self, step: int) -> list[ClipRequest]:
        """The requests of the global batch, in the order that BN groups and ranks cut it in."""
        slot = self.plan.slot(step)
        first = self.plan.clips_before(step)
        requests = []
        for position in range(first, first + slot.batch):
            epoch, offset = divmod(position, self.size)
            index = int(_order(self.size, self.seed, epoch)[offset])
            clip_seed = int(np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0])
            requests.append(ClipRequest(index, slot.grid, clip_seed))
        return requests


@dataclass(frozen=True)
class Share:
    """A rank's part of a global batch: the clips `[start, stop)`.

    It holds either `groups` whole BN groups, or a part of one group that it shares with `ranks`.
    """

    start: int
    stop: int
    groups: int
    group_size: int  # clips in a BN group
    ranks: tuple[int, ...]  # those that share this rank's one group; itself alone where groups are whole


def share(batch: int, groups: int, rank: int, world: int) -> Share:
    """Cut a global batch of `batch` clips in `groups` BN groups among `world` ranks.

    Ranks take whole groups while there is one for each, one more or less where they do not divide; with fewer groups
    than ranks, a group is spread over as many ranks as there are to each.

    Raises:
        UserError: ranks that no equal number of can share a group, or that would get no clip.
    """
    size = batch // groups
    if groups >= world:
        first, last = rank * groups // world, (rank + 1) * groups // world
        return Share(first * size, last * size, last - first, size, (rank,))
    if world % groups or size < world // groups:
        usable = [n for n in range(1, world + 1) if n <= groups or (n % groups == 0 and n // groups <= size)]
        raise UserError(
            f"{world} ranks cannot share a batch of {batch} clips in {groups} BN groups: "
            f"use {usable[-1]} ranks or change base.batch"
        )
    ranks = world // groups
    group, part = divmod(rank, ranks)
    start = group * size
    members = tuple(range(group * ranks, (group + 1) * ranks))
    return Share(start + part * size // ranks, start + (part + 1) * size // ranks, 1, size, members)


def check_shares(plan: Plan, world: int) -> None:
    """Raise UserError where some step's batch cannot be cut among `world` ranks."""
    for phase in plan.phases:
        for slot in phase.slots:
            share(slot.batch, phase.bn_groups, 0, world)
