"""`mgvideo prepare clips`: a picture of training clips, as they are read and as the network sees them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from mgvideo.loading.loader import Batch, Loader, LoaderOptions
from mgvideo.plan.plan import require
from mgvideo.storage.paths import explain_write_errors
from mgvideo.tracking.run_logger import frames_as_image

from .build import build_data, build_plan
from .schema import key
from .training import build_augmentation, build_sampler

MIN_HEIGHT = 112  # pixels of a drawn frame; smaller ones are enlarged by a whole number
GAP = 8  # pixels between the clips as read and as augmented
MIN_SHARE = 0.005  # of a class in a printed label


@dataclass
class ClipKeys:
    """Keys of `prepare clips`."""

    out: str = key("clips.png", "file of the picture")
    step: int = key(0, "step of the plan whose clips are drawn", least=0)
    clips: int = key(8, "clips to draw, at most one BN group", least=1)
    frames: int = key(4, "frames of each clip", least=1)


def draw_clips(options: ClipKeys, cfg: DictConfig) -> None:
    """Draw the first clips of a step of a run: left as they are read, right as the network sees them.

    Prints the video and the label of each.
    """
    data = build_data(cfg)
    plan = build_plan(cfg, len(data.train))
    require(options.step < plan.steps, f"step={options.step}: the plan has {plan.steps} steps")
    sampler = build_sampler(cfg, plan, data.train)
    # As one of so many ranks, this process loads one BN group, which has all clips that are mixed with each other.
    requests = partial(sampler.shard, world_size=plan.phase(options.step).bn_groups)
    loader = Loader(data.train, LoaderOptions(num_workers=0))
    batch = next(loader.load_steps(requests, range(options.step, options.step + 1)))
    clips, labels = batch.clips, batch.labels
    augmentation = build_augmentation(cfg, data.classes, torch.device("cpu"))
    if augmentation is not None:
        assert batch.seeds is not None, "a training batch carries its seeds"
        assert batch.shard is not None, "a training batch carries its shard"
        clips, labels = augmentation(clips, labels, batch.seeds, batch.shard)
    with explain_write_errors("out", options.out):
        side_by_side(batch.clips, clips, options.clips, options.frames).save(options.out, format="PNG")
    names = data.train.class_names
    for row in range(min(options.clips, len(clips))):
        print(f"row {row + 1}: {describe_label(labels[row], names)}: {_video(data.train, batch, row)}")
    print(f"{options.out}: clips of {plan.describe(options.step)}; left as read, right as the network sees them")


def side_by_side(read: Tensor, augmented: Tensor, clips: int, frames: int) -> Image.Image:
    """Return a picture with a row for each clip, uint8 `[n, t, s, s, 3]`: frames as read, then as augmented."""
    left, right = (frames_as_image(part, clips, frames) for part in (read, augmented))
    gap = np.full((len(left), GAP, 3), 255, np.uint8)
    factor = -(-MIN_HEIGHT // read.shape[2])
    picture = np.concatenate([left, gap, right], axis=1)
    return Image.fromarray(picture.repeat(factor, axis=0).repeat(factor, axis=1))


def describe_label(label: Tensor, class_names: list[str]) -> str:
    """Return the class of an int64 label, or the classes and shares of a float label `[classes]`."""
    if label.dim() == 0:
        return class_names[int(label)]
    classes = [int(index) for index in label.argsort(descending=True) if label[index] >= MIN_SHARE]
    return " + ".join(f"{label[index]:.0%} {class_names[index]}" for index in classes) or "no class"


def _video(dataset: object, batch: Batch, row: int) -> str:
    index = int(batch.indices[row])
    return str(dataset.path(index)) if hasattr(dataset, "path") else f"video {index}"
