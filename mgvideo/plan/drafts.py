"""The parts that schedules are made of: slots of a grid, phases that end on epochs, and the plan that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .plan import Base, Grid, Phase, Plan, Slot, require

LR_SCALING = ("linear", "sqrt", "none")  # how the LR follows the batch size


@dataclass(frozen=True)
class PhaseDraft:
    """A phase whose epochs are not yet converted to steps."""

    stage: int  # LR stage of the baseline, from 0
    slots: tuple[Slot, ...]  # successive steps cycle through these; the last one has the largest grid
    lr_factor: float  # multiplies the base LR
    end: float  # epoch of the run at which the phase ends
    weights: tuple[float, ...] = ()  # each step draws its slot with these weights; empty: steps cycle through the slots
    draw_seed: int = 0


def make_plan(name: str, base: Base, dataset_size: int, drafts: Sequence[PhaseDraft], bn_group: int = 8) -> Plan:
    """Return the plan of a run on `dataset_size` training clips.

    A phase of e epochs has e · dataset_size / (mean batch of its slots) steps, rounded, at least one. A phase that does
    not end after the phase before it is dropped, as in the reference implementation, and a note of the plan reports it.

    Args:
        name: name of the schedule.
        base: the baseline recipe.
        dataset_size: number of training clips.
        drafts: the phases in order.
        bn_group: clips that share batch statistics.

    Raises:
        UserError: recipe, schedule and dataset do not fit together.
    """
    too_few = f"the dataset has {dataset_size} training clips, fewer than base.batch_size={base.batch_size}"
    require(dataset_size >= base.batch_size, f"{too_few}: lower base.batch_size or add videos")
    phases: list[Phase] = []
    dropped: list[str] = []
    epoch, step = 0.0, 0
    for draft in drafts:
        if draft.end > epoch:
            steps = max(1, round((draft.end - epoch) * dataset_size / mean_batch(draft.slots, draft.weights)))
            phases.append(_make_phase(base, draft, bn_group, (epoch, draft.end), (step, step + steps)))
            epoch, step = phases[-1].epochs[1], phases[-1].steps[1]
        else:
            dropped.append(f"{draft.slots[-1].grid.name} of LR stage {draft.stage}")
    require(bool(phases), f"schedule.name={name}: no phase of this schedule ends after epoch 0: change its function")
    long_warmup = f"base.warmup_epochs={base.warmup_epochs} is longer than the run of {epoch:g} epochs"
    require(
        base.warmup_by == "steps" or base.warmup_epochs <= epoch, f"{long_warmup}: lower it, or base.warmup_by=steps"
    )
    return Plan(base, name, dataset_size, tuple(phases), tuple(_notes(phases, dropped, dataset_size)))


def make_slots(
    base: Base,
    factors: tuple[float, float] = (1.0, 1.0),
    short_factors: Sequence[float] = (),
    jitter: str = "paper",
    random_stride: bool = True,
    min_size: int = 32,
) -> tuple[Slot, ...]:
    """Return the slots of a grid: one for each crop of the short cycle, then the grid itself.

    Each slot has as many clips as make about the cost of a batch of the base.

    Args:
        base: the baseline recipe.
        factors: the grid's frames and crop size as fractions of the base's.
        short_factors: the short cycle's crop sizes as fractions of the base's; larger ones become the grid's crop.
        jitter: `paper`: a smaller crop lowers the lower end of `base.short_side`; `scaled`: both ends.
        random_stride: draw the stride; False: always the stride that covers the base's time span.
        min_size: smallest crop that the network accepts, pixels.

    Raises:
        UserError: a grid would have no frames or a crop below `min_size`.
    """
    frames, size = round(base.num_frames * factors[0]), round(base.crop_size * factors[1])
    crops = [min(round(base.crop_size * factor), size) for factor in short_factors]
    grids = [_make_grid(base, frames, crop, jitter, random_stride, min_size) for crop in (*crops, size)]
    return tuple(Slot(grid, base.batch_size * batch_multiplier(base, grid)) for grid in grids)


def _make_grid(base: Base, frames: int, size: int, jitter: str, random_stride: bool, min_size: int) -> Grid:
    """Return the grid of `frames` frames and a `size`-pixel crop, with its ranges of strides and short sides."""
    no_frames = f"the schedule scales base.num_frames={base.num_frames} to {frames} frames"
    require(frames >= 1, f"{no_frames}: raise it, or the frame factors of schedule.long_factors")
    too_small = f"the schedule scales base.crop_size={base.crop_size} to a {size}-pixel crop"
    remedy = f"below schedule.min_size={min_size}: raise base.crop_size or the schedule's size factors"
    require(size >= min_size, f"{too_small}, {remedy}")
    max_stride = base.frame_stride * (base.num_frames // frames)
    min_stride = base.frame_stride if random_stride else max_stride
    low = max(size, round(base.short_side[0] * size / base.crop_size))
    high = round(base.short_side[1] * size / base.crop_size) if jitter == "scaled" else base.short_side[1]
    return Grid(frames, size, (min_stride, max_stride), (low, max(low, high)))


def batch_multiplier(base: Base, grid: Grid) -> int:
    """Return how many clips of `grid` cost as much as one clip of the base's grid, rounded.

    The cost is the number of pixels, or what `base.batch_multipliers` says.

    Raises:
        UserError: `base.batch_multipliers` lacks the grid.
    """
    if not base.batch_multipliers:
        return round(base.num_frames * base.crop_size**2 / grid.volume)
    measured = dict(base.batch_multipliers)
    missing = f"schedule.batches=measured: schedule.benchmark has no grid {grid.name} (it has {', '.join(measured)})"
    require(grid.name in measured, f"{missing}: measure it too")
    return measured[grid.name]


def mean_multiplier(base: Base, slots: tuple[Slot, ...]) -> float:
    """Return the mean batch size of the slots divided by the base's."""
    return mean_batch(slots) / base.batch_size


def mean_batch(slots: Sequence[Slot], weights: Sequence[float] = ()) -> float:
    """Return the mean batch size of slots that steps cycle through, or draw with `weights`."""
    weights = weights or [1.0] * len(slots)
    return sum(weight * slot.batch for weight, slot in zip(weights, slots, strict=True)) / sum(weights)


def lr_decay(base: Base, stage: int) -> float:
    """Return the LR factor of an LR stage. It is 1 with a cosine or wsd, which `Plan.lr_at` computes."""
    return base.gamma**stage if base.lr_policy == "step" else 1.0


def lr_factor_of_batch(multiplier: float, rule: str) -> float:
    """Return the factor of the LR for a batch that is `multiplier` times as large.

    Args:
        multiplier: factor of the batch size.
        rule: `linear`, for SGD (Goyal et al., arXiv 1706.02677); `sqrt`, for Adam and AdamW (Malladi et al.,
            arXiv 2205.10287) and LAMB (You et al., arXiv 1904.00962); `none`.

    Raises:
        UserError: there is no such rule.
    """
    require(rule in LR_SCALING, f"lr_scaling={rule}: choose one of {', '.join(LR_SCALING)}")
    return {"linear": multiplier, "sqrt": math.sqrt(multiplier), "none": 1}[rule]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def _make_phase(
    base: Base, draft: PhaseDraft, bn_group: int, epochs: tuple[float, float], steps: tuple[int, int]
) -> Phase:
    """Return the phase of a draft.

    Its number of BN groups divides the batch of every slot. It is the largest such number whose groups have at least
    `bn_group` clips in the last slot's batch, or 1 if that batch is smaller.
    """
    full_slot = draft.slots[-1]
    common_divisor = math.gcd(*(slot.batch for slot in draft.slots))
    max_groups = max(1, full_slot.batch // bn_group)
    groups = max(n for n in range(1, max_groups + 1) if common_divisor % n == 0)
    multiplier = round(full_slot.batch / base.batch_size)
    return Phase(
        draft.stage, full_slot.grid, multiplier, draft.slots, draft.lr_factor, groups, epochs, steps, draft.weights,
        draft.draw_seed,
    )  # fmt: skip


def append_phase(
    plan: Plan, stage: int, slots: tuple[Slot, ...], lr_factor: float, steps: int, bn_group: int = 8
) -> Plan:
    """Return the plan with one more phase of `steps` steps at its end."""
    epoch = plan.epochs + steps * mean_batch(slots) / plan.dataset_size
    draft = PhaseDraft(stage, slots, lr_factor, epoch)
    phase = _make_phase(plan.base, draft, bn_group, (plan.epochs, epoch), (plan.steps, plan.steps + steps))
    return replace(plan, phases=(*plan.phases, phase))


def cut_plan(plan: Plan, step: int) -> Plan:
    """Return the plan up to a step: without the phases after it, and with the phase of the step shortened."""
    phases = [phase for phase in plan.phases if phase.steps[0] < step]
    last = phases[-1]
    if step < last.steps[1]:
        shortened = replace(last, steps=(last.steps[0], step), epochs=(last.epochs[0], plan.epoch(step)))
        phases[-1] = shortened
    return replace(plan, phases=tuple(phases))


def _notes(phases: list[Phase], dropped: list[str], dataset_size: int) -> Iterator[str]:
    if dropped:
        remedy = "set schedule.round_epochs=false to keep such phases"
        yield f"phases dropped because they round to 0 epochs: {', '.join(dropped)}; {remedy}"
    largest = max(slot.batch for phase in phases for slot in phase.slots)
    if largest > dataset_size:
        yield f"the largest batch, {largest} clips, exceeds the dataset's {dataset_size}: clips repeat within a step"
