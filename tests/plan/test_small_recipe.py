"""The recipe that follows the number of videos and the network's clips."""

from __future__ import annotations

import pytest

from mgvideo.plan.plan import Base
from mgvideo.plan.schedules import baseline, long, multigrid, short
from mgvideo.plan.small_recipe import MIN_STEPS, few_steps_warning, fit_clip, fit_training


def fitted_base(videos: int, published_clip: list[int] | None = None, pretrained: bool = False) -> Base:
    """Return the recipe that `recipe=folder` computes."""
    return Base(**fit_clip(published_clip, {}), **fit_training(videos, pretrained, {}), gamma=0.1)


@pytest.mark.parametrize("videos", [2, 7, 8, 10, 48, 100, 639, 640, 5_000, 240_000])
@pytest.mark.parametrize("schedule", [baseline, short, long, multigrid])
@pytest.mark.parametrize("published_clip", [None, [32, 2, 224], [8, 8, 224], [16, 2, 112]])
def test_every_dataset_size_gets_enough_steps(videos: int, schedule: type, published_clip: list[int] | None) -> None:
    plan = schedule(fitted_base(videos, published_clip), videos, round_epochs=False)
    assert plan.steps >= MIN_STEPS
    assert few_steps_warning(plan) is None


def test_recipe_of_fifty_videos() -> None:
    base = fitted_base(48)
    assert (base.batch_size, base.epochs, base.lr) == (8, 200, 0.025)
    assert (base.lr_milestones, base.warmup_epochs) == ((100, 160), 20)
    assert (base.num_frames, base.frame_stride, base.crop_size, base.short_side) == (16, 2, 64, (73, 91))


def test_large_dataset_and_weights_get_the_fine_tuning_recipe() -> None:
    base = fitted_base(5_000, [32, 2, 224], pretrained=True)
    assert (base.batch_size, base.epochs, base.lr, base.lr_milestones) == (16, 30, 0.025, (15, 24))
    assert (base.num_frames, base.frame_stride, base.crop_size, base.short_side) == (32, 2, 224, (256, 320))


def test_adamw_gets_the_lrs_of_its_recipes_by_the_square_root_of_the_batch() -> None:
    given = {"batch_size": 256}
    assert fit_training(5_000, True, given, "sqrt")["lr"] == pytest.approx(2.5e-4)
    assert fit_training(5_000, False, {"batch_size": 512}, "sqrt")["lr"] == pytest.approx(1.6e-3)
    assert fit_training(5_000, True, given)["lr"] == pytest.approx(0.4)


def test_given_values_are_kept_and_the_others_follow() -> None:
    training = fit_training(48, False, {"batch_size": 4, "epochs": 60.0, "warmup_epochs": 0.0})
    assert training == {
        "batch_size": 4,
        "epochs": 60,
        "lr": 0.0125,
        "lr_milestones": [30, 48],
        "warmup_epochs": 0,
        "warmup_lr": 0.00125,
    }
    clip = fit_clip(None, {"crop_size": 112, "num_frames": 8})
    assert clip == {"num_frames": 8, "frame_stride": 2, "crop_size": 112, "short_side": [128, 160]}


def test_a_plan_of_few_steps_gets_a_warning() -> None:
    plan = multigrid(Base(16, 32, 224, 2, (256, 320), 30, 0.025, (15, 24), 0.1, 2, 0.001), 48, round_epochs=False)
    warning = few_steps_warning(plan)
    assert warning is not None
    assert warning.startswith(f"the plan has only {plan.steps} steps")
    assert "raise base.epochs=30 or lower base.batch_size=16" in warning
