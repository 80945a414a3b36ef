"""A plan answers for every step, and survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from recipes import MULTIGRID, SMALL

from mgvideo.errors import UserError
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import make_plan

PLAN = make_plan(SMALL, replace(MULTIGRID, round_epochs=False), 1000)


def test_slots_go_round_and_phases_follow() -> None:
    phase = PLAN.phases[1]
    first = phase.steps[0]
    assert [PLAN.slot(first + i) for i in range(6)] == list(phase.slots) * 2
    assert PLAN.phase(first) is phase
    assert PLAN.phase(first - 1) is PLAN.phases[0]
    assert PLAN.phase(PLAN.steps - 1) is PLAN.phases[-1]


@pytest.mark.parametrize("step", [-1, PLAN.steps])
def test_steps_outside_the_plan(step: int) -> None:
    with pytest.raises(IndexError, match=str(step)):
        PLAN.phase(step)


def test_clips_before_counts_every_step() -> None:
    consumed = 0
    for step in range(PLAN.steps):
        assert PLAN.clips_before(step) == consumed
        consumed += PLAN.slot(step).batch
    assert PLAN.clips_before(PLAN.steps) == consumed
    for phase in PLAN.phases:
        epochs = phase.epochs[1] - phase.epochs[0]
        assert phase.clips() == pytest.approx(epochs * 1000, abs=max(slot.batch for slot in phase.slots))


def test_epochs_rise_to_the_plans_end() -> None:
    epochs = [PLAN.epoch(step) for step in range(PLAN.steps + 1)]
    assert all(a < b for a, b in pairwise(epochs))
    assert (epochs[0], epochs[-1]) == (0, PLAN.epochs)
    assert [PLAN.epoch(phase.steps[0]) for phase in PLAN.phases] == [phase.epochs[0] for phase in PLAN.phases]


def test_rates_by_step() -> None:
    assert PLAN.lr(0) == SMALL.warmup_lr
    after = [step for step in range(PLAN.steps) if PLAN.epoch(step) >= SMALL.warmup_epochs]
    for step in after:
        assert PLAN.lr(step) == pytest.approx(SMALL.lr * PLAN.phase(step).lr_factor)
    warmup = [PLAN.lr(step) for step in range(after[0] + 1)]
    assert warmup == sorted(warmup)


def test_json_round_trip() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


def test_json_of_something_else() -> None:
    with pytest.raises(UserError, match="not a plan"):
        Plan.from_json({"phases": []})


def test_configs_may_hold_lists() -> None:
    assert Base(16, 16, 64, 2, [64, 84], 10, 0.1, [4, 8], 0.1, 0.5, 0.01) == SMALL
