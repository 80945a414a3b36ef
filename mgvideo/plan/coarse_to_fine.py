"""Schedules that go through the grids once, coarse to fine: `monotone` and `cooldown`; and `random`, which draws them.

The multigrid schedules of the paper restart their cycle in every LR stage. These do not. They are made of the same
slots, phases and plans.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from mgvideo.errors import UserError

from .drafts import (
    LR_SCALING,
    PhaseDraft,
    append_phase,
    batch_multiplier,
    cut_plan,
    lr_decay,
    lr_factor_of_batch,
    make_plan,
    make_slots,
    mean,
    mean_multiplier,
)
from .plan import Base, Plan, Slot, finite_or_nan, require
from .schedules import LONG_FACTORS, SHORT_FACTORS, check_keys

SHARES = ("steps", "compute")


def monotone(
    base: Base,
    dataset_size: int,
    *,
    name: str = "monotone",
    epoch_factor: float = 1.5,
    long_factors: Sequence[Sequence[float]] = LONG_FACTORS,
    short_factors: Sequence[float] = SHORT_FACTORS,
    shares: str | Sequence[float] = "steps",
    jitter: str = "paper",
    lr_scaling: str = "linear",
    bn_group: int = 8,
    random_stride: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan that goes through the grids once, coarse to fine, over the whole run.

    The LR follows its own policy: where an LR milestone is at some fraction of the baseline's steps, it is at that
    fraction of this plan's steps too, on whatever grid that is.

    Args:
        base: the baseline recipe.
        dataset_size: number of training clips.
        name: name of the schedule.
        epoch_factor: the run's epochs divided by the recipe's.
        long_factors: the grids as fractions of the base's frames and crop size, coarse to fine.
        short_factors: crop sizes of the short cycle as fractions of the base's; empty: no short cycle.
        shares: `steps`: every grid gets equally many steps; `compute`: the same number of pixels, which differs from
            that by the rounding of batches; or a number for each grid: its share of the steps.
        jitter: `paper`: a smaller crop lowers the lower end of `base.short_side`; `scaled`: both ends.
        lr_scaling: how the LR follows the batch size of the grid, see `lr_factor_of_batch`.
        bn_group: clips that share batch statistics.
        random_stride: draw the stride; False: always the stride that covers the base's time span.
        min_size: smallest crop that the network accepts, pixels.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    _check(
        epoch_factor=epoch_factor, long_factors=long_factors, short_factors=short_factors, lr_scaling=lr_scaling,
        jitter=jitter, bn_group=bn_group, random_stride=random_stride, min_size=min_size,
    )  # fmt: skip
    base = keep_policy_milestones(base)
    grids = [make_slots(base, (f, s), short_factors, jitter, random_stride, min_size) for f, s in long_factors]
    drafts = _drafts(base, grids, _grid_ends(shares, grids), epoch_factor, lr_scaling)
    return make_plan(name, base, dataset_size, drafts, bn_group)


def cooldown(
    base: Base,
    dataset_size: int,
    *,
    name: str = "cooldown",
    epoch_factor: float = 1.5,
    long_factors: Sequence[Sequence[float]] = LONG_FACTORS[:-1],
    short_factors: Sequence[float] = SHORT_FACTORS,
    shares: str | Sequence[float] = "steps",
    decay_share: float = 0.2,
    decay_from: int | str | None = None,
    jitter: str = "paper",
    lr_scaling: str = "linear",
    bn_group: int = 8,
    random_stride: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan with coarse grids at a constant LR, and the base's grid only while the LR decays to 0.

    The LR policy is "wsd", whatever `base.lr_policy` is, with the decay over the last `decay_share` of the steps. The
    warm-up is "by steps" unless the recipe says otherwise: by epochs it is too short for the large batches.

    Args: as in `monotone`, and
        long_factors: the grids of the constant part.
        decay_share: share of the run's steps in which the LR decays.
        decay_from: the step, in the constant part, at which the decay starts. The plan equals that of the whole run up
            to that step. The decay is then as long as makes it `decay_share` of the shorter run.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    _check(
        epoch_factor=epoch_factor, long_factors=long_factors, short_factors=short_factors, lr_scaling=lr_scaling,
        jitter=jitter, bn_group=bn_group, random_stride=random_stride, min_size=min_size,
    )  # fmt: skip
    invalid = f"schedule.decay_share={decay_share}: give a number between 0 and 1"
    require(0 < finite_or_nan(decay_share) < 1, invalid)
    milestones = ((1 - decay_share) * base.epochs,)
    base = replace(base, lr_policy="wsd", lr_milestones=milestones, warmup_by=base.warmup_by or "steps")
    factors = [*long_factors, (1.0, 1.0)]
    grids = [make_slots(base, (f, s), short_factors, jitter, random_stride, min_size) for f, s in factors]
    ends = [(1 - decay_share) * end for end in _grid_ends(shares, grids[:-1])]
    plan = make_plan(name, base, dataset_size, _drafts(base, grids, [*ends, 1.0], epoch_factor, lr_scaling), bn_group)
    return plan if decay_from is None else _branch(plan, grids[-1], decay_from, decay_share, bn_group)


def random(
    base: Base,
    dataset_size: int,
    *,
    name: str = "random",
    epoch_factor: float = 1.5,
    long_factors: Sequence[Sequence[float]] = LONG_FACTORS,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    jitter: str = "paper",
    bn_group: int = 8,
    random_stride: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan that draws a grid for every step: one network for many test grids.

    The LR is that of the base's batch: as within a short cycle, it does not change from step to step.

    Args: as in `monotone`, and
        long_factors: the grids to draw from, as fractions of the base's frames and crop size; the finest one last.
        weights: how often each grid is drawn, relative to the others; None: all equally often.
        seed: seed of the draws. The grid of a step is a pure function of the plan, the seed and the step.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    _check(
        epoch_factor=epoch_factor, long_factors=long_factors, jitter=jitter, bn_group=bn_group,
        random_stride=random_stride, min_size=min_size,
    )  # fmt: skip
    require(isinstance(seed, int) and seed >= 0, f"schedule.seed={seed}: give a whole number from 0 up")
    require(len(long_factors) <= 256, "schedule.long_factors: give at most 256 grids")
    weights = tuple(
        _numbers("weights", weights, len(long_factors)) if weights is not None else [1.0] * len(long_factors)
    )
    base = keep_policy_milestones(base)
    slots = tuple(make_slots(base, (f, s), (), jitter, random_stride, min_size)[0] for f, s in long_factors)
    finest = max(slots, key=lambda slot: slot.grid.volume)
    last = f"schedule.long_factors: the finest grid, {finest.grid.name}, must be the last: move it to the end"
    require(slots[-1].grid.volume == finest.grid.volume, last)
    ends = [end * epoch_factor for end in base.lr_bounds[1:]]
    drafts = [PhaseDraft(stage, slots, lr_decay(base, stage), end, weights, seed) for stage, end in enumerate(ends)]
    return make_plan(name, base, dataset_size, drafts, bn_group)


def keep_policy_milestones(base: Base) -> Base:
    """Return the recipe with those LR milestones alone at which its LR policy changes: all, none or the last one."""
    kept = {"step": base.lr_milestones, "cosine": (), "wsd": base.lr_milestones[-1:]}
    return replace(base, lr_milestones=kept[base.lr_policy])


def _drafts(
    base: Base, grids: Sequence[tuple[Slot, ...]], grid_ends: Sequence[float], epoch_factor: float, lr_scaling: str
) -> list[PhaseDraft]:
    """Draft a phase for each stretch of the run with one grid and one LR stage.

    `grid_ends` are the fractions of the run's steps at which the grids end.
    """
    grid_ends = [round(end, 9) for end in grid_ends]
    stage_ends = [round(end / base.epochs, 9) for end in base.lr_bounds[1:]]
    drafts, start, epochs = [], 0.0, 0.0
    for end in sorted({*grid_ends, *stage_ends}):
        stage, slots = bisect_right(stage_ends, start), grids[bisect_right(grid_ends, start)]
        epochs += (end - start) * mean_multiplier(base, slots)
        lr_factor = lr_factor_of_batch(batch_multiplier(base, slots[-1].grid), lr_scaling)
        drafts.append(PhaseDraft(stage, slots, lr_decay(base, stage) * lr_factor, epochs))
        start = end
    return [replace(draft, end=base.epochs * epoch_factor * (draft.end / epochs)) for draft in drafts]


def _grid_ends(shares: str | Sequence[float], grids: Sequence[tuple[Slot, ...]]) -> list[float]:
    """Return the fractions of the steps at which each grid ends."""
    if shares == "steps":
        parts = [1.0] * len(grids)
    elif shares == "compute":
        parts = [1 / mean([slot.batch * slot.grid.volume for slot in slots]) for slots in grids]
    else:
        require(not isinstance(shares, str), f"schedule.shares={shares}: choose {' or '.join(SHARES)}, or give numbers")
        parts = _numbers("shares", shares, len(grids))
    return [end / sum(parts) for end in accumulate(parts)]


def _branch(plan: Plan, slots: tuple[Slot, ...], decay_from: int | str, decay_share: float, bn_group: int) -> Plan:
    """Return the plan of a run that leaves the constant part of `plan` at the step `decay_from`, and decays."""
    if decay_from == "now":
        raise UserError("schedule.decay_from=now: add resume=PATH, a checkpoint of the constant part; or give a step")
    last = max(phase.steps[1] for phase in plan.phases if phase.stage == 0)
    first = next((step for step in range(plan.steps) if plan.epoch(step) >= plan.warmup_end), plan.steps)
    outside = f"schedule.decay_from={decay_from}: the constant part of this plan is steps {max(1, first)} to {last}"
    require(isinstance(decay_from, int) and max(1, first) <= decay_from <= last, f"{outside}: choose one of these")
    assert isinstance(decay_from, int)
    trunk = cut_plan(plan, decay_from)
    if plan.base.warmup_by == "steps":  # as many of the steps that are left
        trunk = replace(trunk, base=replace(plan.base, warmup_epochs=plan.base.warmup_epochs * last / decay_from))
    lr_factor = plan.phases[-1].lr_factor
    steps = max(1, round(decay_from * decay_share / (1 - decay_share)))
    return append_phase(trunk, 1, slots, lr_factor, steps, bn_group)


def _check(lr_scaling: str = "linear", short_factors: Sequence[float] = SHORT_FACTORS, **values: Any) -> None:
    """Raise UserError if a value of a schedule's key is invalid. No short factors mean that there is no short cycle."""
    require(lr_scaling in LR_SCALING, f"schedule.lr_scaling={lr_scaling}: choose one of {', '.join(LR_SCALING)}")
    is_empty = isinstance(short_factors, Sequence) and not len(short_factors)
    check_keys(**values, **({} if is_empty else {"short_factors": short_factors}))


def _numbers(key: str, values: Any, count: int) -> list[float]:
    """Return a list of `count` numbers above 0. Raises UserError for anything else."""
    numbers = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else []
    valid = len(numbers) == count and all(finite_or_nan(number) > 0 for number in numbers)
    require(valid, f"schedule.{key}={values}: give {count} numbers above 0, one for each grid")
    return numbers
