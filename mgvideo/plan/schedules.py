"""Schedules turn a recipe into a plan: the multigrid method (Wu et al., CVPR 2020, section 3) and the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from .plan import Base, Grid, Phase, Plan, Slot, finite_or_nan, require


@dataclass(frozen=True)
class Schedule:
    """What varies over a run: `schedule.*` of a config. With neither cycle it is the baseline.

    Factors are shares of the base's frames and crop size. Raises UserError, naming the key to change.
    """

    name: str
    long: bool = False  # coarse grids first, in every LR stage
    short: bool = False  # crops that change every step
    epoch_factor: float = 1.5  # the run's epochs over the baseline's
    long_factors: tuple[tuple[float, float], ...] = ((0.25, 0.5**0.5), (0.5, 0.5**0.5), (0.5, 1.0), (1.0, 1.0))
    short_factors: tuple[float, ...] = (0.5, 0.5**0.5)  # of the base's crop; the phase's own crop follows
    jitter: str = "paper"  # a smaller crop lowers the shortest short side, "scaled": the longest as well
    lr_scaling: bool = True  # LR grows with the long cycle's batch
    fine_tune: bool = True  # the last LR stage runs on the base's grid
    bn_group: int = 8  # clips that share batch statistics
    random_stride: bool = True  # else: the one stride that spans the base's time
    round_epochs: bool = True  # phases end on whole epochs, as the paper's do
    min_size: int = 32  # smallest crop that the network takes

    def __post_init__(self) -> None:
        object.__setattr__(self, "long_factors", tuple(tuple(pair) for pair in self.long_factors))
        object.__setattr__(self, "short_factors", tuple(self.short_factors))
        for pair in self.long_factors:
            valid = len(pair) == 2 and all(0 < finite_or_nan(factor) <= 1 for factor in pair)
            require(
                valid, f"schedule.long_factors: {list(pair)} is no pair of shares (frames, size) above 0 and up to 1"
            )
        for factor in self.short_factors:
            valid = 0 < finite_or_nan(factor) <= 1
            require(valid, f"schedule.short_factors: {factor} is no share of the crop above 0 and up to 1")
        require(
            bool(self.long_factors) or not self.long, "schedule.long_factors is empty: give pairs, or schedule=short"
        )
        require(
            bool(self.short_factors) or not self.short, "schedule.short_factors is empty: give some, or schedule=long"
        )
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
class _Stretch:
    """A phase to be: what it trains on, before its end is rounded and epochs become steps."""

    stage: int
    slots: tuple[Slot, ...]
    lr_factor: float
    end: float  # epochs, cumulative


def make_plan(base: Base, schedule: Schedule, dataset_size: int) -> Plan:
    """The plan of a run on `dataset_size` training clips.

    A phase of e epochs takes e · dataset_size / (mean batch of its slots) steps, rounded, at least one. Where phases
    end on whole epochs, one that is left with none is dropped, as in the reference, and a note says so. Raises
    UserError where recipe, schedule and dataset do not fit together.
    """
    few = f"the dataset has {dataset_size} training clips, fewer than base.batch_size={base.batch_size}"
    require(dataset_size >= base.batch_size, f"{few}: lower base.batch_size or add videos")
    stretches = _long_cycle(base, schedule) if schedule.long else _one_grid(base, schedule)
    phases: list[Phase] = []
    dropped: list[str] = []
    epoch, step = 0.0, 0
    for stretch in stretches:
        if stretch.end > epoch:
            steps = max(1, round((stretch.end - epoch) * dataset_size / _mean([slot.batch for slot in stretch.slots])))
            phases.append(_phase(base, schedule, stretch, (epoch, stretch.end), (step, step + steps)))
            epoch, step = phases[-1].epochs[1], phases[-1].steps[1]
        else:
            dropped.append(f"{stretch.slots[-1].grid.name} of LR stage {stretch.stage}")
    none = f"base.epochs={base.epochs} with schedule.epoch_factor={schedule.epoch_factor} rounds to no epoch at all"
    require(bool(phases), f"{none}: raise one of them, or set schedule.round_epochs=false")
    warmup = f"base.warmup_epochs={base.warmup_epochs} does not fit in a run of {epoch:g} epochs"
    require(base.warmup_epochs <= epoch, f"{warmup}: lower it")
    return Plan(
        base, schedule.name, dataset_size, tuple(phases), tuple(_notes(schedule, phases, dropped, dataset_size))
    )


def baseline_of(plan: Plan) -> Plan:
    """Return the plan of the same recipe without any cycle, with BN groups as large as in the plan's last phase."""
    last = plan.phases[-1]
    schedule = replace(BASELINE, min_size=1, bn_group=last.batch // last.bn_groups)
    return make_plan(plan.base, schedule, plan.dataset_size)


def scale_lr(recipe_batch: int, recipe_lr: float, batch: int) -> float:
    """The learning rate at another global batch, by the linear rule (Goyal et al., arXiv 1706.02677)."""
    return recipe_lr * batch / recipe_batch


def _one_grid(base: Base, schedule: Schedule) -> list[_Stretch]:
    """The base's grid throughout, one stretch an LR stage; whole epochs are rounded down."""
    slots = _slots(base, schedule, (1.0, 1.0))
    ends = [end * schedule.epoch_factor for end in base.lr_bounds[1:]]
    if schedule.round_epochs:
        ends = [math.floor(end) for end in ends]
    return [_Stretch(stage, slots, _decay(base, stage), end) for stage, end in enumerate(ends)]


def _long_cycle(base: Base, schedule: Schedule) -> list[_Stretch]:
    """All long-cycle grids in every LR stage, each for as many steps as the others, but in the last: fine-tuning.

    Fine-tuning runs on the base's grid and saves as many steps as the stages before. Its first half keeps their last
    LR; a cosine needs no halves. A recipe of one LR stage has none before, so its only stage runs the cycle.
    """
    cycled = list(pairwise(base.lr_bounds))
    tuned = cycled.pop() if schedule.fine_tune and len(cycled) > 1 else None
    cycle = [_slots(base, schedule, factors) for factors in schedule.long_factors]
    means = [_mean_multiplier(base, slots) for slots in cycle]
    stretches = []
    epochs = 0.0
    for stage, (start, end) in enumerate(cycled):
        for slots, mean in zip(cycle, means, strict=True):
            epochs += (end - start) * mean / sum(means)
            lr_factor = _decay(base, stage) * (_multiplier(base, slots[-1].grid) if schedule.lr_scaling else 1)
            stretches.append(_Stretch(stage, slots, lr_factor, epochs))
    if tuned:
        slots = _slots(base, schedule, (1.0, 1.0))
        saving = _mean(means)  # baseline's steps for each step of the stages before
        epochs += (tuned[1] - tuned[0]) / saving * _mean_multiplier(base, slots)
        stretches.append(_Stretch(len(cycled), slots, _decay(base, len(cycled)), epochs))
    ends = [base.epochs * schedule.epoch_factor * (stretch.end / epochs) for stretch in stretches]
    if schedule.round_epochs:
        ends = [round(end) for end in ends]
    stretches = [replace(stretch, end=end) for stretch, end in zip(stretches, ends, strict=True)]
    return _in_halves(base, schedule, stretches) if tuned and base.lr_policy == "step" else stretches


def _in_halves(base: Base, schedule: Schedule, stretches: list[_Stretch]) -> list[_Stretch]:
    """Splits the last stretch, fine-tuning: its first half keeps the LR of the stage before."""
    *others, last = stretches
    middle = (others[-1].end + last.end) / 2
    first = replace(last, end=math.floor(middle) if schedule.round_epochs else middle)
    return [*others, replace(first, lr_factor=_decay(base, last.stage - 1)), last]


def _decay(base: Base, stage: int) -> float:
    """What an LR stage multiplies the LR by; under a cosine nothing, the plan reads the wave itself."""
    return base.gamma**stage if base.lr_policy == "step" else 1.0


def _slots(base: Base, schedule: Schedule, factors: tuple[float, float]) -> tuple[Slot, ...]:
    """The slots of a long-cycle grid: the short cycle's crops, none above the grid's own, then the grid itself."""
    frames, size = round(base.num_frames * factors[0]), round(base.crop_size * factors[1])
    crops = [min(round(base.crop_size * factor), size) for factor in schedule.short_factors] if schedule.short else []
    grids = [_grid(base, schedule, frames, crop) for crop in (*crops, size)]
    return tuple(Slot(grid, base.batch_size * _multiplier(base, grid)) for grid in grids)


def _grid(base: Base, schedule: Schedule, frames: int, size: int) -> Grid:
    fewer = f"a grid of {frames} frames comes out of base.num_frames={base.num_frames}"
    require(frames >= 1, f"{fewer}: raise it, or the frame factors of schedule.long_factors")
    smaller = f"a crop of {size} pixels comes out of base.crop_size={base.crop_size}, below schedule.min_size={schedule.min_size}"
    require(size >= schedule.min_size, f"{smaller}: raise base.crop_size or the size factors of the schedule")
    widest = base.frame_stride * (base.num_frames // frames)
    low = max(size, round(base.short_side[0] * size / base.crop_size))
    high = round(base.short_side[1] * size / base.crop_size) if schedule.jitter == "scaled" else base.short_side[1]
    return Grid(frames, size, (base.frame_stride if schedule.random_stride else widest, widest), (low, max(low, high)))


def _multiplier(base: Base, grid: Grid) -> int:
    """How many times more clips of `grid` than of the base's cost the same."""
    return round(base.num_frames * base.crop_size**2 / grid.volume)


def _mean_multiplier(base: Base, slots: tuple[Slot, ...]) -> float:
    return _mean([slot.batch for slot in slots]) / base.batch_size


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)


def _phase(
    base: Base, schedule: Schedule, stretch: _Stretch, epochs: tuple[float, float], steps: tuple[int, int]
) -> Phase:
    own = stretch.slots[-1]
    common = math.gcd(*(slot.batch for slot in stretch.slots))
    most = max(1, own.batch // schedule.bn_group)
    groups = max(n for n in range(1, most + 1) if common % n == 0)
    multiplier = _multiplier(base, own.grid)
    return Phase(stretch.stage, own.grid, multiplier, stretch.slots, stretch.lr_factor, groups, epochs, steps)


def _notes(schedule: Schedule, phases: list[Phase], dropped: list[str], dataset_size: int) -> Iterator[str]:
    if dropped:
        kept = "schedule.round_epochs=false keeps such phases"
        yield f"left out, too short for a whole epoch: {', '.join(dropped)}; {kept}"
    largest = max(slot.batch for phase in phases for slot in phase.slots)
    if largest > dataset_size:
        yield f"the largest batch, {largest} clips, exceeds the dataset's {dataset_size}: clips repeat within a step"
    if schedule.long and phases[-1].stage == 0:
        yield "one LR stage only: the long cycle runs once and no fine-tuning follows (base.lr_milestones sets the stages)"
