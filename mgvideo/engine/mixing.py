"""Mixup and CutMix over the order of the global batch, the same on any number of ranks and micro-batches.

A clip is mixed with a partner in its own BN group. The partner follows from the clip's place in the global batch alone,
and is `repeat` places away, so that it shows another video. How much of it is mixed in is drawn from the clip's own
seed. A rank that holds a part of a BN group gets partners that it lacks from the ranks that share the group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mgvideo.distributed.collectives import gather_rows
from mgvideo.plan.shards import BatchShard, group_parts


class Mix(NamedTuple):
    """How a clip is mixed: `box` (top, bottom, left, right) of CutMix, or None for mixup.

    `share` is the clip's own share of the label, from 0 to 1; 1 without a box leaves the clip as it is.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(
    rng: np.random.Generator, size: int, mixup_alpha: float, cutmix_alpha: float, mix_prob: float, cutmix_prob: float
) -> Mix:
    """Draw how a clip of `size` × `size` pixels is mixed, as PySlowFast and timm do for a batch.

    The share is from Beta(alpha, alpha). A box of CutMix may reach over the border; the share is that of the pixels
    which the clip keeps. An alpha of 0 turns mixup or CutMix off.
    """
    if rng.random() >= mix_prob:
        return Mix(1.0)
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha <= 0 or rng.random() < cutmix_prob)
    alpha = cutmix_alpha if use_cutmix else mixup_alpha
    share = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return Mix(share)
    half = int(size * (1 - share) ** 0.5) // 2
    y, x = rng.integers(size, size=2).tolist()
    top, bottom, left, right = max(0, y - half), min(size, y + half), max(0, x - half), min(size, x + half)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def partner(place: int, group_size: int, repeat: int) -> int:
    """Return the place of a clip's partner in its BN group of `group_size` clips.

    Blocks of `repeat` clips, the clips of one video, swap with the next block. A last block without a next one takes
    its partners from the start of the group.
    """
    if place % (2 * repeat) >= repeat:
        return place - repeat
    has_next = (place // repeat + 1) * repeat < group_size
    return min(place + repeat, group_size - 1) if has_next else (place + repeat) % group_size


def mix_clips(
    clips: Tensor,
    labels: Tensor,
    mixes: list[Mix],
    shard: BatchShard,
    group: dist.ProcessGroup | None,
    repeat: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the mixed clips and labels of a shard.

    Args:
        clips: uint8 `[n, t, s, s, 3]`, the shard's clips.
        labels: float `[n, classes]`.
        mixes: one for each clip.
        shard: the part of the global batch that the clips are.
        group: of the ranks that share the shard's BN group; None if the shard holds whole groups.
        repeat: number of consecutive clips of one video.
    """
    start, size = shard.start, shard.group_size
    places = [(start + i) // size * size + partner((start + i) % size, size, repeat) for i in range(len(clips))]
    sources, source_labels, first = clips, labels, start
    if len(shard.ranks) > 1:
        parts = group_parts(size, len(shard.ranks))
        # The same on all ranks of the group: whether any of them lacks a partner.
        if any(partner(place, size, repeat) not in part for part in parts for place in part):
            counts = [len(part) for part in parts]
            sources, source_labels = gather_rows(clips, counts, group), gather_rows(labels, counts, group)
            first = start // size * size
    mixed, mixed_labels = clips.clone(), labels.clone()
    for i, (place, mix) in enumerate(zip(places, mixes, strict=True)):
        source = sources[place - first]
        if mix.box is not None:
            top, bottom, left, right = mix.box
            mixed[i, :, top:bottom, left:right] = source[:, top:bottom, left:right]
        elif mix.share < 1:
            mixed[i] = torch.lerp(source.float(), clips[i].float(), mix.share).round_()
        mixed_labels[i] = torch.lerp(source_labels[place - first], labels[i], mix.share)
    return mixed, mixed_labels
