"""Make plans from recipes: the baseline and the multigrid schedules of Wu et al., CVPR 2020, section 3."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from .plan import Base, Grid, Phase, Plan, Slot, finite_or_nan, require


@dataclass(frozen=True)
class Schedule:
    """How clip shape and batch size vary over a run: `schedule.*` of a config. With neither cycle it is the baseline.

    Factors multiply the base's frames and crop size.

    Raises:
        UserError: a value is invalid. The message names the key to change.
    """

    name: str
    long: bool = False  # every LR stage goes from coarse grids to fine ones
    short: bool = False  # the crop size changes every step
    epoch_factor: float = 1.5  # the run's epochs divided by the baseline's
    long_factors: tuple[tuple[float, float], ...] = ((0.25, 0.5**0.5), (0.5, 0.5**0.5), (0.5, 1.0), (1.0, 1.0))
    short_factors: tuple[float, ...] = (0.5, 0.5**0.5)  # of the base's crop; the phase's full crop is added as the last
    jitter: str = "paper"  # smaller crops scale the shortest short side; "scaled": the longest too
    lr_scaling: bool = True  # scale the LR with the batch of the long cycle
    fine_tune: bool = True  # train the last LR stage on the base's grid
    bn_group: int = 8  # clips that share batch statistics
    random_stride: bool = True  # draw the stride; False: always the stride that covers the base's time span
    round_epochs: bool = True  # phases end on whole epochs, as in the paper
    min_size: int = 32  # smallest crop that the network accepts, pixels

    def __post_init__(self) -> None:
        object.__setattr__(self, "long_factors", tuple(tuple(pair) for pair in self.long_factors))
        object.__setattr__(self, "short_factors", tuple(self.short_factors))
        for pair in self.long_factors:
            valid = len(pair) == 2 and all(0 < finite_or_nan(factor) <= 1 for factor in pair)
            require(valid, f"schedule.long_factors: {list(pair)}: give pairs [frames, size] above 0 and up to 1")
        for factor in self.short_factors:
            valid = 0 < finite_or_nan(factor) <= 1
            require(valid, f"schedule.short_factors: {factor}: give factors of the crop size above 0 and up to 1")
        has_long_factors = bool(self.long_factors) or not self.long
        require(has_long_factors, "schedule.long_factors is empty: give pairs [frames, size], or use schedule=short")
        has_short_factors = bool(self.short_factors) or not self.short
        require(has_short_factors, "schedule.short_factors is empty: give factors, or use schedule=long")
        for key in ("long", "short", "lr_scaling", "fine_tune", "random_stride", "round_epochs"):
            value = getattr(self, key)
            require(isinstance(value, bool), f"schedule.{key}={value}: choose true or false")
        positive = finite_or_nan(self.epoch_factor) > 0
        require(positive, f"schedule.epoch_factor={self.epoch_factor}: give a number above 0")
        for key in ("bn_group", "min_size"):
            value = getattr(self, key)
            require(isinstance(value, int) and value >= 1, f"schedule.{key}={value}: give a whole number from 1 up")
        require(self.jitter in ("paper", "scaled"), f"schedule.jitter={self.jitter}: choose paper or scaled")


BASELINE = Schedule("baseline", epoch_factor=1.0, round_epochs=False)


@dataclass(frozen=True)
class _PhaseDraft:
    """A phase whose epochs are not yet converted to steps."""

    stage: int
    slots: tuple[Slot, ...]
    lr_factor: float
    end: float  # epoch of the run at which the phase ends


def make_plan(base: Base, schedule: Schedule, dataset_size: int) -> Plan:
    """Return the plan of a run on `dataset_size` training clips.

    A phase of e epochs has e · dataset_size / (mean batch of its slots) steps, rounded, at least one. With
    `schedule.round_epochs`, a phase that rounds to zero epochs is dropped, as in the reference implementation, and a
    note of the plan reports it.

    Raises:
        UserError: recipe, schedule and dataset do not fit together.
    """
    too_few = f"the dataset has {dataset_size} training clips, fewer than base.batch_size={base.batch_size}"
    require(dataset_size >= base.batch_size, f"{too_few}: lower base.batch_size or add videos")
    drafts = _long_cycle_drafts(base, schedule) if schedule.long else _base_grid_drafts(base, schedule)
    phases: list[Phase] = []
    dropped: list[str] = []
    epoch, step = 0.0, 0
    for draft in drafts:
        if draft.end > epoch:
            steps = max(1, round((draft.end - epoch) * dataset_size / _mean([slot.batch for slot in draft.slots])))
            phases.append(_make_phase(base, schedule, draft, (epoch, draft.end), (step, step + steps)))
            epoch, step = phases[-1].epochs[1], phases[-1].steps[1]
        else:
            dropped.append(f"{draft.slots[-1].grid.name} of LR stage {draft.stage}")
    no_epoch = f"base.epochs={base.epochs} with schedule.epoch_factor={schedule.epoch_factor} rounds to 0 epochs"
    require(bool(phases), f"{no_epoch}: raise one of them, or set schedule.round_epochs=false")
    long_warmup = f"base.warmup_epochs={base.warmup_epochs} is longer than the run of {epoch:g} epochs"
    require(base.warmup_epochs <= epoch, f"{long_warmup}: lower it")
    notes = tuple(_notes(schedule, phases, dropped, dataset_size))
    return Plan(base, schedule.name, dataset_size, tuple(phases), notes)


def baseline_of(plan: Plan) -> Plan:
    """Return the baseline plan of the same recipe. Its BN groups are as large as those of the plan's last phase."""
    last = plan.phases[-1]
    schedule = replace(BASELINE, min_size=1, bn_group=last.batch // last.bn_groups)
    return make_plan(plan.base, schedule, plan.dataset_size)


def scale_lr(recipe_batch: int, recipe_lr: float, batch: int) -> float:
    """Return the LR for a global batch of `batch` clips by the linear scaling rule (Goyal et al., arXiv 1706.02677)."""
    return recipe_lr * batch / recipe_batch


def _base_grid_drafts(base: Base, schedule: Schedule) -> list[_PhaseDraft]:
    """Draft one phase per LR stage, all on the base's grid. `schedule.round_epochs` rounds their ends down."""
    slots = _make_slots(base, schedule, (1.0, 1.0))
    ends = [end * schedule.epoch_factor for end in base.lr_bounds[1:]]
    if schedule.round_epochs:
        ends = [math.floor(end) for end in ends]
    return [_PhaseDraft(stage, slots, _lr_decay(base, stage), end) for stage, end in enumerate(ends)]


def _long_cycle_drafts(base: Base, schedule: Schedule) -> list[_PhaseDraft]:
    """Draft phases that run all long-cycle grids, for equally many steps, in every LR stage but the last.

    With `schedule.fine_tune`, the last LR stage is fine-tuning on the base's grid; else it runs the cycle too. The
    number of fine-tuning steps is reduced by the same factor as that of the stages before. With LR milestones, the
    first half of fine-tuning keeps the LR of the previous stage; with a cosine it is one phase. If the recipe has a
    single LR stage, that stage runs the cycle and there is no fine-tuning.
    """
    cycle_stages = list(pairwise(base.lr_bounds))
    fine_tune_stage = cycle_stages.pop() if schedule.fine_tune and len(cycle_stages) > 1 else None
    cycle = [_make_slots(base, schedule, factors) for factors in schedule.long_factors]
    multipliers = [_mean_multiplier(base, slots) for slots in cycle]
    drafts = []
    epochs = 0.0
    for stage, (start, end) in enumerate(cycle_stages):
        for slots, multiplier in zip(cycle, multipliers, strict=True):
            epochs += (end - start) * multiplier / sum(multipliers)
            lr_factor = _lr_decay(base, stage) * (_batch_multiplier(base, slots[-1].grid) if schedule.lr_scaling else 1)
            drafts.append(_PhaseDraft(stage, slots, lr_factor, epochs))
    if fine_tune_stage:
        start, end = fine_tune_stage
        slots = _make_slots(base, schedule, (1.0, 1.0))
        step_saving = _mean(multipliers)  # baseline's steps divided by this plan's, in the stages before
        epochs += (end - start) / step_saving * _mean_multiplier(base, slots)
        drafts.append(_PhaseDraft(len(cycle_stages), slots, _lr_decay(base, len(cycle_stages)), epochs))
    ends = [base.epochs * schedule.epoch_factor * (draft.end / epochs) for draft in drafts]
    if schedule.round_epochs:
        ends = [round(end) for end in ends]
    drafts = [replace(draft, end=end) for draft, end in zip(drafts, ends, strict=True)]
    return _split_fine_tuning(base, schedule, drafts) if fine_tune_stage and base.lr_policy == "step" else drafts


def _split_fine_tuning(base: Base, schedule: Schedule, drafts: list[_PhaseDraft]) -> list[_PhaseDraft]:
    """Split the last phase, fine-tuning, into halves. The first half keeps the LR of the previous stage."""
    *cycle_drafts, fine_tuning = drafts
    middle = (cycle_drafts[-1].end + fine_tuning.end) / 2
    first_half_end = math.floor(middle) if schedule.round_epochs else middle
    first_half = replace(fine_tuning, lr_factor=_lr_decay(base, fine_tuning.stage - 1), end=first_half_end)
    return [*cycle_drafts, first_half, fine_tuning]


def _lr_decay(base: Base, stage: int) -> float:
    """Return the LR factor of an LR stage. It is 1 with a cosine, which `Plan.lr_at` computes."""
    return base.gamma**stage if base.lr_policy == "step" else 1.0


def _make_slots(base: Base, schedule: Schedule, factors: tuple[float, float]) -> tuple[Slot, ...]:
    """Return the slots of a long-cycle grid: the short cycle's crops, capped at the grid's crop, then the grid."""
    frames, size = round(base.num_frames * factors[0]), round(base.crop_size * factors[1])
    crops = [min(round(base.crop_size * factor), size) for factor in schedule.short_factors] if schedule.short else []
    grids = [_make_grid(base, schedule, frames, crop) for crop in (*crops, size)]
    return tuple(Slot(grid, base.batch_size * _batch_multiplier(base, grid)) for grid in grids)


def _make_grid(base: Base, schedule: Schedule, frames: int, size: int) -> Grid:
    """Return the grid of `frames` frames and a `size`-pixel crop, with its ranges of strides and short sides."""
    no_frames = f"the schedule scales base.num_frames={base.num_frames} to {frames} frames"
    require(frames >= 1, f"{no_frames}: raise it, or the frame factors of schedule.long_factors")
    too_small = f"the schedule scales base.crop_size={base.crop_size} to a {size}-pixel crop"
    remedy = f"below schedule.min_size={schedule.min_size}: raise base.crop_size or the schedule's size factors"
    require(size >= schedule.min_size, f"{too_small}, {remedy}")
    max_stride = base.frame_stride * (base.num_frames // frames)
    min_stride = base.frame_stride if schedule.random_stride else max_stride
    low = max(size, round(base.short_side[0] * size / base.crop_size))
    high = round(base.short_side[1] * size / base.crop_size) if schedule.jitter == "scaled" else base.short_side[1]
    return Grid(frames, size, (min_stride, max_stride), (low, max(low, high)))


def _batch_multiplier(base: Base, grid: Grid) -> int:
    """Return how many clips of `grid` have as many pixels as one clip of the base's grid, rounded."""
    return round(base.num_frames * base.crop_size**2 / grid.volume)


def _mean_multiplier(base: Base, slots: tuple[Slot, ...]) -> float:
    """Return the mean batch size of the slots divided by the base's."""
    return _mean([slot.batch for slot in slots]) / base.batch_size


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)


def _make_phase(
    base: Base, schedule: Schedule, draft: _PhaseDraft, epochs: tuple[float, float], steps: tuple[int, int]
) -> Phase:
    """Return the phase of a draft.

    Its number of BN groups divides the batch of every slot. It is the largest such number whose groups have at least
    `schedule.bn_group` clips in the long-cycle grid's batch, or 1 if that batch is smaller.
    """
    full_slot = draft.slots[-1]
    common_divisor = math.gcd(*(slot.batch for slot in draft.slots))
    max_groups = max(1, full_slot.batch // schedule.bn_group)
    groups = max(n for n in range(1, max_groups + 1) if common_divisor % n == 0)
    multiplier = _batch_multiplier(base, full_slot.grid)
    return Phase(draft.stage, full_slot.grid, multiplier, draft.slots, draft.lr_factor, groups, epochs, steps)


def _notes(schedule: Schedule, phases: list[Phase], dropped: list[str], dataset_size: int) -> Iterator[str]:
    if dropped:
        remedy = "set schedule.round_epochs=false to keep such phases"
        yield f"phases dropped because they round to 0 epochs: {', '.join(dropped)}; {remedy}"
    largest = max(slot.batch for phase in phases for slot in phase.slots)
    if largest > dataset_size:
        yield f"the largest batch, {largest} clips, exceeds the dataset's {dataset_size}: clips repeat within a step"
    if schedule.long and phases[-1].stage == 0:
        remedy = "set base.lr_milestones for more stages"
        yield f"only one LR stage: the long cycle runs once, without fine-tuning; {remedy}"
