"""Phase, slot, epoch and LR of every step of a plan, and the conversion to JSON."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from recipes import SMALL

from mgvideo.errors import UserError
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import multigrid

PLAN = multigrid(SMALL, 1000, round_epochs=False)


def test_steps_cycle_through_slots_and_phases_are_consecutive() -> None:
    phase = PLAN.phases[1]
    first = phase.steps[0]
    assert [PLAN.slot(first + i) for i in range(6)] == list(phase.slots) * 2
    assert PLAN.phase(first) is phase
    assert PLAN.phase(first - 1) is PLAN.phases[0]
    assert PLAN.phase(PLAN.steps - 1) is PLAN.phases[-1]


@pytest.mark.parametrize("step", [-1, PLAN.steps])
def test_steps_outside_the_plan_raise(step: int) -> None:
    with pytest.raises(IndexError, match=str(step)):
        PLAN.phase(step)


def test_clips_before_counts_every_step() -> None:
    clips = 0
    for step in range(PLAN.steps):
        assert PLAN.clips_before(step) == clips
        clips += PLAN.slot(step).batch
    assert PLAN.clips_before(PLAN.steps) == clips
    for phase in PLAN.phases:
        epochs = phase.epochs[1] - phase.epochs[0]
        assert phase.clips() == pytest.approx(epochs * 1000, abs=max(slot.batch for slot in phase.slots))


def test_epochs_increase_to_the_end_of_the_plan() -> None:
    epochs = [PLAN.epoch(step) for step in range(PLAN.steps + 1)]
    assert all(a < b for a, b in pairwise(epochs))
    assert (epochs[0], epochs[-1]) == (0, PLAN.epochs)
    assert [PLAN.epoch(phase.steps[0]) for phase in PLAN.phases] == [phase.epochs[0] for phase in PLAN.phases]


def test_lr_rises_in_warmup_and_then_follows_the_phases() -> None:
    assert PLAN.lr(0) == SMALL.warmup_lr
    steps_after_warmup = [step for step in range(PLAN.steps) if PLAN.epoch(step) >= SMALL.warmup_epochs]
    for step in steps_after_warmup:
        assert PLAN.lr(step) == pytest.approx(SMALL.lr * PLAN.phase(step).lr_factor)
    warmup_lrs = [PLAN.lr(step) for step in range(steps_after_warmup[0] + 1)]
    assert warmup_lrs == sorted(warmup_lrs)


def test_json_round_trip() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


def test_json_without_a_plan_raises() -> None:
    with pytest.raises(UserError, match="not a plan"):
        Plan.from_json({"phases": []})


def test_base_converts_lists_to_tuples() -> None:

    assert Base(16, 16, 64, 2, [64, 84], 10, 0.1, [4, 8], 0.1, 0.5, 0.01) == SMALL
