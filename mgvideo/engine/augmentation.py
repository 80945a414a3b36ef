"""Augment the uint8 clips of a rank's shard on the device, before they are split into micro-batches.

Every random choice about a clip is drawn from the seed of its request. So a clip is augmented in the same way on any
number of ranks, workers and micro-batches, and after a resume. The host computes all numbers, and no operation waits
for the device. Importing this module imports torchvision, which takes a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.plan.shards import BatchShard

from .image_operations import MAX_LEVEL, OPERATIONS
from .mixing import draw_mix, mix_clips

# Range of the erased part of a frame and of its ratio of height to width, of timm's and PySlowFast's RandomErasing
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
RANDAUGMENT_PROB = 0.5  # of each chosen operation, as in timm
JITTER = ("brightness", "contrast", "color")


@dataclass(frozen=True)
class AugmentOptions:
    """What augments clips on the device. The default is nothing."""

    color_jitter: float = 0.0  # brightness, contrast and saturation are multiplied by 1 ± this at most
    randaugment_ops: int = 0  # operations drawn for each clip
    randaugment_magnitude: float = 7.0  # 0 to 10
    randaugment_magnitude_std: float = 0.5  # of the normal distribution of magnitudes
    erasing_prob: float = 0.0
    mixup_alpha: float = 0.0  # 0: no mixup
    cutmix_alpha: float = 0.0  # 0: no CutMix
    mix_prob: float = 1.0  # of mixup or CutMix
    cutmix_prob: float = 0.5  # of CutMix in place of mixup, if both are on

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed, so that labels are soft."""
        return self.mix_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def scaled(self, strength: float) -> AugmentOptions:
        """Return options whose ranges, magnitude and probabilities are multiplied by the strength of a slot, 0 to 1."""
        names = ("color_jitter", "randaugment_magnitude", "erasing_prob", "mix_prob")
        return self if strength == 1 else replace(self, **{name: strength * getattr(self, name) for name in names})


class Augmentation:
    """Augments the clips of a shard: colour jitter, RandAugment, random erasing, then mixup or CutMix.

    Args:
        options: what to do.
        num_classes: of the labels.
        mean: of each colour, for pixels in 0–1; RandAugment fills with it what moves in from outside of a frame.
        std: of each colour. Erased parts become noise with this mean and standard deviation.
        device: of the clips.
        repeat: number of consecutive clips of one video in the global batch.
    """

    def __init__(
        self,
        options: AugmentOptions,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        repeat: int = 1,
    ) -> None:
        self.options, self.num_classes, self.repeat = options, num_classes, repeat
        self.mean, self.std = (torch.tensor(list(values), device=device) * 255 for values in (mean, std))
        self.generator = torch.Generator(device)  # of the noise; seeded for each clip

    @torch.no_grad()
    def __call__(
        self,
        clips: Tensor,
        labels: Tensor,
        seeds: np.ndarray,
        shard: BatchShard,
        group: dist.ProcessGroup | None = None,
        strength: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return augmented copies of clips, and their labels.

        Args:
            clips: uint8 `[n, t, s, s, 3]` on the device.
            labels: int64 `[n]`, or float32 `[n, classes]` of multi-label tasks.
            seeds: uint64 `[n]`, the seeds of the clips' requests.
            shard: the part of the global batch that the clips are.
            group: of the ranks that share the shard's BN group; None for whole groups. They call this together.
            strength: of the step's slot, see `AugmentOptions.scaled`.

        Returns:
            The clips as before; the labels as before, or with mixup or CutMix float32 `[n, classes]`.
        """
        options, size = self.options.scaled(strength), clips.shape[2]
        augmented = torch.empty_like(clips)
        for i, seed in enumerate(seeds):
            augmented[i] = self.augment_clip(clips[i], int(seed), options)
        if not options.mixes:
            return augmented, labels
        mixes = [
            draw_mix(
                np.random.default_rng(random_seed(int(seed), Stream.MIXING)),
                size,
                options.mixup_alpha,
                options.cutmix_alpha,
                options.mix_prob,
                options.cutmix_prob,
            )
            for seed in seeds
        ]
        soft = F.one_hot(labels, self.num_classes).float() if labels.dim() == 1 else labels
        return mix_clips(augmented, soft, mixes, shard, group, self.repeat)

    def augment_clip(self, clip: Tensor, seed: int, options: AugmentOptions | None = None) -> Tensor:
        """Return a clip, uint8 `[t, s, s, 3]`, after everything that needs no other clip."""
        options = options or self.options
        rng = np.random.default_rng(random_seed(seed, Stream.AUGMENTATION))
        frames = clip.permute(0, 3, 1, 2)
        for name, argument in [*draw_color_jitter(rng, options), *draw_randaugment(rng, options)]:
            frames = OPERATIONS[name].apply(frames, argument, self.mean)
        clip = frames.permute(0, 2, 3, 1)
        if rng.random() < options.erasing_prob:
            clip = self._erase(clip, draw_erased_box(rng, clip.shape[1]), random_seed(seed, Stream.ERASING))
        return clip

    def _erase(self, clip: Tensor, box: tuple[int, int, int, int], seed: int) -> Tensor:
        """Replace a box (top, left, height, width) of all frames by normal noise, other noise for each pixel."""
        top, left, height, width = box
        self.generator.manual_seed(seed)
        shape = (len(clip), height, width, 3)
        noise = torch.randn(shape, generator=self.generator, device=clip.device) * self.std + self.mean
        clip = clip.clone()
        clip[:, top : top + height, left : left + width] = noise.round_().clamp_(0, 255).to(torch.uint8)
        return clip


def draw_color_jitter(rng: np.random.Generator, options: AugmentOptions) -> list[tuple[str, float]]:
    """Draw operations that change brightness, contrast and saturation, in random order, as (name, factor)."""
    if not options.color_jitter:
        return []
    low, high = max(0.0, 1 - options.color_jitter), 1 + options.color_jitter
    factors = rng.uniform(low, high, len(JITTER)).tolist()
    return [(JITTER[i], factors[i]) for i in rng.permutation(len(JITTER)).tolist()]


def draw_randaugment(rng: np.random.Generator, options: AugmentOptions) -> list[tuple[str, float]]:
    """Draw the operations of RandAugment and their arguments, with replacement.

    The magnitude of each is normally distributed and limited to 0–10 (timm's `mstd`).
    """
    if not options.randaugment_ops:
        return []
    names, drawn = list(OPERATIONS), []
    for _ in range(options.randaugment_ops):
        name, is_applied = names[rng.integers(len(names))], rng.random() < RANDAUGMENT_PROB
        level = rng.normal(options.randaugment_magnitude, options.randaugment_magnitude_std)
        level, sign = min(MAX_LEVEL, max(0.0, level)), 1 if rng.random() < 0.5 else -1
        if is_applied:
            operation = OPERATIONS[name]
            drawn.append((name, operation.argument(sign * level if operation.signed else level)))
    return drawn


def draw_erased_box(rng: np.random.Generator, size: int) -> tuple[int, int, int, int]:
    """Draw the box (top, left, height, width) to erase in frames of `size` × `size` pixels."""
    while True:
        area = rng.uniform(*ERASED_AREA) * size**2
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if height <= size and width <= size:
            top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            return top, left, height, width
