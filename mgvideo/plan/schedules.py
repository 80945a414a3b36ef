"""The baseline and the multigrid schedules of Wu et al., CVPR 2020, section 3: functions that make plans from recipes.

A schedule is a callable `(base, dataset_size) → Plan`. The functions here become one when their other arguments, the
keys `schedule.*` of a config, are bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from .drafts import (
    LR_SCALING,
    PhaseDraft,
    batch_multiplier,
    lr_decay,
    lr_factor_of_batch,
    make_plan,
    make_slots,
    mean,
    mean_multiplier,
)
from .plan import Base, Plan, Slot, finite_or_nan, require

Schedule = Callable[[Base, int], Plan]  # (recipe, number of training clips) → plan

LONG_FACTORS = ((0.25, 0.5**0.5), (0.5, 0.5**0.5), (0.5, 1.0), (1.0, 1.0))  # of the base's frames and crop size
SHORT_FACTORS = (0.5, 0.5**0.5)  # of the base's crop size


def baseline(
    base: Base,
    dataset_size: int,
    *,
    name: str = "baseline",
    epoch_factor: float = 1.0,
    round_epochs: bool = False,
    bn_group: int = 8,
    min_size: int = 32,
) -> Plan:
    """Return the recipe unchanged: one phase per LR stage, all on the base's grid.

    Args:
        base: the baseline recipe.
        dataset_size: number of training clips.
        name: name of the schedule.
        epoch_factor: the run's epochs divided by the recipe's.
        round_epochs: phases end on whole epochs, rounded down.
        bn_group: clips that share batch statistics.
        min_size: smallest crop that the network accepts, pixels.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    check_keys(epoch_factor=epoch_factor, round_epochs=round_epochs, bn_group=bn_group, min_size=min_size)
    drafts = _base_grid_drafts(base, make_slots(base, min_size=min_size), epoch_factor, round_epochs)
    return make_plan(name, base, dataset_size, drafts, bn_group)


def short(
    base: Base,
    dataset_size: int,
    *,
    name: str = "short",
    epoch_factor: float = 1.5,
    short_factors: Sequence[float] = SHORT_FACTORS,
    jitter: str = "paper",
    bn_group: int = 8,
    round_epochs: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan of the short cycle alone: the crop size changes every step, the number of frames never.

    Args:
        base, dataset_size, name, epoch_factor, round_epochs, bn_group, min_size: as in `baseline`.
        short_factors: crop sizes of the cycle as fractions of the base's; the base's crop is added as the last.
        jitter: `paper`: a smaller crop lowers the lower end of `base.short_side`; `scaled`: both ends.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    check_keys(
        epoch_factor=epoch_factor, short_factors=short_factors, jitter=jitter, bn_group=bn_group,
        round_epochs=round_epochs, min_size=min_size,
    )  # fmt: skip
    slots = make_slots(base, short_factors=short_factors, jitter=jitter, min_size=min_size)
    drafts = _base_grid_drafts(base, slots, epoch_factor, round_epochs)
    return make_plan(name, base, dataset_size, drafts, bn_group)


def long(
    base: Base,
    dataset_size: int,
    *,
    name: str = "long",
    epoch_factor: float = 1.5,
    long_factors: Sequence[Sequence[float]] = LONG_FACTORS,
    jitter: str = "paper",
    lr_scaling: str = "linear",
    fine_tune: bool = True,
    bn_group: int = 8,
    random_stride: bool = True,
    round_epochs: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan of the long cycle alone: every LR stage goes from coarse clips in large batches to fine ones.

    Args:
        base, dataset_size, name, epoch_factor, bn_group, min_size: as in `baseline`.
        long_factors: the cycle's grids as fractions of the base's frames and crop size.
        jitter: as in `short`.
        lr_scaling: how the LR follows the batch size of the long cycle, see `lr_factor_of_batch`.
        fine_tune: train the last LR stage on the base's grid; False: it runs the cycle too.
        random_stride: draw the stride; False: always the stride that covers the base's time span.
        round_epochs: phases end on whole epochs, as in the paper.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    check_keys(
        epoch_factor=epoch_factor, long_factors=long_factors, jitter=jitter, lr_scaling=lr_scaling, fine_tune=fine_tune,
        bn_group=bn_group, random_stride=random_stride, round_epochs=round_epochs, min_size=min_size,
    )  # fmt: skip
    cycle = [make_slots(base, (f, s), (), jitter, random_stride, min_size) for f, s in long_factors]
    fine_tune_slots = make_slots(base, min_size=min_size) if fine_tune else None
    drafts = _long_cycle_drafts(base, cycle, fine_tune_slots, epoch_factor, lr_scaling, round_epochs)
    return _note_single_stage(make_plan(name, base, dataset_size, drafts, bn_group))


def multigrid(
    base: Base,
    dataset_size: int,
    *,
    name: str = "multigrid",
    epoch_factor: float = 1.5,
    long_factors: Sequence[Sequence[float]] = LONG_FACTORS,
    short_factors: Sequence[float] = SHORT_FACTORS,
    jitter: str = "paper",
    lr_scaling: str = "linear",
    fine_tune: bool = True,
    bn_group: int = 8,
    random_stride: bool = True,
    round_epochs: bool = True,
    min_size: int = 32,
) -> Plan:
    """Return a plan of the multigrid method: the short cycle within every grid of the long cycle.

    Args: as in `long` and `short`. Crops of the short cycle are at most as large as that of the long cycle's grid.

    Raises:
        UserError: a value is invalid, or recipe, schedule and dataset do not fit together.
    """
    check_keys(
        epoch_factor=epoch_factor, long_factors=long_factors, short_factors=short_factors, jitter=jitter,
        lr_scaling=lr_scaling, fine_tune=fine_tune, bn_group=bn_group, random_stride=random_stride,
        round_epochs=round_epochs, min_size=min_size,
    )  # fmt: skip
    cycle = [make_slots(base, (f, s), short_factors, jitter, random_stride, min_size) for f, s in long_factors]
    base_slots = make_slots(base, (1.0, 1.0), short_factors, jitter, random_stride, min_size)
    drafts = _long_cycle_drafts(base, cycle, base_slots if fine_tune else None, epoch_factor, lr_scaling, round_epochs)
    return _note_single_stage(make_plan(name, base, dataset_size, drafts, bn_group))


def baseline_of(plan: Plan) -> Plan:
    """Return the baseline plan of the same recipe. Its BN groups are as large as those of the plan's last phase."""
    last = plan.phases[-1]
    return baseline(plan.base, plan.dataset_size, bn_group=last.batch // last.bn_groups, min_size=1)


def _base_grid_drafts(base: Base, slots: tuple[Slot, ...], epoch_factor: float, round_epochs: bool) -> list[PhaseDraft]:
    """Draft one phase per LR stage, all with the same slots. `round_epochs` rounds their ends down."""
    ends = [end * epoch_factor for end in base.lr_bounds[1:]]
    if round_epochs:
        ends = [math.floor(end) for end in ends]
    _check_epochs(base, ends[-1], epoch_factor)
    return [PhaseDraft(stage, slots, lr_decay(base, stage), end) for stage, end in enumerate(ends)]


def _long_cycle_drafts(
    base: Base,
    cycle: Sequence[tuple[Slot, ...]],
    fine_tune_slots: tuple[Slot, ...] | None,
    epoch_factor: float,
    lr_scaling: str,
    round_epochs: bool,
) -> list[PhaseDraft]:
    """Draft phases that run all long-cycle grids, for equally many steps, in every LR stage but the last.

    With `fine_tune_slots`, the last LR stage is fine-tuning on these; else it runs the cycle too. The number of
    fine-tuning steps is reduced by the same factor as that of the stages before. With LR milestones, the first half of
    fine-tuning keeps the LR of the previous stage; with a cosine it is one phase. If the recipe has a single LR stage,
    that stage runs the cycle and there is no fine-tuning.
    """
    cycle_stages = list(pairwise(base.lr_bounds))
    fine_tune_stage = cycle_stages.pop() if fine_tune_slots and len(cycle_stages) > 1 else None
    multipliers = [mean_multiplier(base, slots) for slots in cycle]
    drafts = []
    epochs = 0.0
    for stage, (start, end) in enumerate(cycle_stages):
        for slots, multiplier in zip(cycle, multipliers, strict=True):
            epochs += (end - start) * multiplier / sum(multipliers)
            lr_factor = lr_decay(base, stage) * lr_factor_of_batch(batch_multiplier(base, slots[-1].grid), lr_scaling)
            drafts.append(PhaseDraft(stage, slots, lr_factor, epochs))
    if fine_tune_stage and fine_tune_slots:
        start, end = fine_tune_stage
        step_saving = mean(multipliers)  # baseline's steps divided by this plan's, in the stages before
        epochs += (end - start) / step_saving * mean_multiplier(base, fine_tune_slots)
        drafts.append(PhaseDraft(len(cycle_stages), fine_tune_slots, lr_decay(base, len(cycle_stages)), epochs))
    ends = [base.epochs * epoch_factor * (draft.end / epochs) for draft in drafts]
    if round_epochs:
        ends = [round(end) for end in ends]
    _check_epochs(base, ends[-1], epoch_factor)
    drafts = [replace(draft, end=end) for draft, end in zip(drafts, ends, strict=True)]
    return _split_fine_tuning(base, drafts, round_epochs) if fine_tune_stage and base.lr_policy == "step" else drafts


def _check_epochs(base: Base, end: float, epoch_factor: float) -> None:
    """Raise UserError if the run ends at epoch 0 because its epochs are rounded."""
    no_epoch = f"base.epochs={base.epochs} with schedule.epoch_factor={epoch_factor} rounds to 0 epochs"
    require(end > 0, f"{no_epoch}: raise one of them, or set schedule.round_epochs=false")


def _split_fine_tuning(base: Base, drafts: list[PhaseDraft], round_epochs: bool) -> list[PhaseDraft]:
    """Split the last phase, fine-tuning, into halves. The first half keeps the LR of the previous stage."""
    *cycle_drafts, fine_tuning = drafts
    middle = (cycle_drafts[-1].end + fine_tuning.end) / 2
    first_half_end = math.floor(middle) if round_epochs else middle
    first_half = replace(fine_tuning, lr_factor=lr_decay(base, fine_tuning.stage - 1), end=first_half_end)
    return [*cycle_drafts, first_half, fine_tuning]


def _note_single_stage(plan: Plan) -> Plan:
    """Add a note to a long-cycle plan that has a single LR stage."""
    if plan.phases[-1].stage > 0:
        return plan
    remedy = "set base.lr_milestones for more stages"
    note = f"only one LR stage: the long cycle runs once, without fine-tuning; {remedy}"
    return replace(plan, notes=(*plan.notes, note))


def check_keys(**values: Any) -> None:
    """Raise UserError if a value of a schedule's key is invalid. The message names the key."""
    for key, value in values.items():
        setting = f"schedule.{key}={value}"
        if key == "long_factors":
            _check_long_factors(value)
        elif key == "short_factors":
            _check_short_factors(value)
        elif key == "epoch_factor":
            require(finite_or_nan(value) > 0, f"{setting}: give a number above 0")
        elif key == "jitter":
            require(value in ("paper", "scaled"), f"{setting}: choose paper or scaled")
        elif key == "lr_scaling":
            require(value in LR_SCALING, f"{setting}: choose one of {', '.join(LR_SCALING)}")
        elif key in ("bn_group", "min_size"):
            require(isinstance(value, int) and value >= 1, f"{setting}: give a whole number from 1 up")
        else:
            require(isinstance(value, bool), f"{setting}: choose true or false")


def _check_long_factors(pairs: Any) -> None:
    remedy = "give pairs [frames, size] above 0 and up to 1"
    require(_is_list(pairs), f"schedule.long_factors={pairs}: {remedy}")
    require(bool(pairs), "schedule.long_factors is empty: give pairs [frames, size], or use schedule=short")
    for pair in pairs:
        factors = list(pair) if _is_list(pair) else [pair]
        valid = len(factors) == 2 and all(0 < finite_or_nan(factor) <= 1 for factor in factors)
        require(valid, f"schedule.long_factors: {factors}: {remedy}")


def _check_short_factors(factors: Any) -> None:
    remedy = "give factors of the crop size above 0 and up to 1"
    require(_is_list(factors), f"schedule.short_factors={factors}: {remedy}")
    require(bool(factors), "schedule.short_factors is empty: give factors, or use schedule=long")
    for factor in factors:
        require(0 < finite_or_nan(factor) <= 1, f"schedule.short_factors: {factor}: {remedy}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
