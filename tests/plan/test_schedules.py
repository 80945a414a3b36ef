"""Every valid recipe makes a well-formed plan; an invalid one raises an error that names the key to change."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from recipes import ALL_SCHEDULES, KINETICS, KINETICS_CLIPS, SCHEDULES, SMALL, SSV2

from mgvideo.errors import UserError
from mgvideo.plan.coarse_to_fine import monotone
from mgvideo.plan.drafts import PhaseDraft, lr_factor_of_batch, make_plan, make_slots
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import Schedule, baseline, baseline_of, long, multigrid


def test_every_grid_of_a_stage_gets_the_same_steps() -> None:
    plan = multigrid(KINETICS, KINETICS_CLIPS, round_epochs=False)
    for stage in range(3):
        steps = [phase.num_steps for phase in plan.phases if phase.stage == stage]
        assert max(steps) - min(steps) <= 1
    assert plan.epochs == pytest.approx(1.5 * 239)


def test_long_cycle_alone_matches_hand_computed_epochs() -> None:
    """Multipliers 8, 4, 2, 1 split 60 epochs into 32, 16, 8, 4. Fine-tuning takes 30 / (15/4) = 8 epochs."""
    base = replace(KINETICS, epochs=90, lr_milestones=(60,), warmup_epochs=0)
    plan = long(base, KINETICS_CLIPS, epoch_factor=68 / 90, round_epochs=False)
    assert [phase.epochs[1] for phase in plan.phases] == pytest.approx([32, 48, 56, 60, 64, 68])
    assert [phase.lr_factor for phase in plan.phases] == pytest.approx([8, 4, 2, 1, 1, 0.1])
    assert {len(phase.slots) for phase in plan.phases} == {1}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("policy", ["step", "cosine", "wsd"])
@pytest.mark.parametrize("base", [KINETICS, SSV2, SMALL], ids=["kinetics", "something", "small"])
def test_any_plan_is_well_formed(base: Base, policy: str, schedule: Schedule) -> None:
    plan = schedule(replace(base, lr_policy=policy), 1024)
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


@pytest.mark.parametrize("schedule", ALL_SCHEDULES, ids=lambda schedule: schedule.__name__)
@pytest.mark.parametrize("policy", ["step", "cosine", "wsd"])
@pytest.mark.parametrize("epochs", [1.5, 3.5])  # of 10; the first milestone is at 4
def test_a_warm_up_by_steps_takes_the_same_share_of_steps_in_every_schedule(
    schedule: Schedule, policy: str, epochs: float
) -> None:
    base = replace(SMALL, warmup_by="steps", warmup_epochs=epochs, lr_policy=policy)
    plan = schedule(base, 4096)
    warm_up = [step for step in range(plan.steps) if plan.epoch(step) < plan.warmup_end]
    assert len(warm_up) / plan.steps == pytest.approx(epochs / 10, abs=0.03)
    assert plan.lr(0) == SMALL.warmup_lr
    rises = [plan.lr(step + 1) - plan.lr(step) for step in warm_up[1:20]]
    assert rises == pytest.approx([rises[0]] * len(rises)), "linear"
    assert rises[0] > 0


def test_a_warm_up_by_steps_rises_to_the_lr_of_each_grid() -> None:
    base = replace(SMALL, warmup_by="steps", warmup_epochs=4, lr_policy="cosine", lr_milestones=())
    plan = monotone(base, 4096)
    first, second = plan.phases[:2]
    assert plan.epoch(second.steps[0]) < plan.warmup_end < plan.epoch(second.steps[1])
    middle = second.steps[0]
    before, after = plan.lr(middle - 1), plan.lr(middle)
    assert before - base.warmup_lr == pytest.approx(2 * (after - base.warmup_lr), rel=0.02), "twice the batch"
    assert first.lr_factor == 2 * second.lr_factor


def test_warm_up_by_epochs_and_by_steps_are_the_same_in_the_whole_baseline() -> None:
    by_epochs, by_steps = (baseline(replace(KINETICS, warmup_by=by), KINETICS_CLIPS) for by in ("epochs", "steps"))
    steps = range(0, by_epochs.steps, 997)
    assert [by_steps.lr(step) for step in steps] == pytest.approx([by_epochs.lr(step) for step in steps])


def test_a_warm_up_longer_than_a_short_run_is_refused_by_epochs_and_shrinks_by_steps() -> None:
    base = replace(SMALL, warmup_epochs=3)
    with pytest.raises(UserError, match=r"longer than the run of 2 epochs: lower it, or base\.warmup_by=steps"):
        baseline(base, 1024, epoch_factor=0.2)
    assert baseline(replace(base, warmup_by="steps"), 1024, epoch_factor=0.2).warmup_end == pytest.approx(0.6)


def test_baseline_keeps_fractional_epochs() -> None:
    base = replace(SMALL, epochs=2.5, lr_milestones=(1.25,))
    plan = baseline(base, 1600)
    assert [phase.epochs for phase in plan.phases] == [(0, 1.25), (1.25, 2.5)]
    assert plan.steps == 250


def test_phases_that_round_to_zero_epochs_are_dropped_with_a_note() -> None:
    plan = multigrid(replace(SMALL, warmup_epochs=0), 1024, epoch_factor=0.6)
    assert len(plan.phases) < 10
    assert "schedule.round_epochs=false" in plan.notes[0]
    unrounded = multigrid(SMALL, 1024, round_epochs=False)
    assert len(unrounded.phases) == 10
    assert unrounded.notes == ()


def test_baseline_has_the_usual_cosine() -> None:
    base = replace(KINETICS, lr_policy="cosine")
    plan = baseline(base, KINETICS_CLIPS)
    assert plan.lr_at(239 / 2) == pytest.approx(0.05)
    assert plan.lr_at(239 / 3) == pytest.approx(0.075)
    assert plan.lr_at(239) == pytest.approx(0)


def test_a_cosine_after_the_warm_up_ends_at_the_final_lr() -> None:
    changes = {"lr_policy": "cosine", "lr": 1.6e-3, "final_lr": 1.6e-5, "warmup_lr": 1.6e-5, "warmup_epochs": 30}
    base = replace(KINETICS, cosine_after_warmup=True, **changes)
    plan = baseline(base, KINETICS_CLIPS)
    assert plan.lr_at(0) == 1.6e-5
    assert plan.lr_at(15) == pytest.approx((1.6e-3 + 1.6e-5) / 2)
    assert plan.lr_at(30) == pytest.approx(1.6e-3)
    assert plan.lr_at((30 + 239) / 2) == pytest.approx((1.6e-3 + 1.6e-5) / 2)
    for schedule in SCHEDULES:
        plan = schedule(base, KINETICS_CLIPS)
        assert plan.lr_at(plan.epochs) == pytest.approx(1.6e-5)
        assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(UserError, match=r"base\.final_lr=1 is above base\.lr=0\.0016"):
        replace(base, final_lr=1)
    with pytest.raises(UserError, match=r"base\.warmup_epochs=239 is longer"):
        replace(base, warmup_epochs=239)


def test_cosine_with_long_cycles() -> None:
    """At the start of a stage the cosine equals the baseline's. Within a stage it falls with the fraction of steps."""
    base = replace(KINETICS, lr_policy="cosine", warmup_epochs=0)
    recipe = baseline(base, KINETICS_CLIPS)
    plan = multigrid(base, KINETICS_CLIPS)
    starts = {phase.stage: phase for phase in reversed(plan.phases)}
    for stage, epoch in enumerate(base.lr_bounds[:-1]):
        phase = starts[stage]
        assert plan.lr(phase.steps[0]) == pytest.approx(phase.lr_factor * recipe.lr_at(epoch))
    decay = [plan.lr(step) / plan.phase(step).lr_factor for step in range(plan.steps)]
    assert all(a > b for a, b in pairwise(decay))
    assert decay[-1] < 1e-6
    third = plan.phases[2]  # the stage has four phases of equal length, so half of its steps are done
    assert plan.lr(third.steps[0]) / third.lr_factor == pytest.approx(recipe.lr_at(47), rel=0.01)
    assert [phase.lr_factor for phase in plan.phases] == [8, 4, 2, 1] * 3 + [1]


def test_ranges_of_short_sides_and_strides() -> None:
    coarse = multigrid(KINETICS, KINETICS_CLIPS).phases[0]
    assert [slot.grid.scales for slot in coarse.slots] == [(128, 320), (181, 320), (181, 320)]
    assert coarse.grid.strides == (2, 8)
    coarse = multigrid(KINETICS, KINETICS_CLIPS, jitter="scaled", random_stride=False).phases[0]
    assert [slot.grid.scales for slot in coarse.slots] == [(128, 160), (181, 226), (181, 226)]
    assert coarse.grid.strides == (8, 8)


def test_batch_norm_groups() -> None:
    groups = [phase.bn_groups for phase in multigrid(KINETICS, KINETICS_CLIPS).phases[:4]]
    assert groups == [64, 32, 16, 8]
    assert baseline(replace(KINETICS, batch_size=4), 1000).phases[0].bn_groups == 1
    assert baseline(replace(KINETICS, batch_size=36), 1000).phases[0].bn_groups == 4


def test_baseline_of_any_plan() -> None:
    for schedule in SCHEDULES:
        assert baseline_of(schedule(KINETICS, 1000)) == baseline(KINETICS, 1000)


def test_ablations() -> None:
    unscaled = multigrid(KINETICS, KINETICS_CLIPS, lr_scaling="none")
    assert {phase.lr_factor for phase in unscaled.phases[:4]} == {1}
    square_root = multigrid(KINETICS, KINETICS_CLIPS, lr_scaling="sqrt")
    assert [phase.lr_factor**2 for phase in square_root.phases[:4]] == pytest.approx([8, 4, 2, 1])
    without_fine_tuning = multigrid(KINETICS, KINETICS_CLIPS, fine_tune=False)
    assert [phase.stage for phase in without_fine_tuning.phases] == [stage for stage in range(4) for _ in range(4)]
    assert without_fine_tuning.phases[-4].lr_factor == pytest.approx(8e-3)


def test_a_single_lr_stage_runs_the_cycle_and_has_a_note() -> None:
    plan = multigrid(replace(KINETICS, lr_milestones=(), lr_policy="cosine"), KINETICS_CLIPS)
    assert [phase.multiplier for phase in plan.phases] == [8, 4, 2, 1]
    assert "base.lr_milestones" in plan.notes[0]


def test_short_cycle_crops_are_capped_at_the_long_cycle_crop() -> None:
    plan = multigrid(KINETICS, KINETICS_CLIPS, long_factors=[[0.5, 0.5], [1, 1]])
    assert [slot.grid.size for slot in plan.phases[0].slots] == [112, 112, 112]


def test_a_batch_larger_than_the_dataset_has_a_note() -> None:
    assert "clips repeat" in multigrid(SMALL, 100).notes[-1]


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
        ({"warmup_by": "clips"}, "base.warmup_by"),
        ({"batch_size": 2048}, "base.batch_size"),
        ({"epochs": 0.2, "lr_milestones": (), "warmup_epochs": 0}, "schedule.round_epochs"),
    ],
)
def test_invalid_recipes_raise(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        multigrid(replace(SMALL, **changes), 1024)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch_factor", 0),
        ("fine_tune", "maybe"),
        ("long_factors", None),
        ("long_factors", [0.5]),
        ("long_factors", [[0.5, -1]]),
        ("long_factors", [[0.5, 2]]),
        ("long_factors", [[0.5]]),
        ("long_factors", []),
        ("short_factors", 0.5),
        ("short_factors", [0]),
        ("short_factors", []),
        ("jitter", "none"),
        ("bn_group", 0),
        ("min_size", 1.5),
    ],
)
def test_invalid_schedules_raise(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^schedule.{key}"):
        multigrid(SMALL, 1024, **{key: value})


def test_a_custom_schedule_is_made_of_the_same_parts() -> None:
    drafts = [
        PhaseDraft(0, make_slots(SMALL, (0.5, 1.0)), 2, 4),
        PhaseDraft(1, make_slots(SMALL), 1, 4),
        PhaseDraft(1, make_slots(SMALL), 0.1, 6.5),
    ]
    plan = make_plan("half", SMALL, 1024, drafts)
    assert plan.schedule == "half"
    assert [(phase.grid.name, phase.batch, phase.num_steps) for phase in plan.phases] == [
        ("8x64", 32, 128),
        ("16x64", 16, 160),
    ]
    assert plan.notes[0].startswith("phases dropped because they round to 0 epochs: 16x64 of LR stage 1")
    with pytest.raises(UserError, match=r"schedule\.name=none: no phase of this schedule ends after epoch 0"):
        make_plan("none", SMALL, 1024, [])


def test_how_the_lr_follows_the_batch_size() -> None:
    assert [lr_factor_of_batch(16 / 64, rule) for rule in ("linear", "sqrt", "none")] == [0.25, 0.5, 1]
    with pytest.raises(UserError, match="lr_scaling=True: choose one of linear, sqrt, none"):
        lr_factor_of_batch(2, True)  # type: ignore[arg-type]
