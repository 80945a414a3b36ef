"""Augmentation on the device: operations as in PIL, the same clips on any number of ranks, and mixed labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from training import PRELOADED_MODULES, free_port

from mgvideo.distributed.collectives import Subgroups
from mgvideo.distributed.process_group import process_group
from mgvideo.engine.augmentation import (
    Augmentation,
    AugmentOptions,
    draw_color_jitter,
    draw_erased_box,
    draw_randaugment,
)
from mgvideo.engine.image_operations import OPERATIONS
from mgvideo.engine.mixing import draw_mix, partner
from mgvideo.loading.workers import start_fork_server
from mgvideo.plan.shards import shard_batch

STRONG = AugmentOptions(
    color_jitter=0.4, randaugment_ops=4, erasing_prob=0.25, mixup_alpha=0.8, cutmix_alpha=1.0, randaugment_magnitude=9
)
MEAN, STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
CLASSES = 5


def augmentation(options: AugmentOptions = STRONG, repeat: int = 1) -> Augmentation:
    return Augmentation(options, CLASSES, MEAN, STD, torch.device("cpu"), repeat)


def images(count: int, frames: int = 3, size: int = 24) -> Tensor:
    """Return smooth, colourful clips uint8 `[count, frames, size, size, 3]`."""
    generator = torch.Generator().manual_seed(0)
    coarse = 255 * torch.rand(count * frames, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return pixels.to(torch.uint8).view(count, frames, 3, size, size).permute(0, 1, 3, 4, 2).contiguous()


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


SEEDS = np.random.default_rng(0).integers(2**64, size=24, dtype=np.uint64)


def shear(matrix: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def enhance(kind: type, factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: kind(image).enhance(factor)


# level 6, and the operation that timm runs for it
PIL_OPERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "rotate": lambda image: image.rotate(18, Image.Resampling.BILINEAR),
    "posterize": lambda image: ImageOps.posterize(image, 2),
    "solarize": lambda image: ImageOps.solarize(image, 256 - 153),
    "solarize_add": lambda image: image.point([min(255, v + 66) if v < 128 else v for v in range(256)] * 3),
    "color": enhance(ImageEnhance.Color, 1.54),
    "contrast": enhance(ImageEnhance.Contrast, 1.54),
    "brightness": enhance(ImageEnhance.Brightness, 1.54),
    "sharpness": enhance(ImageEnhance.Sharpness, 1.54),
    "shear_x": shear((1, 0.18, 0, 0, 1, 0)),
    "shear_y": shear((1, 0, 0, 0.18, 1, 0)),
    "translate_x": shear((1, 0, 0.27 * 24, 0, 1, 0)),
    "translate_y": shear((1, 0, 0, 0, 1, 0.27 * 24)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_do_what_timm_does_with_pil(name: str) -> None:
    clip, operation = images(1)[0], OPERATIONS[name]
    result = operation.apply(clip.permute(0, 3, 1, 2), operation.argument(6.0), torch.zeros(3)).permute(0, 2, 3, 1)
    expected = torch.stack([torch.from_numpy(np.array(PIL_OPERATIONS[name](Image.fromarray(f.numpy())))) for f in clip])
    assert result.dtype == torch.uint8
    assert not torch.equal(result, clip)
    difference = (result.int() - expected.int()).abs()
    # PIL blackens pixels at the edge of what moved in, where this blends; everywhere else the values are rounded.
    geometric = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    assert (difference > 2).float().mean() <= (0.12 if geometric else 0), difference.max()
    assert difference[:, 9:15, 9:15].max() <= 2


def test_what_moves_in_from_outside_has_the_fill_colour() -> None:
    operation = OPERATIONS["translate_x"]
    frames = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    result = operation.apply(frames, operation.argument(-10.0), torch.tensor([10.0, 20.0, 30.0]))
    assert result[:, :, :, :8].float().mean((0, 2, 3)).tolist() == [10, 20, 30], (
        "45 % of 20 pixels, the last one blended"
    )
    assert not result[:, :, :, 10:].any()


def test_randaugment_draws_as_timm_does() -> None:
    options = AugmentOptions(randaugment_ops=4, randaugment_magnitude=7, randaugment_magnitude_std=0.5)
    drawn = [draw_randaugment(np.random.default_rng(seed), options) for seed in range(2000)]
    names = [name for clip in drawn for name, _ in clip]
    assert abs(len(names) / 8000 - 0.5) < 0.03, "each of the four has probability 1/2"
    counts = np.array([names.count(name) for name in OPERATIONS])
    assert abs(counts / len(names) - 1 / 15).max() < 0.015
    degrees = np.array([argument for clip in drawn for name, argument in clip if name == "rotate"])
    assert abs((degrees > 0).mean() - 0.5) < 0.15
    assert abs(np.abs(degrees).mean() - 21) < 0.5, "30 degrees at magnitude 10"
    assert abs(np.abs(degrees).std() - 1.5) < 0.4
    factors = [argument for clip in drawn for name, argument in clip if name == "contrast"]
    assert 0.1 <= min(factors) < 0.6
    assert 1.4 < max(factors) <= 1.9


def test_color_jitter_has_a_random_order_and_stays_in_its_range() -> None:
    drawn = [draw_color_jitter(np.random.default_rng(seed), AugmentOptions(color_jitter=0.4)) for seed in range(300)]
    assert len({tuple(name for name, _ in clip) for clip in drawn}) == 6
    factors = [factor for clip in drawn for _, factor in clip]
    assert 0.6 <= min(factors) < 0.62
    assert 1.38 < max(factors) <= 1.4


def test_an_erased_box_is_the_same_in_all_frames_and_holds_noise() -> None:
    clips = torch.full((8, 3, 40, 40, 3), 7, dtype=torch.uint8)
    erased, _ = augmentation(AugmentOptions(erasing_prob=1.0))(clips, labels(8), SEEDS[:8], shard_batch(8, 1, 0, 1))
    changed = erased != 7
    for clip, mask in zip(erased, changed, strict=True):
        pixels = mask.any(-1)
        rows, columns = (pixels.any(0).any(axis).nonzero().flatten() for axis in (1, 0))
        box = clip[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].float()
        assert 0.015 < box[0, :, :, 0].numel() / 1600 < 0.35
        assert mask.float().mean() > 0.97 * box.numel() / clip.numel(), "all pixels of the box changed"
        if box.numel() > 1000:
            assert abs(box.mean() - 115) < 12
            assert abs(box.std() - 57) < 10
        assert not torch.equal(box[0], box[1])
    sizes = [draw_erased_box(np.random.default_rng(seed), 40)[2:] for seed in range(500)]
    assert min(height / width for height, width in sizes) < 0.5
    assert max(height / width for height, width in sizes) > 2


def augment_by_rank(world_size: int, groups: int, batch: int, repeat: int) -> tuple[Tensor, Tensor]:
    """Augment a batch as ranks would that need no clip of another rank, and concatenate the results."""
    shards = [shard_batch(batch, groups, rank, world_size) for rank in range(world_size)]
    results = [
        augmentation(repeat=repeat)(
            images(batch)[shard.start : shard.stop],
            labels(batch)[shard.start : shard.stop],
            SEEDS[shard.start : shard.stop],
            shard,
        )
        for shard in shards
    ]
    return torch.cat([clips for clips, _ in results]), torch.cat([soft for _, soft in results])


@pytest.mark.parametrize("repeat", [1, 2])
def test_clips_do_not_depend_on_the_number_of_ranks(repeat: int) -> None:
    clips, soft = augment_by_rank(1, 2, 16, repeat)
    assert (clips != images(16)).flatten(1).any(1).float().mean() > 0.8
    for world_size in (2, 4):  # two ranks have whole BN groups, four share them
        other_clips, other_soft = augment_by_rank(world_size, 2, 16, repeat)
        assert torch.equal(other_clips, clips)
        assert torch.equal(other_soft, soft)
    one_clip = augmentation().augment_clip(images(16)[3], int(SEEDS[3]))
    assert torch.equal(one_clip, augmentation().augment_clip(images(16)[3], int(SEEDS[3])))
    assert not torch.equal(one_clip, augmentation().augment_clip(images(16)[3], int(SEEDS[4])))


EXCHANGES = [(6, 1), (6, 2), (2, 1), (5, 2)]  # (clips of the BN group that two ranks share, repeat)


def augment_as_rank(rank: int, port: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_PORT", str(port))
        with process_group(timeout_s=60):
            for batch, repeat in EXCHANGES:
                shard, part = shard_batch(batch, 1, rank, 2), slice(*shard_bounds(batch, rank))
                group = Subgroups().of_size(2)
                result = augmentation(repeat=repeat)(
                    images(batch)[part], labels(batch)[part], SEEDS[:batch][part], shard, group
                )
                torch.save(result, folder / f"{batch}_{repeat}_{rank}.pt")


def shard_bounds(batch: int, rank: int) -> tuple[int, int]:
    shard = shard_batch(batch, 1, rank, 2)
    return shard.start, shard.stop


def test_ranks_that_share_a_group_exchange_the_clips_to_mix(tmp_path: Path) -> None:
    start_fork_server(PRELOADED_MODULES)
    mp.start_processes(augment_as_rank, (free_port(), tmp_path), nprocs=2, start_method="forkserver")
    for batch, repeat in EXCHANGES:
        expected = augment_by_rank(1, 1, batch, repeat)
        parts = [torch.load(tmp_path / f"{batch}_{repeat}_{rank}.pt") for rank in range(2)]
        for whole, *pieces in zip(expected, *parts, strict=True):
            assert torch.equal(torch.cat(pieces), whole), (batch, repeat)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8, 9, 16])
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_a_partner_shows_another_video_where_the_group_has_one(size: int, repeat: int) -> None:
    for place in range(size):
        other = partner(place, size, repeat)
        assert 0 <= other < size
        assert other // repeat != place // repeat or size <= repeat


def test_mixed_clips_and_labels_have_the_drawn_shares() -> None:
    clips = torch.zeros(8, 2, 20, 20, 3, dtype=torch.uint8)
    clips[1::2] = 200
    shard = shard_batch(8, 1, 0, 1)
    targets = torch.tensor([0, 1] * 4)
    for options in (AugmentOptions(mixup_alpha=0.8), AugmentOptions(cutmix_alpha=1.0)):
        mixed, soft = augmentation(options)(clips, targets, SEEDS[:8], shard)
        assert torch.allclose(soft.sum(1), torch.ones(8))
        share_of_one = mixed.float().mean((1, 2, 3, 4)) / 200
        torch.testing.assert_close(share_of_one, soft[:, 1], atol=0.004, rtol=0)
        assert len(soft[:, 1].unique()) > 6, "each clip has its own share"
        assert (mixed[:, 0] == mixed[:, 1]).all(), "frames are mixed alike"
        values = mixed.unique()
        assert (len(values) == 2) == (options.cutmix_alpha > 0)
    half, soft = augmentation(AugmentOptions(mixup_alpha=0.8, mix_prob=0.0))(clips, targets, SEEDS[:8], shard)
    assert torch.equal(half, clips)
    assert torch.equal(soft, targets), "labels stay classes if nothing is ever mixed"


def test_cutmix_and_mixup_are_drawn_with_their_probabilities() -> None:
    mixes = [draw_mix(np.random.default_rng(seed), 32, 0.8, 1.0, 0.8, 0.25) for seed in range(3000)]
    cut = np.mean([mix.box is not None for mix in mixes])
    assert abs(cut - 0.2) < 0.03
    assert abs(np.mean([mix.share == 1 for mix in mixes]) - 0.2) < 0.03
    shares = np.array([mix.share for mix in mixes if mix.box is None and mix.share < 1])
    assert abs(shares.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01, "the variance of Beta(0.8, 0.8)"


def test_multi_label_clips_mix_their_labels() -> None:
    targets = torch.zeros(4, CLASSES)
    targets[0, :2], targets[1, 1:3], targets[2:] = 1, 1, 1
    _, soft = augmentation(AugmentOptions(mixup_alpha=1.0))(images(4), targets, SEEDS[:4], shard_batch(4, 1, 0, 1))
    assert soft[0, 1] == 1
    assert 0 < soft[0, 0] < 1
    assert soft[0, 0] + soft[0, 2] == pytest.approx(1)
    assert torch.equal(soft[2:], targets[2:])


def test_without_draws_clips_stay_and_those_of_the_loader_are_never_changed() -> None:
    clips, before = images(8), images(8)
    shard = shard_batch(8, 1, 0, 1)
    same, targets = augmentation(AugmentOptions(erasing_prob=1e-9))(clips, labels(8), SEEDS[:8], shard)
    assert torch.equal(same, clips)
    assert torch.equal(targets, labels(8))
    changed, _ = augmentation()(clips, labels(8), SEEDS[:8], shard)
    assert not torch.equal(changed, clips)
    assert torch.equal(clips, before)


def test_strength_of_a_slot_weakens_augmentation() -> None:
    clips, targets, shard = images(8), labels(8), shard_batch(8, 1, 0, 1)

    def change(strength: float) -> float:
        result, _ = augmentation()(clips, targets, SEEDS[:8], shard, strength=strength)
        return float((result.float() - clips.float()).abs().mean())

    assert change(0.0) < 0.5 * change(0.35) < 0.5 * change(1.0)
    plain, _ = augmentation()(clips, targets, SEEDS[:8], shard)
    full, _ = augmentation()(clips, targets, SEEDS[:8], shard, strength=1.0)
    assert torch.equal(plain, full)
