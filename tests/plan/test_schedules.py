"""Every valid recipe makes a well-formed plan; an invalid one raises an error that names the key to change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from recipes import KINETICS, KINETICS_CLIPS, LONG, MULTIGRID, SCHEDULES, SMALL, SSV2

from mgvideo.errors import UserError
from mgvideo.plan.plan import Base
from mgvideo.plan.schedules import BASELINE, Schedule, baseline_of, make_plan, scale_lr


def test_every_grid_of_a_stage_gets_the_same_steps() -> None:
    plan = make_plan(KINETICS, replace(MULTIGRID, round_epochs=False), KINETICS_CLIPS)
    for stage in range(3):
        steps = [phase.num_steps for phase in plan.phases if phase.stage == stage]
        assert max(steps) - min(steps) <= 1
    assert plan.epochs == pytest.approx(1.5 * 239)


def test_long_cycle_alone_matches_hand_computed_epochs() -> None:
    """Multipliers 8, 4, 2, 1 split 60 epochs into 32, 16, 8, 4. Fine-tuning takes 30 / (15/4) = 8 epochs."""
    base = replace(KINETICS, epochs=90, lr_milestones=(60,), warmup_epochs=0)
    plan = make_plan(base, replace(LONG, epoch_factor=68 / 90, round_epochs=False), KINETICS_CLIPS)
    assert [phase.epochs[1] for phase in plan.phases] == pytest.approx([32, 48, 56, 60, 64, 68])
    assert [phase.lr_factor for phase in plan.phases] == pytest.approx([8, 4, 2, 1, 1, 0.1])
    assert {len(phase.slots) for phase in plan.phases} == {1}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("policy", ["step", "cosine"])
@pytest.mark.parametrize("base", [KINETICS, SSV2, SMALL], ids=["kinetics", "something", "small"])
def test_any_plan_is_well_formed(base: Base, policy: str, schedule: Schedule) -> None:
    plan = make_plan(replace(base, lr_policy=policy), schedule, 1024)
    assert plan.phases[0].steps[0] == 0
    assert plan.phases[0].epochs[0] == 0
    for before, after in pairwise(plan.phases):
        assert before.steps[1] == after.steps[0]
        assert before.epochs[1] == after.epochs[0]
    for phase in plan.phases:
        assert phase.num_steps >= 1
        assert phase.epochs[1] > phase.epochs[0]
        for slot in phase.slots:
            assert slot.batch % phase.bn_groups == 0
            assert slot.grid.volume <= phase.grid.volume
            assert slot.grid.size <= slot.grid.scales[0] <= slot.grid.scales[1]
            cost = slot.batch * slot.grid.volume / (base.batch_size * base.num_frames * base.crop_size**2)
            assert cost == pytest.approx(1, abs=0.1)
        mean = sum(slot.batch for slot in phase.slots) / len(phase.slots)
        assert phase.num_steps == pytest.approx((phase.epochs[1] - phase.epochs[0]) * 1024 / mean, abs=1)


def test_baseline_keeps_fractional_epochs() -> None:
    base = replace(SMALL, epochs=2.5, lr_milestones=(1.25,))
    plan = make_plan(base, BASELINE, 1600)
    assert [phase.epochs for phase in plan.phases] == [(0, 1.25), (1.25, 2.5)]
    assert plan.steps == 250


def test_phases_that_round_to_zero_epochs_are_dropped_with_a_note() -> None:
    plan = make_plan(replace(SMALL, warmup_epochs=0), replace(MULTIGRID, epoch_factor=0.6), 1024)
    assert len(plan.phases) < 10
    assert "schedule.round_epochs=false" in plan.notes[0]
    unrounded = make_plan(SMALL, replace(MULTIGRID, round_epochs=False), 1024)
    assert len(unrounded.phases) == 10
    assert unrounded.notes == ()


def test_baseline_has_the_usual_cosine() -> None:
    base = replace(KINETICS, lr_policy="cosine")
    plan = make_plan(base, BASELINE, KINETICS_CLIPS)
    assert plan.lr_at(239 / 2) == pytest.approx(0.05)
    assert plan.lr_at(239 / 3) == pytest.approx(0.075)
    assert plan.lr_at(239) == pytest.approx(0)


def test_cosine_with_long_cycles() -> None:
    """At the start of a stage the cosine equals the baseline's. Within a stage it falls with the fraction of steps."""
    base = replace(KINETICS, lr_policy="cosine", warmup_epochs=0)
    baseline = make_plan(base, BASELINE, KINETICS_CLIPS)
    plan = make_plan(base, MULTIGRID, KINETICS_CLIPS)
    starts = {phase.stage: phase for phase in reversed(plan.phases)}
    for stage, epoch in enumerate(base.lr_bounds[:-1]):
        phase = starts[stage]
        assert plan.lr(phase.steps[0]) == pytest.approx(phase.lr_factor * baseline.lr_at(epoch))
    decay = [plan.lr(step) / plan.phase(step).lr_factor for step in range(plan.steps)]
    assert all(a > b for a, b in pairwise(decay))
    assert decay[-1] < 1e-6
    third = plan.phases[2]  # the stage has four phases of equal length, so half of its steps are done
    assert plan.lr(third.steps[0]) / third.lr_factor == pytest.approx(baseline.lr_at(47), rel=0.01)
    assert [phase.lr_factor for phase in plan.phases] == [8, 4, 2, 1] * 3 + [1]


def test_ranges_of_short_sides_and_strides() -> None:
    coarse = make_plan(KINETICS, MULTIGRID, KINETICS_CLIPS).phases[0]
    assert [slot.grid.scales for slot in coarse.slots] == [(128, 320), (181, 320), (181, 320)]
    assert coarse.grid.strides == (2, 8)
    schedule = replace(MULTIGRID, jitter="scaled", random_stride=False)
    coarse = make_plan(KINETICS, schedule, KINETICS_CLIPS).phases[0]
    assert [slot.grid.scales for slot in coarse.slots] == [(128, 160), (181, 226), (181, 226)]
    assert coarse.grid.strides == (8, 8)


def test_batch_norm_groups() -> None:
    groups = [phase.bn_groups for phase in make_plan(KINETICS, MULTIGRID, KINETICS_CLIPS).phases[:4]]
    assert groups == [64, 32, 16, 8]
    assert make_plan(replace(KINETICS, batch_size=4), BASELINE, 1000).phases[0].bn_groups == 1
    assert make_plan(replace(KINETICS, batch_size=36), BASELINE, 1000).phases[0].bn_groups == 4


def test_baseline_of_any_plan() -> None:
    for schedule in SCHEDULES:
        assert baseline_of(make_plan(KINETICS, schedule, 1000)) == make_plan(
            KINETICS, replace(BASELINE, min_size=1), 1000
        )


def test_ablations() -> None:
    unscaled = make_plan(KINETICS, replace(MULTIGRID, lr_scaling=False), KINETICS_CLIPS)
    assert {phase.lr_factor for phase in unscaled.phases[:4]} == {1}
    without_fine_tuning = make_plan(KINETICS, replace(MULTIGRID, fine_tune=False), KINETICS_CLIPS)
    assert [phase.stage for phase in without_fine_tuning.phases] == [stage for stage in range(4) for _ in range(4)]
    assert without_fine_tuning.phases[-4].lr_factor == pytest.approx(8e-3)


def test_a_single_lr_stage_runs_the_cycle_and_has_a_note() -> None:
    plan = make_plan(replace(KINETICS, lr_milestones=(), lr_policy="cosine"), MULTIGRID, KINETICS_CLIPS)
    assert [phase.multiplier for phase in plan.phases] == [8, 4, 2, 1]
    assert "base.lr_milestones" in plan.notes[0]


def test_short_cycle_crops_are_capped_at_the_long_cycle_crop() -> None:
    plan = make_plan(KINETICS, replace(MULTIGRID, long_factors=[[0.5, 0.5], [1, 1]]), KINETICS_CLIPS)
    assert [slot.grid.size for slot in plan.phases[0].slots] == [112, 112, 112]


def test_a_batch_larger_than_the_dataset_has_a_note() -> None:
    assert "clips repeat" in make_plan(SMALL, MULTIGRID, 100).notes[-1]


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 0}, "base.batch_size"),
        ({"batch_size": 1.5}, "base.batch_size"),
        ({"num_frames": -1}, "base.num_frames"),
        ({"num_frames": 1}, "schedule.long_factors"),
        ({"crop_size": 48}, "schedule.min_size"),
        ({"crop_size": 128}, "base.short_side"),
        ({"short_side": (84, 64)}, "base.short_side"),
        ({"short_side": (64,)}, "base.short_side"),
        ({"epochs": 0}, "base.epochs"),
        ({"epochs": float("nan")}, "base.epochs"),
        ({"epochs": "ten"}, "base.epochs"),
        ({"epochs": 7}, "base.epochs"),
        ({"lr": 0}, "base.lr"),
        ({"gamma": -0.1}, "base.gamma"),
        ({"lr_milestones": (0, 4)}, "base.lr_milestones"),
        ({"lr_milestones": (4, 16)}, "base.lr_milestones"),
        ({"lr_milestones": (4, 4)}, "base.lr_milestones"),
        ({"warmup_epochs": -1}, "base.warmup_epochs"),
        ({"warmup_epochs": 16}, "base.warmup_epochs"),
        ({"lr_policy": "linear"}, "base.lr_policy"),
        ({"batch_size": 2048}, "base.batch_size"),
        ({"epochs": 0.2, "lr_milestones": (), "warmup_epochs": 0}, "schedule.round_epochs"),
    ],
)
def test_invalid_recipes_raise(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        make_plan(replace(SMALL, **changes), MULTIGRID, 1024)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch_factor", 0),
        ("long", "maybe"),
        ("long_factors", [[0.5, -1]]),
        ("long_factors", [[0.5, 2]]),
        ("long_factors", [[0.5]]),
        ("long_factors", []),
        ("short_factors", [0]),
        ("short_factors", []),
        ("jitter", "none"),
        ("bn_group", 0),
        ("min_size", 1.5),
    ],
)
def test_invalid_schedules_raise(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"schedule.{key}"):
        replace(MULTIGRID, **{key: value})


def test_linear_scaling() -> None:
    assert scale_lr(64, 0.1, 16) == pytest.approx(0.025)
