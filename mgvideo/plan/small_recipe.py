"""Compute a recipe from the number of training videos and the network's clips, for `base.*` keys that are null.

`recipe=folder` leaves these keys null. A small dataset needs many epochs of small batches: a fixed number of epochs
would give it too few steps to learn anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .drafts import lr_factor_of_batch
from .plan import Plan

BASELINE_STEPS = 1200  # at least, of the baseline; multigrid takes about 3.5 times fewer
MIN_EPOCHS = 30
SMALL_DATASET = 640  # videos; a smaller dataset has batches of one BN group
SMALL_BATCH, LARGE_BATCH = 8, 16  # clips
# (LR from pretrained weights, LR from random ones) at LARGE_BATCH, by the optimizer's rule. SGD: as in recipe=finetune
# and recipe=motion. AdamW: VideoMAE's on UCF101, 2.5e-4 at 256 clips, and MViTv2's, 1.6e-3 at 512 clips.
LRS = {"linear": (0.025, 0.05), "sqrt": (2.5e-4 / 16**0.5, 1.6e-3 / 32**0.5)}
SMALL_CLIP = (16, 2, 64)  # frames, stride, crop size of networks without published weights
MILESTONES, WARMUP = (0.5, 0.8), 0.1  # fractions of the epochs
SHORT_SIDE = (8 / 7, 10 / 7)  # of the crop size: [256, 320] for 224
MIN_STEPS = 200  # plans with fewer steps get a warning


def fit_clip(published_clip: Sequence[int] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return num_frames, frame_stride, crop_size and short_side of the base grid.

    Args:
        published_clip: frames, stride and crop size of the network's published weights; None if there are none.
        given: values of `base.*` that are set; they are kept, and short_side follows crop_size.
    """
    frames, stride, size = published_clip or SMALL_CLIP
    clip = _keep_given({"num_frames": frames, "frame_stride": stride, "crop_size": size}, given)
    return {**clip, **_keep_given({"short_side": [round(factor * clip["crop_size"]) for factor in SHORT_SIDE]}, given)}


def fit_training(
    dataset_size: int, pretrained: bool, given: Mapping[str, Any], lr_scaling: str = "linear"
) -> dict[str, Any]:
    """Return batch_size, epochs, lr, lr_milestones, warmup_epochs and warmup_lr for a dataset.

    The epochs are as many as give the baseline `BASELINE_STEPS` steps, at least `MIN_EPOCHS`.

    Args:
        dataset_size: number of training videos.
        pretrained: whether training starts from weights, which takes a smaller LR.
        given: values of `base.*` that are set; they are kept, and the others follow them.
        lr_scaling: how the optimizer's LR follows the batch size, see `lr_factor_of_batch`.
    """
    default_batch = SMALL_BATCH if dataset_size < SMALL_DATASET else LARGE_BATCH
    batch = _keep_given({"batch_size": min(default_batch, dataset_size)}, given)["batch_size"]
    epochs = math.ceil(BASELINE_STEPS * batch / max(1, dataset_size))
    epochs = _keep_given({"epochs": max(MIN_EPOCHS, epochs)}, given)["epochs"]
    pretrained_lr, scratch_lr = LRS.get(lr_scaling, LRS["linear"])
    factor = lr_factor_of_batch(batch / LARGE_BATCH, lr_scaling)
    lr = _keep_given({"lr": (pretrained_lr if pretrained else scratch_lr) * factor}, given)["lr"]
    rest = {
        "lr_milestones": [round(fraction * epochs, 2) for fraction in MILESTONES],
        "warmup_epochs": round(WARMUP * epochs, 2),
        "warmup_lr": lr / 10,
    }
    return {"batch_size": batch, "epochs": epochs, "lr": lr, **_keep_given(rest, given)}


def few_steps_warning(plan: Plan) -> str | None:
    """Return a warning if the plan has fewer than `MIN_STEPS` steps, else None."""
    if plan.steps >= MIN_STEPS:
        return None
    epochs, batch = plan.base.epochs, plan.base.batch_size
    return (
        f"the plan has only {plan.steps} steps, in which a network learns little: raise base.epochs={epochs:g} or "
        f"lower base.batch_size={batch}"
    )


def _keep_given(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value if given.get(key) is None else given[key] for key, value in values.items()}
