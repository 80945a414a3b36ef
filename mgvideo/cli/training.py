"""Build what only training needs: crops, augmentation, the sampler, and a task with class weights and smoothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from mgvideo.datasets.tables import is_remark, read_lines
from mgvideo.engine.tasks import MultiLabel, SingleLabel, Task
from mgvideo.errors import UserError
from mgvideo.loading.sampler import ClassOrder, ClipSampler
from mgvideo.plan.plan import Plan, require

if TYPE_CHECKING:
    from mgvideo.engine.augmentation import Augmentation

CROP_KEYS = ("crop_area", "crop_aspect")
# keys of `augment` without which clips do not change on the device
DEVICE_KEYS = ("color_jitter", "randaugment_ops", "erasing_prob", "mixup_alpha", "cutmix_alpha")


def set_crops(cfg: DictConfig, dataset: Any) -> None:
    """Let a training dataset draw random-resized crops if `augment.crop_area` is set.

    Raises:
        UserError: A range is not increasing or the area exceeds the frame, or the dataset cannot draw such crops.
    """
    if cfg.augment.crop_area is None:
        return
    area, aspect = (tuple(cfg.augment[key]) for key in CROP_KEYS)
    for name, (low, high) in zip(CROP_KEYS, (area, aspect), strict=True):
        require(low <= high, f"augment.{name}={[low, high]}: the smallest goes first, did you mean {[high, low]}?")
    require(area[1] <= 1, f"augment.crop_area={list(area)}: give parts of the frame, at most 1")
    has_crops = hasattr(getattr(dataset, "sampling", None), "crop_area")
    require(has_crops, f"augment.crop_area: {type(dataset).__name__} has no random-resized crops; set it to null")
    dataset.sampling = replace(dataset.sampling, crop_area=area, crop_aspect=aspect)


def build_augmentation(cfg: DictConfig, num_classes: int, device: torch.device) -> Augmentation | None:
    """Build what augments clips on the device; None if nothing does."""
    options = cfg.augment
    if not any(options[key] for key in DEVICE_KEYS):
        return None
    # imports torchvision, which takes a second
    from mgvideo.engine.augmentation import Augmentation, AugmentOptions

    values: Any = OmegaConf.to_container(options)
    device_options = {key: value for key, value in values.items() if key not in (*CROP_KEYS, "repeat")}
    return Augmentation(
        AugmentOptions(**device_options), num_classes, cfg.normalize.mean, cfg.normalize.std, device, options.repeat
    )


def build_sampler(cfg: DictConfig, plan: Plan, dataset: Any) -> ClipSampler:
    """Build the sampler of training clips.

    Raises:
        UserError: sampler=balanced, and videos have more than one class or the dataset does not list its labels.
    """
    classes = None
    if cfg.sampler == "balanced":
        labels = _labels(dataset, "sampler=balanced")
        require(labels.ndim == 1, f"sampler=balanced needs one class a video; dataset.task={cfg.dataset.task}")
        classes = ClassOrder.of_labels(labels)
    return ClipSampler(plan, len(dataset), cfg.seed, cfg.augment.repeat, classes)


def build_task(cfg: DictConfig, dataset: Any, class_names: Sequence[str]) -> Task:
    """Build the task of a training dataset, with class weights and label smoothing.

    Raises:
        UserError: The weights do not fit the classes, or labels of several classes a video are smoothed.
    """
    weights = class_weights(cfg.train.class_weights, dataset, class_names)
    if cfg.dataset.task == "single_label":
        return SingleLabel(weights, cfg.train.label_smoothing)
    smoothing = f"train.label_smoothing={cfg.train.label_smoothing:g}"
    require(not cfg.train.label_smoothing, f"{smoothing} needs one class a video: set it to 0 for multi_label")
    return MultiLabel(weights)


def class_weights(value: Any, dataset: Any, class_names: Sequence[str]) -> Tensor | None:
    """Return the weight of each class, float32 `[classes]`, for a value of `train.class_weights`.

    Raises:
        UserError: A class has no weight, a weight is negative or no number, or a file cannot be read.
    """
    key = "train.class_weights"
    if value is None:
        return None
    if value == "balanced":
        return balanced_weights(_labels(dataset, f"{key}=balanced"), len(class_names))
    if isinstance(value, str):
        numbers, key = _read_weights(value, class_names), f"{key}={value}"
    else:
        require(isinstance(value, list | ListConfig), f"{key}={value}: give null, balanced, a list or a file")
        numbers = list(value)
        classes = len(class_names)
        require(len(numbers) == classes, f"{key}: {len(numbers)} weights for {classes} classes; give one for each")
    for number, name in zip(numbers, class_names, strict=True):
        is_valid = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
        require(is_valid, f"{key}: class {name} has weight {number}: give a number from 0 up")
    require(any(numbers), f"{key}: all weights are 0")
    return torch.tensor(numbers, dtype=torch.float32)


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Return weights inverse to the number of videos of each class, float32 `[num_classes]`.

    Their mean over the labels of all videos is 1. A class without videos has weight 1.

    Args:
        labels: int64 `[videos]`, or multi-hot bool `[videos, num_classes]`.
        num_classes: number of classes.
    """
    counts = np.bincount(labels, minlength=num_classes) if labels.ndim == 1 else labels.sum(0)
    weights = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 1.0)).float()


def _read_weights(file: str, class_names: Sequence[str]) -> list[float]:
    """Read the weight of each class from a file with lines `class,weight`; returns them in the order of classes."""
    weights: dict[str, float] = {}
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip() or is_remark(line):
            continue
        name, _, text = (part.strip() for part in line.rpartition(","))
        try:
            weight = float(text)
        except ValueError:
            raise UserError(f"{file}:{number}: expected class,weight, found {line.strip()[:80]!r}") from None
        require(name in class_names, f"{file}:{number}: {name!r} is not a class of the dataset")
        require(name not in weights, f"{file}:{number}: class {name} has a second weight")
        weights[name] = weight
    missing = next((name for name in class_names if name not in weights), None)
    require(missing is None, f"{file}: class {missing} has no weight")
    return [weights[name] for name in class_names]


def _labels(dataset: Any, key: str) -> np.ndarray:
    """Return the labels of all videos. `key` is for the message."""
    labels = getattr(dataset, "labels", None)
    require(labels is not None, f"{key}: {type(dataset).__name__} has no attribute `labels`, the labels of all videos")
    return np.asarray(labels)
