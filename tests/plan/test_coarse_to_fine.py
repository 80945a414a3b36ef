"""Schedules that go through the grids once, branches of a cooldown, and grids drawn for each step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from recipes import KINETICS, KINETICS_CLIPS, SMALL

from mgvideo.errors import UserError
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.coarse_to_fine import cooldown, monotone, random
from mgvideo.plan.plan import Base, Plan
from mgvideo.plan.schedules import baseline


@pytest.mark.parametrize("policy", ["step", "cosine", "wsd"])
def test_monotone_goes_through_each_grid_once_with_equal_steps(policy: str) -> None:
    plan = monotone(replace(KINETICS, lr_policy=policy), KINETICS_CLIPS)
    steps = Counter[str]()
    for phase in plan.phases:
        steps[phase.grid.name] += phase.num_steps
    assert list(steps) == ["8x158", "16x158", "16x224", "32x224"]
    assert max(steps.values()) - min(steps.values()) <= 2
    volumes = [phase.grid.volume for phase in plan.phases]
    assert volumes == sorted(volumes)
    assert plan.epochs == pytest.approx(1.5 * 239)


def test_monotone_has_the_lr_of_the_baseline_at_the_same_fraction_of_the_steps() -> None:
    for policy in ("step", "cosine", "wsd"):
        base = replace(KINETICS, lr_policy=policy, warmup_epochs=0)
        plan, recipe = monotone(base, KINETICS_CLIPS), baseline(base, KINETICS_CLIPS)
        for fraction in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
            step = round(fraction * plan.steps)
            factor = {"8x158": 8, "16x158": 4, "16x224": 2, "32x224": 1}[plan.phase(step).grid.name]
            assert plan.lr(step) == pytest.approx(factor * recipe.lr(round(fraction * recipe.steps)), rel=1e-3)


def test_shares_of_monotone() -> None:
    base = replace(KINETICS, lr_policy="cosine")
    plan = monotone(base, KINETICS_CLIPS, shares=[1, 1, 2, 6], short_factors=[])
    assert [phase.num_steps / plan.steps for phase in plan.phases] == pytest.approx([0.1, 0.1, 0.2, 0.6], abs=1e-4)
    assert {len(phase.slots) for phase in plan.phases} == {1}
    equal = monotone(replace(base, crop_size=100, short_side=(114, 142)), KINETICS_CLIPS, shares="compute")
    costs = [
        sum(n * s.batch * s.grid.volume for n, s in zip(p.steps_per_slot(), p.slots, strict=True)) for p in equal.phases
    ]
    assert max(costs) / min(costs) < 1.001
    assert len({phase.num_steps for phase in equal.phases}) > 1


def test_wsd_is_constant_and_then_falls_linearly_from_the_last_milestone() -> None:
    plan = baseline(replace(KINETICS, lr_policy="wsd"), KINETICS_CLIPS)
    assert plan.lr_at(17) == pytest.approx(0.055)  # half of the warm-up, from 0.01 to 0.1
    assert [plan.lr_at(epoch) for epoch in (34, 100, 196, 217.5, 239)] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0])
    with pytest.raises(UserError, match=r"base\.lr_policy=wsd: give base\.lr_milestones"):
        replace(KINETICS, lr_policy="wsd", lr_milestones=())


def test_cooldown_has_the_base_grid_only_while_the_lr_decays() -> None:
    plan = cooldown(KINETICS, KINETICS_CLIPS, lr_scaling="none")
    assert [(p.stage, p.grid.name) for p in plan.phases] == [(0, "8x158"), (0, "16x158"), (0, "16x224"), (1, "32x224")]
    decay = plan.phases[-1]
    assert decay.num_steps == pytest.approx(0.2 * plan.steps, abs=2)
    constant = [plan.lr(step) for step in range(0, decay.steps[0], 1000) if plan.epoch(step) >= plan.warmup_end]
    assert set(constant) == {0.1}
    falling = [plan.lr(step) for step in range(decay.steps[0], plan.steps, 1000)]
    assert falling[0] == 0.1
    assert all(a > b for a, b in pairwise(falling))
    assert plan.lr(plan.steps - 1) < 1e-5


def test_cooldown_warms_up_by_steps_unless_the_recipe_says_otherwise() -> None:
    share = KINETICS.warmup_epochs / KINETICS.epochs
    by_default = cooldown(KINETICS, KINETICS_CLIPS)
    steps = sum(by_default.epoch(step) < by_default.warmup_end for step in range(by_default.steps))
    assert steps / by_default.steps == pytest.approx(share, abs=1e-3)
    assert cooldown(replace(KINETICS, warmup_by="epochs"), KINETICS_CLIPS).warmup_end == KINETICS.warmup_epochs


@pytest.mark.parametrize("warmup_by", ["epochs", "steps"])
def test_a_cooldown_branches_from_any_step_of_the_constant_part(warmup_by: str) -> None:
    base = replace(SMALL, warmup_by=warmup_by)
    plan = cooldown(base, 1024)
    last = plan.phases[-2].steps[1]
    for step in (20, 35, last):
        branch = cooldown(base, 1024, decay_from=step)
        assert [branch.slot(i) for i in range(step)] == [plan.slot(i) for i in range(step)]
        assert [branch.lr(i) for i in range(step)] == pytest.approx([plan.lr(i) for i in range(step)])
        decay = branch.phases[-1]
        assert (decay.grid.name, decay.steps) == ("16x64", (step, step + round(step / 4)))
        assert branch.lr(step) == SMALL.lr
        assert branch.lr(branch.steps - 1) < SMALL.lr / 4


@pytest.mark.parametrize("value", [0, 1, 100_000, "now", "later", 3.5, True])
def test_a_branch_from_elsewhere_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"^schedule\.decay_from="):
        cooldown(SMALL, 1024, decay_from=value)


def test_random_draws_the_grid_of_a_step_from_the_seed_and_the_step() -> None:
    plan = random(SMALL, 4096, weights=[1, 1, 2, 4])
    drawn = Counter(plan.slot(step).grid.name for step in range(plan.steps))
    total = sum(drawn.values())
    expected = {"4x45": 1 / 8, "8x45": 1 / 8, "8x64": 1 / 4, "16x64": 1 / 2}
    assert {name: count / total for name, count in drawn.items()} == pytest.approx(expected, abs=0.05)
    again, other = random(SMALL, 4096, weights=[1, 1, 2, 4]), random(SMALL, 4096, weights=[1, 1, 2, 4], seed=1)
    assert plan == again != other
    assert [plan.slot(i) for i in range(50)] != [other.slot(i) for i in range(50)]
    clips = [plan.clips_before(step) for step in range(plan.steps + 1)]
    assert [b - a for a, b in pairwise(clips)] == [plan.slot(step).batch for step in range(plan.steps)]
    assert clips[-1] == pytest.approx(plan.epochs * 4096, rel=0.05)


def test_the_draws_of_random_never_change() -> None:
    """A resumed run must draw the same grids with any version of the code."""
    plan = random(SMALL, 1024, seed=3)
    assert [plan.slot(step).grid.name for step in range(8)] == [
        "16x64", "8x45", "4x45", "8x64", "8x64", "16x64", "8x45", "8x64",
    ]  # fmt: skip


def test_ranks_share_the_clips_of_drawn_grids() -> None:
    plan = random(SMALL, 1024)
    sampler = ClipSampler(plan, 1024, seed=0)
    for step in range(5):
        whole = sampler.shard(step).clips
        assert [clip for rank in range(2) for clip in sampler.shard(step, rank, 2).clips] == list(whole)
        assert {clip.grid for clip in whole} == {plan.slot(step).grid}


@pytest.mark.parametrize("schedule", [monotone, cooldown, random])
@pytest.mark.parametrize("base", [SMALL, replace(SMALL, warmup_by="steps")], ids=["epochs", "steps"])
def test_json_round_trip(schedule: Any, base: Base) -> None:
    plan = schedule(base, 1024)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("schedule", "key", "value"),
    [
        (monotone, "shares", "epochs"),
        (monotone, "shares", [1, 2]),
        (monotone, "shares", [1, 2, 3, 0]),
        (monotone, "lr_scaling", "cubic"),
        (monotone, "long_factors", []),
        (monotone, "short_factors", [2]),
        (monotone, "epoch_factor", 0),
        (cooldown, "decay_share", 0),
        (cooldown, "decay_share", 1),
        (random, "weights", [1, 1]),
        (random, "weights", "even"),
        (random, "weights", [1, 1, 1, -1]),
        (random, "seed", -1),
        (random, "long_factors", [[1, 1], [0.5, 1]]),
    ],
)
def test_invalid_keys_raise(schedule: Any, key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^schedule.{key}"):
        schedule(SMALL, 1024, **{key: value})
