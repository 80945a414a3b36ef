"""Augmentation on a GPU: it does not wait for the GPU, and gives the same clips as on the CPU but for its noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mgvideo.engine.augmentation import Augmentation, AugmentOptions
from mgvideo.plan.shards import shard_batch

CLIPS, CLASSES = 16, 10
STRONG = AugmentOptions(
    color_jitter=0.4, randaugment_ops=4, erasing_prob=0.25, mixup_alpha=0.8, cutmix_alpha=1.0, randaugment_magnitude=9
)


def inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(CLIPS * 4, 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(255 * coarse, (56, 56), mode="bilinear").to(torch.uint8)
    clips = pixels.view(CLIPS, 4, 3, 56, 56).permute(0, 1, 3, 4, 2).contiguous()
    return clips.to(device), (torch.arange(CLIPS) % CLASSES).to(device)


def augmented(options: AugmentOptions, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    augmentation = Augmentation(options, CLASSES, (0.45,) * 3, (0.225,) * 3, device)
    seeds = np.random.default_rng(seed).integers(2**64, size=CLIPS, dtype=np.uint64)
    return augmentation(*inputs(device), seeds, shard_batch(CLIPS, 2, 0, 1))


def test_augmentation_never_waits_for_the_gpu(cuda: torch.device) -> None:
    augmentation = Augmentation(STRONG, CLASSES, (0.45,) * 3, (0.225,) * 3, cuda)
    clips, labels = inputs(cuda)
    rng, shard = np.random.default_rng(0), shard_batch(CLIPS, 2, 0, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):  # 16 clips, four operations each: every operation occurs
            augmentation(clips, labels, rng.integers(2**64, size=CLIPS, dtype=np.uint64), shard)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [False, True])
def test_clips_are_those_of_the_cpu_but_for_rounding(device: torch.device, deterministic: bool) -> None:
    options = AugmentOptions(**{**vars(STRONG), "erasing_prob": 0.0})
    torch.use_deterministic_algorithms(deterministic)
    try:
        actual, expected = (augmented(options, where, 1) for where in (device, torch.device("cpu")))
        again = augmented(options, device, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual[0], again[0])
    torch.testing.assert_close(actual[1].cpu(), expected[1])
    difference = (actual[0].cpu().int() - expected[0].int()).abs()
    # An operation after a rounded one can enlarge the difference, as a threshold or a histogram does.
    assert float((difference > 2).float().mean()) < 0.02
